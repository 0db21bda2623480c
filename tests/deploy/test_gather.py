"""What is gathered for the rules: commands, other environments, deploy files, folders, GPUs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from pathlib import Path

import pytest

import revox.demo
from revox.deploy.errors import DeployError
from revox.deploy.gather import gather, read_gpus, split_command, start
from revox.deploy.rules import find_problems


def distribution(site: Path, name: str, version: str) -> None:
    """An installed distribution's metadata, nothing else."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def environment(tmp_path):
    """An environment's folder with programs whose Python sees only what the test installs in `site`."""
    site, programs = tmp_path / "env" / "site", tmp_path / "env" / "bin"
    site.mkdir(parents=True)
    programs.mkdir()
    python = programs / "python"
    real = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{real}" -S "$@"\n')
    python.chmod(0o755)
    for name in ("vllm", "vllm-omni"):
        (programs / name).write_text(f"#!{python}\n")
        (programs / name).chmod(0o755)
    return site, programs


def variables(programs: Path) -> dict[str, str]:
    return {"PATH": f"{programs}:/usr/bin:/bin", "HOME": "/nonexistent"}


def test_the_packages_of_the_commands_own_environment_are_read(environment):
    site, programs = environment
    distribution(site, "vllm-omni", "0.30.0")
    distribution(site, "vllm", "0.28.0")
    facts = gather("vllm-omni serve /m --omni", environment=variables(programs))
    assert facts.omni == (0, 30)
    assert facts.package("vllm").version == "0.28.0"
    assert facts.package("vllm-omni").where == str(site)
    assert facts.package("numpy") is None
    assert facts.python == f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = {finding.rule for finding in find_problems(facts)}
    assert "version-pair" in found


def test_a_second_vllm_that_python_would_find_is_seen(environment, tmp_path):
    site, programs = environment
    other = tmp_path / "other"
    distribution(site, "vllm-omni", "0.30.0")
    distribution(site, "vllm", "0.30.0")
    distribution(other, "vllm", "0.9.0")
    (programs / "python").write_text((programs / "python").read_text().replace(str(site), f"{site}:{other}"))
    facts = gather(None, environment=variables(programs))
    assert [package.version for package in facts.packages["vllm"]] == ["0.30.0", "0.9.0"]
    assert "shared-environment" in {finding.rule for finding in find_problems(facts)}


def test_pips_script_for_long_paths_leads_to_its_python(environment):
    site, programs = environment
    distribution(site, "vllm-omni", "0.26.0")
    long = f"#!/bin/sh\n'''exec' \"{programs}/python\" \"$0\" \"$@\"\n' '''\n"
    (programs / "vllm-omni").write_text(long)
    assert gather("vllm-omni serve /m", environment=variables(programs)).omni == (0, 26)


def test_modules_of_the_working_folder_are_not_run(environment, tmp_path, monkeypatch):
    site, programs = environment
    distribution(site, "vllm-omni", "0.30.0")
    for name in ("json", "importlib"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert gather("vllm-omni serve /m", environment=variables(programs)).omni == (0, 30)
    assert not (tmp_path / "ran").exists()


def test_an_environment_that_cannot_be_asked_is_not_judged(environment, tmp_path):
    _, programs = environment
    (programs / "python").write_text("#!/bin/sh\necho nonsense\n")
    facts = gather("vllm-omni serve /m --omni --tokenizer-mode mistral", environment=variables(programs))
    assert facts.packages is None
    empty = {"PATH": str(tmp_path), "HOME": "/nonexistent"}
    assert gather("vllm-omni serve /m --omni", environment=empty).packages is None
    for wrong in ("/no/such/python", str(programs / "python"), "/bin/true"):
        with pytest.raises(DeployError, match="bin/python"):
            gather("vllm-omni serve /m", python=wrong, environment=variables(programs))


def test_an_environment_that_does_not_answer_is_given_up(environment, monkeypatch):
    _, programs = environment
    (programs / "python").write_text("#!/bin/sh\nexec sleep 20\n")
    monkeypatch.setattr("revox.deploy.gather.TIMEOUT", 0.2)
    begun = time.monotonic()
    assert gather("vllm-omni serve /m --omni", environment=variables(programs)).packages is None
    assert time.monotonic() - begun < 15


def test_inside_a_container_nothing_of_this_machines_environment_counts(environment):
    site, programs = environment
    distribution(site, "vllm-omni", "0.18.0")
    command = "docker run vllm/vllm-omni:v0.30.0 vllm serve /model --omni --deploy-config /no/such.yaml"
    facts = gather(command, environment=variables(programs))
    assert (facts.packages, facts.deploy_problem, facts.omni) == (None, None, (0, 30))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system ['touch owned']", "not YAML"),
        ("- 1\n- 2\n", "does not hold a mapping"),
        ("", "does not hold a mapping"),
        ("a: " + "[" * 3000, "not YAML"),
        ("#" * (1 << 20) + "\na: 1\n", "larger than any"),
    ],
)
def test_deploy_files_that_cannot_be_read_are_said(tmp_path, text, said):
    path = tmp_path / "deploy it.yaml"
    if text is not None:
        path.write_text(text)
    facts = gather(
        ["vllm-omni", "serve", "/m", "--omni", "--deploy-config", str(path)], environment={"PATH": ""}
    )
    assert said in facts.deploy_problem
    assert "stage-config" in {finding.rule for finding in find_problems(facts)}
    assert not Path("owned").exists()


def test_a_pipe_in_place_of_a_deploy_file_is_not_waited_for(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    opened = "revox.deploy.gather.open"
    monkeypatch.setattr(opened, lambda *_: pytest.fail("it would wait"), raising=False)
    facts = gather(f"vllm serve /m --deploy-config={pipe}", environment={"PATH": ""})
    assert facts.deploy_problem == f"{pipe} is not a file"


def test_a_deploy_file_is_read_and_a_missing_value_is_said(tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text("stages:\n  - stage_id: 0\n")
    facts = gather(f"vllm serve /m --deploy-config={path}", environment={"PATH": ""})
    assert facts.deploy == {"stages": [{"stage_id": 0}]}
    assert "no value" in gather("vllm serve /m --deploy-config", environment={"PATH": ""}).deploy_problem


def test_the_folder_that_is_served_is_inspected(tmp_path):
    folder = tmp_path / "my checkpoint"
    shutil.copytree(revox.demo.checkpoint_folder(), folder)
    (folder / "voice_embedding" / "ar_male.pt").unlink()
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    facts = gather(["vllm-omni", "serve", str(folder), "--omni"], environment={"PATH": ""})
    assert facts.folder == folder
    assert facts.other_model_type == "mistral"
    found = {finding.rule: finding.message for finding in find_problems(facts)}
    assert "ar_male" in found["voices"]


@pytest.mark.parametrize("model", ["./Missing", "/no/such/Missing", "~/no/such/Missing"])
def test_a_model_path_that_is_not_there_stops_the_server(model):
    facts = gather(["vllm-omni", "serve", model, "--omni"], environment={"PATH": ""})
    assert [(one.rule, one.stops) for one in find_problems(facts)] == [("model-path", True)]
    for other in (["hf/name"], ["/model"], ["--model", model]):
        found = gather(["docker", "run", "vllm/vllm-omni:v0.30.0", *other], environment={"PATH": ""})
        assert "model-path" not in {one.rule for one in find_problems(found)}
    for unknown in (f"cd /models && vllm-omni serve {model} --omni", "vllm-omni serve /models/$NAME --omni"):
        assert gather(unknown, environment={"PATH": ""}).missing_model is None


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(DeployError, match="is not a folder"):
        gather(None, folder=tmp_path / "none", environment={"PATH": ""})


def test_assignments_before_a_command_are_its_environment():
    assert split_command("A=1 B='x y' vllm serve \\\n /m --a=b") == (
        {"A": "1", "B": "x y"},
        ["vllm", "serve", "/m", "--a=b"],
    )
    assert split_command("env A=1 hf download x") == ({"A": "1"}, ["hf", "download", "x"])
    for nothing in ("", "   ", "A=1", "vllm 'serve", []):
        with pytest.raises(DeployError):
            split_command(nothing)


def test_nvidia_smis_memory_is_read_and_unified_memory_is_the_machines():
    csv = "NVIDIA H200, 143771, 143270\nNVIDIA GB10, [N/A], [N/A]\nodd line\n\n"
    gpus = read_gpus(csv, (128 * 10**9, 100 * 10**9))
    assert [(gpu.name, gpu.total, gpu.free) for gpu in gpus] == [
        ("NVIDIA H200", 143771 * 1024**2, 143270 * 1024**2),
        ("NVIDIA GB10", 128 * 10**9, 100 * 10**9),
    ]
    assert len(read_gpus(csv, None)) == 1


def test_what_the_machine_is_is_what_python_says():
    facts = gather("vllm-omni serve a/b --omni", environment={"PATH": ""})
    assert facts.machine == platform.machine().lower()


def test_a_program_that_is_not_there_cannot_be_started(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeployError, match="not on PATH"):
        start(["vllm-omni", "serve"], {})
