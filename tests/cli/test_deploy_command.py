"""`revox deploy` as it is typed: what it writes, prints, starts and answers with."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import revox.demo
from revox.cli.main import main
from revox.deploy.server import ServerReport
from revox.deploy.vllm_omni import DEPLOY_NAME


@pytest.fixture
def revox_cli(monkeypatch, capsys, tmp_path):
    """Runs the command line in `tmp_path` -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["revox", *words])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_command_that_is_printed_is_the_one_that_is_written(revox_cli, tmp_path):
    folder = str(revox.demo.checkpoint_folder())
    code, out, err = revox_cli("deploy", "vllm-omni", folder, "--gpu-memory", "0.45", "--port", "9000")
    assert code == 0
    words = shlex.split(out)
    script = (tmp_path / "vllm-omni-deploy" / "serve.sh").read_text().splitlines()[-1]
    assert shlex.split(script)[1:] == words
    assert words[words.index("--port") + 1] == "9000"
    deploy = yaml.safe_load(Path(words[words.index("--deploy-config") + 1]).read_text())
    assert [stage["gpu_memory_utilization"] for stage in deploy["stages"]] == [0.4, 0.05]
    assert "ref_audio will be refused" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mistralai/Voxtral-4B-TTS-2603"], "local folder only"),
        (["."], "params.json"),
        (["LAB", "--gpu-memory", "2"], "--gpu-memory"),
        (["LAB", "--port", "70000"], "--port"),
        (["LAB", "--out", "a-file"], "a-file"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(revox_cli, tmp_path, words, said):
    (tmp_path / "a-file").write_text("x")
    words = [str(revox.demo.checkpoint_folder()) if word == "LAB" else word for word in words]
    code, out, err = revox_cli("deploy", "vllm-omni", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "vllm-omni-deploy").exists()


def fake_environment(tmp_path: Path, omni: str, vllm: str) -> Path:
    """A bin folder whose vllm-omni notes its words, in an environment of these versions."""
    site, programs = tmp_path / "site", tmp_path / "bin"
    programs.mkdir()
    for name, version in (("vllm-omni", omni), ("vllm", vllm)):
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = programs / "python"
    real = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{real}" -S "$@"\n')
    python.chmod(0o755)
    program = programs / "vllm-omni"
    program.write_text(f"#!{python}\n")
    program.chmod(0o755)
    return programs


def test_run_becomes_vllm_omni_with_those_words(revox_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{fake_environment(tmp_path, '0.30.0', '0.30.0')}:/usr/bin:/bin")
    # What was named wins over what the shell has.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    became = []
    monkeypatch.setattr("os.execve", lambda *words: became.append(words))
    code, out, _ = revox_cli(
        "deploy", "vllm-omni", str(revox.demo.checkpoint_folder()), "--run", "--gpu", "1", "--out", "o"
    )
    assert code == 0
    [(program, words, environment)] = became
    assert program == str(tmp_path / "bin" / "vllm-omni")
    assert ["CUDA_VISIBLE_DEVICES=1", *words] == shlex.split(out)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    ("omni", "vllm", "said"),
    [
        ("0.30.0", "0.28.0", "is installed with vllm-omni"),
        ("0.28.0", "0.28.0", "found vllm-omni 0.28.0, at least 0.30 is needed"),
        ("0.32.0", "0.32.0", "the files are for vllm-omni 0.30.0"),
    ],
)
def test_run_starts_nothing_with_versions_that_do_not_belong_together(
    revox_cli, tmp_path, monkeypatch, omni, vllm, said
):
    monkeypatch.setenv("PATH", f"{fake_environment(tmp_path, omni, vllm)}:/usr/bin:/bin")
    monkeypatch.setattr("os.execve", lambda *words: pytest.fail("it was started"))
    code, _, err = revox_cli("deploy", "vllm-omni", str(revox.demo.checkpoint_folder()), "--run")
    assert code == 2
    assert said in err.splitlines()[-1]


def test_run_without_vllm_omni_is_a_sentence(revox_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, _, err = revox_cli("deploy", "vllm-omni", str(revox.demo.checkpoint_folder()), "--run")
    assert code == 2
    assert "not on PATH" in err.splitlines()[-1]
    assert (tmp_path / "vllm-omni-deploy" / DEPLOY_NAME).exists()


def test_check_names_the_problem_its_cause_its_fix_and_its_sources(revox_cli):
    code, out, _ = revox_cli("deploy", "check", "vllm serve /m --tokenizer-mode mistral")
    assert code == 1
    for said in ("error: the command has no --omni", "why: ", "fix: add --omni", "Sources: "):
        assert said in out


def test_check_takes_a_commands_words_and_prints_json(revox_cli):
    code, out, _ = revox_cli(
        "deploy", "check", "--json", "--", "vllm-omni", "serve", "/m", "--stage-configs-path=x"
    )
    found = json.loads(out)
    assert code == int(any(finding["stops"] for finding in found["findings"]))
    assert {"rule", "message", "fix", "why"} <= set(found["findings"][0])
    assert found["checked"]["command"] == "starts a server"


def test_check_says_what_it_did_not_find(revox_cli, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, _ = revox_cli("deploy", "check")
    assert code == 0
    assert "environment: not found" in out
    assert "none of the known problems was found in what was checked" in out


@pytest.mark.parametrize("words", [["ls -l"], ["serve.sh"], ["--", "pip", "install", "vllm"], ["LAB"]])
def test_a_command_that_starts_no_server_is_not_a_pass(revox_cli, words):
    folder = str(revox.demo.checkpoint_folder())
    code, out, err = revox_cli("deploy", "check", *(folder if word == "LAB" else word for word in words))
    assert (code, out) == (2, "")
    assert ("-c" in err) if words == ["LAB"] else ("starts neither vllm nor vllm-omni" in err)


def test_a_long_line_is_a_command_and_no_name_of_a_file(revox_cli):
    line = f"docker run {'-e NAME=value ' * 30}vllm/vllm-omni:v0.30.0 --model x"
    _, out, err = revox_cli("deploy", "check", line)
    assert "starts a server from the image vllm/vllm-omni" in out, err


def test_check_obeys_no_terminal_codes_of_a_command(revox_cli):
    _, out, err = revox_cli("deploy", "check", "docker run vllm/vllm-omni:\x1b[2J vllm serve '[bold]/m'")
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 0),
        ({"healthy": False}, 1),
        ({"ref_audio": "failed"}, 1),
        ({"ref_audio": "refused"}, 0),
        ({"kind": "vllm"}, 1),
        ({"voices": ["ada"]}, 1),
        ({"voices": "more"}, 0),
    ],
)
def test_a_servers_answers_are_shown_and_decide_the_exit_code(revox_cli, monkeypatch, changes, code):
    from revox.checkpoint.inspect import inspect

    folder = revox.demo.checkpoint_folder()
    names = [voice.name for voice in inspect(folder).voices]
    given = {"kind": "vllm-omni", "version": "0.30.0", "healthy": True, "voices": names, "ref_audio": "works"}
    if changes.get("voices") == "more":
        changes = {"voices": [*names, "ada"]}
    asked = []

    def examine(url: str, key: str | None, probe: bool) -> ServerReport:
        asked.append((url, key, probe))
        return ServerReport(url, **{**given, **changes})

    monkeypatch.setattr("revox.deploy.server.examine_server", examine)
    monkeypatch.setenv("THE_KEY", "secret")
    words = (
        "deploy",
        "check",
        "http://a:1",
        "--folder",
        str(folder),
        "--key-from",
        "THE_KEY",
        "--no-ref-audio",
    )
    found, out, _ = revox_cli(*words)
    assert found == code
    assert asked == [("http://a:1", "secret", False)]
    assert "secret" not in out
    assert revox_cli(*words, "--json")[0] == code
    if "voices" in changes:
        assert ("restart it" in out) is bool(code)
        assert "the folder does not list the server's voice ada" in out


def test_a_servers_report_as_json_tells_voices_that_the_folder_does_not_list(revox_cli, monkeypatch):
    def examine(url: str, key: str | None, probe: bool) -> ServerReport:
        return ServerReport(url, kind="vllm-omni", version="0.30.0", healthy=True, voices=["ada"])

    monkeypatch.setattr("revox.deploy.server.examine_server", examine)
    _, out, _ = revox_cli(
        "deploy", "check", "http://a:1", "--json", "--folder", str(revox.demo.checkpoint_folder())
    )
    said = json.loads(out)
    assert (said["kind"], said["version"], said["voices"]) == ("vllm-omni", "0.30.0", ["ada"])
    assert "the server lacks the folder's voice ar_male" in said["voice_differences"]
    assert "the folder does not list the server's voice ada" in said["voice_differences"]


def test_check_looks_into_the_folder_and_the_python_that_were_named(revox_cli, tmp_path):
    python = fake_environment(tmp_path, "0.28.0", "0.28.0") / "python"
    folder = str(revox.demo.checkpoint_folder())
    _, out, _ = revox_cli("deploy", "check", "--folder", folder, "--python", str(python))
    assert f"folder: {folder}" in out
    assert "vllm-omni 0.28.0, vllm 0.28.0" in out
    assert "found vllm-omni 0.28.0, at least 0.30 is needed [old-version]" in out


def test_an_address_without_its_beginning_is_no_command(revox_cli):
    for target in ("localhost:8000", "10.0.0.1:8000/v1"):
        code, _, err = revox_cli("deploy", "check", target)
        assert (code, f"http://{target}" in err) == (2, True)


def test_an_address_that_others_reach_is_said_to_need_a_key(revox_cli):
    folder = str(revox.demo.checkpoint_folder())
    assert "VLLM_API_KEY" in revox_cli("deploy", "vllm-omni", folder, "--host", "0.0.0.0")[2]
    assert "VLLM_API_KEY" not in revox_cli("deploy", "vllm-omni", folder)[2]


def test_a_key_that_is_not_set_and_a_server_that_is_not_there_are_sentences(revox_cli):
    code, _, err = revox_cli("deploy", "check", "http://127.0.0.1:9", "--key-from", "NO_SUCH_KEY")
    assert (code, "NO_SUCH_KEY is not set" in err) == (2, True)
    code, _, err = revox_cli("deploy", "check", "http://127.0.0.1:9")
    assert (code, "is the server running there" in err) == (2, True)


def test_notes_of_the_folder_are_told(revox_cli, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(revox.demo.checkpoint_folder(), folder)
    (folder / "voice_embedding" / "ar_male.pt").rename(folder / "voice_embedding" / "stray.pt")
    code, _, err = revox_cli("deploy", "vllm-omni", str(folder))
    assert (code, "ar_male" in err) == (2, True)
    shutil.copy(folder / "voice_embedding" / "stray.pt", folder / "voice_embedding" / "ar_male.pt")
    code, _, err = revox_cli("deploy", "vllm-omni", str(folder))
    assert (code, "note: params.json does not list the voice stray" in err) == (0, True)
