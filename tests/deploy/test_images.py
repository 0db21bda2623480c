"""The container files, as far as they can be judged without building them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from revox.cli.main import build_app

ROOT = Path(__file__).parent.parent.parent
DOCKERFILES = [ROOT / "deploy" / "Dockerfile.cpu", ROOT / "deploy" / "Dockerfile.cuda"]
FILES = [*DOCKERFILES, ROOT / "deploy" / "compose.yaml", ROOT / ".dockerignore"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its text on one line) in order."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line.strip()
    ]


def last(path: Path, name: str) -> str:
    return [text for instruction, text in instructions(path) if instruction == name][-1]


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_images_command_is_one_that_revox_takes(path):
    assert json.loads(last(path, "ENTRYPOINT")) == ["revox"]
    name, *words = json.loads(last(path, "CMD"))
    command = typer.main.get_command(build_app()).commands[name]
    found = command.make_context(name, words, resilient_parsing=False).params
    assert (found["checkpoint"], found["host"], found["port"]) == ("/checkpoint", "0.0.0.0", 8000)
    volumes = json.loads(last(path, "VOLUME"))
    assert found["checkpoint"] in volumes
    assert any(Path(found["voices_folder"]).is_relative_to(volume) for volume in volumes)
    assert last(path, "EXPOSE") == str(found["port"])


def test_a_command_that_revox_does_not_take_would_be_found():
    command = typer.main.get_command(build_app()).commands["serve"]
    with pytest.raises(Exception, match="No such option"):
        command.make_context("serve", ["/checkpoint", "--no-such-option"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_server_is_not_root_and_writes_in_its_volume_only(path):
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last(path, "USER"))
    variables = dict(re.findall(r"(\w+)=(\S+)", last(path, "ENV")))
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "HF_HOME"):
        assert Path(variables[name]).is_relative_to("/data")
    order = [instruction for instruction, _ in instructions(path)]
    assert "RUN" not in order[order.index("USER") :]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_everything_that_is_copied_is_in_the_context(path):
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [text.split() for name, text in instructions(path) if name == "COPY" and "--from" not in text]
    sources = {source for words in copied for source in words[:-1]}
    assert sources == set(kept)
    assert all((ROOT / source).exists() for source in sources)


def test_the_context_holds_nothing_but_what_is_named():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_an_index_of_packages(path):
    # Pieced together, as in test_house.py.
    found = re.search(
        "|".join(("py" + r"pi\.org", "python" + "hosted", "download" + r"\.pytorch")), path.read_text()
    )
    assert found is None


def test_the_images_differ_in_torch_alone():
    cpu, cuda = (dict(enumerate(instructions(path))) for path in DOCKERFILES)
    apart = {cpu[i][0] for i in cpu if cpu[i] != cuda[i]}
    assert len(cpu) == len(cuda)
    assert apart == {"RUN", "LABEL", "ENV"}
    assert "torch.version.cuda is None" in DOCKERFILES[0].read_text()
    assert "assert torch.version.cuda," in DOCKERFILES[1].read_text()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compose_builds_the_image_of_its_name_and_keeps_it_in_bounds(name):
    service = compose()["services"][name]
    assert (ROOT / "deploy" / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]) in DOCKERFILES
    assert service["build"]["dockerfile"].endswith(name)
    assert set(service["build"]["args"]) <= {
        text.split("=")[0] for i, text in instructions(DOCKERFILES[0]) if i == "ARG"
    }
    assert service["user"] == last(DOCKERFILES[0], "USER")
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["ports"] == ["${LISTEN:-127.0.0.1}:${PORT:-8000}:8000"]
    mounts = {volume["target"]: volume for volume in service["volumes"]}
    assert mounts["/checkpoint"]["read_only"]
    assert not mounts["/data"].get("read_only")
    assert mounts["/data"]["source"] in compose()["volumes"]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_composes_command_is_the_images_and_takes_the_keys_that_its_header_names(name):
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    assert compose()["services"][name]["command"] == json.loads(last(DOCKERFILES[0], "CMD"))
    with_keys = yaml.safe_load(re.sub(r"^(    )# (- \S+)$", r"\1\2", text, flags=re.M))
    _, *words = with_keys["services"][name]["command"]
    commands = typer.main.get_command(build_app()).commands
    keys = commands["serve"].make_context("serve", words, resilient_parsing=False).params["api_keys"]
    assert f"{name} keys add ada --file {keys}" in text.replace("SERVICE", name)
    add = commands["keys"].commands["add"]
    assert add.make_context("add", ["ada", "--file", str(keys)]).params["file"] == Path(keys)


def test_only_the_cuda_service_asks_for_a_gpu():
    services = compose()["services"]
    assert "deploy" not in services["cpu"]
    assert services["cuda"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_health_is_asked_in_the_same_way_everywhere_and_at_an_address_that_the_server_has():
    asked = {last(path, "HEALTHCHECK").split("CMD ", 1)[1] for path in DOCKERFILES}
    checks = [service["healthcheck"]["test"] for service in compose()["services"].values()]
    assert len(asked) == 1
    words = json.loads(asked.pop())
    assert all(check == ["CMD", *words] for check in checks)
    address = re.search(r"127\.0\.0\.1:8000(/\w+)", words[-1]).group(1)
    assert f'"{address}"' in (ROOT / "src" / "revox" / "serving" / "model_routes.py").read_text()
    compile(words[-1], "healthcheck", "exec")


def test_the_grace_that_a_container_is_given_is_longer_than_the_servers():
    command = typer.main.get_command(build_app()).commands["serve"]
    drain = next(param.default for param in command.params if param.name == "drain_seconds")
    for service in compose()["services"].values():
        assert float(service["stop_grace_period"].removesuffix("s")) > drain


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not here")
def test_hadolint_has_nothing_to_say():
    import subprocess

    done = subprocess.run(["hadolint", *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_document_lists_every_rule_and_the_numbers_that_it_computes():
    from revox.deploy.rules import RULES
    from revox.deploy.vllm_omni import MATCHING, Deployment

    text = (ROOT / "docs" / "deployment.md").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)` \|", text, re.M)) == set(RULES)
    assert MATCHING["vllm"].removeprefix("==") in text
    first, second = Deployment(ROOT, ROOT, gpu_memory=0.3).shares
    assert f"{first * 80:.1f} GB for speech, {second * 80:.1f} GB for the codec" in text
    position = 26 * 2 * 8 * 128 * 2
    assert f"{position:,}" in text
    assert f"{position * 4096 * 32 / 1e9:.1f} GB for 32 requests" in text
