"""Gather what the traps look at: the command, its environment, the folder, the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revox.deploy.errors import DeployError
from revox.deploy.facts import Gpu, Package, Scene, SourceTree, parse_serve

MAX_DEPLOY_BYTES = 1 << 20
ASKING_SECONDS = 60.0
"""How long another Python, nvidia-smi or git may take to answer."""

# Run by the other environment's Python, at / so that no module of the working folder is found; only metadata
# is read, nothing of vllm is imported.
_PROBE = """
import json, sys, importlib.metadata as m
found = {}
for d in m.distributions():
    name = (d.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-")
    where = str(d.locate_file(""))
    copies = found.setdefault(name, [])
    if name and all(c["where"] != where for c in copies):
        tags = [l[5:] for l in (d.read_text("WHEEL") or "").splitlines() if l.startswith("Tag: ")]
        requires = list(d.requires or []) if name == "vllm-omni" else []
        copies.append(dict(version=d.version or "", where=where, requires=requires, tags=tags))
json.dump(dict(python="%d.%d" % sys.version_info[:2], packages=found), sys.stdout)
"""


def split_command(command: str | Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The assignments before a command and its words. A string is split as a shell would.

    Raises:
        DeployError: there is no command in it, or its quotes do not close.
    """
    if isinstance(command, str):
        try:
            words = shlex.split(command.replace("\\\n", " "))
        except ValueError as error:
            raise DeployError(f"the command cannot be read ({error}); quote it as for a shell.") from None
    else:
        words = list(command)
    given: dict[str, str] = {}
    if words[:1] == ["env"]:
        words.pop(0)
    while words and "=" in words[0] and words[0].split("=", 1)[0].isidentifier():
        name, value = words.pop(0).split("=", 1)
        given[name] = value
    if not words:
        raise DeployError("there is no command to examine; give it as one quoted text, or after --.")
    return given, words


def gather(
    command: str | Sequence[str] | None,
    folder: Path | None = None,
    python: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Scene:
    """Look at a command (or, without one, at the environment of vllm-omni) on this machine.

    folder: the checkpoint; else the one that the command serves. python: the interpreter of the environment;
    else the one behind the command's program. A container's inside is not looked at.

    Raises:
        DeployError: the command, the folder or the interpreter cannot be read.
        CheckpointError: the folder is no checkpoint.
    """
    base = dict(os.environ if environment is None else environment)
    given, words = split_command(command) if command is not None else ({}, [])
    base |= given
    path = base.get("PATH")
    names = ["vllm", "vllm-omni", "hf", "huggingface-cli"]
    programs = {name: shutil.which(name, path=path) for name in names}
    serve = parse_serve(words)
    in_container = serve is not None and serve.image is not None
    packages, version = (None, None) if in_container else _packages(words, python, programs, base)
    deploy, problem = (None, None) if in_container else _deploy_file(serve.flags if serve else {})
    if folder is None and serve is not None and serve.model is not None and not in_container:
        named = Path(serve.model).expanduser()
        folder = named if named.is_dir() else None
    report, other = _folder(folder)
    return Scene(
        words=tuple(words),
        environment=base,
        packages=packages,
        python=version,
        deploy=deploy,
        deploy_problem=problem,
        programs=programs,
        machine=platform.machine().lower(),
        source=_source(words),
        folder=folder,
        report=report,
        other_model_type=other,
        gpus=_gpus(path),
        disk_free=_disk_free(base),
    )


def _packages(
    words: Sequence[str],
    python: str | None,
    programs: Mapping[str, str | None],
    environment: Mapping[str, str],
) -> tuple[dict[str, tuple[Package, ...]] | None, str | None]:
    interpreter, path = python, environment.get("PATH")
    if interpreter is not None and shutil.which(interpreter, path=path) is None:
        raise DeployError(
            f"{interpreter} is not a Python that can be run; name the environment's bin/python."
        )
    if interpreter is not None:
        interpreter = os.path.abspath(shutil.which(interpreter, path=path) or interpreter)
    if interpreter is None and words:
        program = shutil.which(words[0], path=path)
        interpreter = program and _python_of(Path(program).absolute())
    if interpreter is None:
        program = programs.get("vllm-omni") or programs.get("vllm")
        interpreter = program and _python_of(Path(program).absolute())
    if interpreter is None:
        return None, None
    answer = _run([interpreter, "-c", _PROBE], environment)
    try:
        found = json.loads(answer or "")
        packages = {
            name: tuple(
                Package(one["version"], one["where"], tuple(one["requires"]), tuple(one["tags"]))
                for one in copies
            )
            for name, copies in found["packages"].items()
        }
        return packages, str(found["python"])
    except (ValueError, KeyError, TypeError, AttributeError):
        if python is not None:
            raise DeployError(
                f"{python} did not list its packages; name the environment's bin/python."
            ) from None
        return None, None


def _python_of(program: Path) -> str | None:
    """The interpreter behind a program: itself, or the one that its first lines name, or its neighbour."""
    if program.name.startswith("python"):
        return str(program)
    try:
        with open(program, "rb") as file:
            lines = file.read(1024).decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines[:3]:
        # `#!/venv/bin/python`, or pip's form for long paths: `'''exec' "/venv/bin/python" "$0" "$@"`.
        said = line.removeprefix("#!").removeprefix("'''exec' ").strip()
        first = said[1:].split('"')[0] if said.startswith('"') else said.split(" ")[0]
        if Path(first).name.startswith("python") and Path(first).is_absolute() and Path(first).is_file():
            return first
    beside = program.parent / "python"
    return str(beside) if beside.is_file() and lines[:1] and lines[0].startswith("#!") else None


def _deploy_file(flags: Mapping[str, str | None]) -> tuple[dict[str, Any] | None, str | None]:
    """The file that the command names, parsed, or why it cannot be."""
    named = next((flags[name] for name in ("deploy-config", "stage-configs-path") if name in flags), "")
    if named == "":
        return None, None
    if named is None:
        return None, "the flag for the stage or deploy file has no value"
    path = Path(named).expanduser()
    import yaml

    try:
        # Opening a pipe would wait for whoever writes to it.
        if path.exists() and not path.is_file():
            return None, f"{path} is not a file"
        with open(path, "rb") as file:
            text = file.read(MAX_DEPLOY_BYTES + 1)
        if len(text) > MAX_DEPLOY_BYTES:
            return None, f"{path} is larger than any deploy file"
        parsed = yaml.safe_load(text)
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        return (
            None,
            f"{path} is not YAML ({str(error).splitlines()[0] if str(error) else 'nested too deeply'})",
        )
    return (parsed, None) if isinstance(parsed, dict) else (None, f"{path} does not hold a mapping")


def _folder(folder: Path | None) -> tuple[Any, str | None]:
    """The folder's report, and the model_type of a config.json in it that is another than Voxtral's."""
    if folder is None:
        return None, None
    if not folder.is_dir():
        raise DeployError(f"{folder} is not a folder here; name a checkpoint's folder.")
    from revox.checkpoint.inspect import inspect
    from revox.checkpoint.params import MODEL_TYPE, read_json

    report = inspect(folder)
    config = folder / "config.json"
    said = read_json(config).get("model_type") if config.is_file() else None
    return report, None if said in (None, MODEL_TYPE) else str(said)


def _source(words: Sequence[str]) -> SourceTree | None:
    """The source of vllm-omni that a command would build: pip install, uv pip install, docker build."""
    if "install" not in words and "build" not in words:
        return None
    for word in words[1:]:
        tree = Path(word.split("[", 1)[0]).expanduser()
        if not word.startswith("-") and tree.is_dir() and (tree / "vllm_omni").is_dir():
            told = (
                _run(["git", "-C", str(tree.resolve()), "describe", "--tags"])
                if (tree / ".git").exists()
                else None
            )
            return SourceTree(str(tree), bool(told and told.strip()))
    return None


def _gpus(path: str | None) -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi", path=path)
    if program is None:
        return ()
    query = "--query-gpu=name,memory.total,memory.free"
    return read_gpus(_run([program, query, "--format=csv,noheader,nounits"]) or "", _unified_memory())


def read_gpus(answer: str, unified: tuple[int, int] | None) -> tuple[Gpu, ...]:
    """GPUs from nvidia-smi's CSV (MiB). Where the memory is the machine's (GB10) it says [N/A]: `unified`."""
    found = []
    for line in answer.splitlines():
        name, *numbers = (part.strip() for part in line.split(","))
        if len(numbers) != 2:
            continue
        if all(number.isdigit() for number in numbers):
            found.append(Gpu(name, int(numbers[0]) << 20, int(numbers[1]) << 20))
        elif unified is not None:
            found.append(Gpu(name, *unified))
    return tuple(found)


def _unified_memory() -> tuple[int, int] | None:
    """The machine's memory, all and available, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, IndexError, KeyError):
        return None


def _disk_free(environment: Mapping[str, str]) -> int | None:
    """Free bytes where the hub's downloads go (huggingface_hub's own order of variables)."""
    home = environment.get("HF_HOME") or str(
        Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    place = Path(environment.get("HF_HUB_CACHE") or home).expanduser()
    for folder in (place, *place.parents):
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return None


def _run(words: list[str], environment: Mapping[str, str] | None = None) -> str | None:
    """A program's output, or None if it fails. It runs in the root folder."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=ASKING_SECONDS, stdin=subprocess.DEVNULL,
            check=False, cwd="/", env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def start(words: list[str], environment: Mapping[str, str]) -> None:
    """Become the command. Does not return.

    Raises:
        DeployError: the program is not on PATH.
    """
    program = shutil.which(words[0])
    if program is None:
        raise DeployError(
            f"{words[0]} is not on PATH; make an environment from the requirements.txt that was written and "
            "activate it."
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, words, {**os.environ, **environment})
