"""Gather the facts that the rules judge: the command, its environment, the folder, the machine."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from revox.deploy.errors import DeployError
from revox.deploy.facts import Facts, Gpu, Package, parse_serve

_ELSEWHERE = frozenset(
    ("docker", "podman", "nerdctl", "apptainer", "singularity", "kubectl", "ssh", "srun", "cd")
)
MAX_DEPLOY_BYTES = 1 << 20
TIMEOUT = 60.0
"""Seconds that another Python or nvidia-smi may take to answer."""

# Run by the other environment's Python, in / so that no module of the working folder is imported. It reads
# metadata only and imports nothing of vllm.
_LIST_PACKAGES = """
import json, sys, importlib.metadata as m
found = {}
for d in m.distributions():
    name = (d.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-")
    where = str(d.locate_file(""))
    copies = found.setdefault(name, [])
    if name and all(c["where"] != where for c in copies):
        copies.append(dict(version=d.version or "", where=where))
json.dump(dict(python="%d.%d" % sys.version_info[:2], packages=found), sys.stdout)
"""


class _Environment(BaseModel):
    """What `_LIST_PACKAGES` prints."""

    python: str
    packages: dict[str, tuple[Package, ...]]


def split_command(command: str | Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The assignments before a command, and its words. A string is split as a shell would.

    Raises DeployError if there is no command in it or its quotes do not close.
    """
    try:
        words = shlex.split(command.replace("\\\n", " ")) if isinstance(command, str) else list(command)
    except ValueError as error:
        raise DeployError(f"the command cannot be read ({error}); quote it as for a shell.") from None
    variables: dict[str, str] = {}
    if words[:1] == ["env"]:
        words.pop(0)
    while words and "=" in words[0] and words[0].split("=", 1)[0].isidentifier():
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    if not words:
        raise DeployError("there is no command to check; pass it as one quoted string, or after --.")
    return variables, words


def gather(
    command: str | Sequence[str] | None,
    folder: Path | None = None,
    python: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Facts:
    """The facts about a command (or, without one, about the environment of vllm-omni) on this machine.

    folder: the checkpoint; default the one that the command serves. python: the environment's interpreter;
    default the one of the command's program. The inside of a container is not examined.

    Raises DeployError if the command, the folder or the interpreter cannot be read, CheckpointError if the
    folder is not a checkpoint.
    """
    variables = dict(os.environ if environment is None else environment)
    assignments, words = split_command(command) if command is not None else ({}, [])
    variables |= assignments
    path = variables.get("PATH")
    programs = {n: shutil.which(n, path=path) for n in ("vllm", "vllm-omni")}
    serve = parse_serve(words)
    packages, version, deploy, problem, missing = None, None, None, None, None
    if serve is None or serve.image is None:
        packages, version = _packages(words, python, programs, variables)
        deploy, problem = _deploy_file(serve.flags if serve else {})
        if serve is not None and serve.model is not None:
            named = Path(os.path.expanduser(serve.model))
            folder = named if folder is None and named.is_dir() else folder
            # Anything else may be a hub id; inside of a container or on another machine nothing is known.
            path_like = serve.model.startswith(("./", "../", "/", "~")) and "$" not in serve.model
            if path_like and not named.exists() and not _ELSEWHERE & {Path(word).name for word in words}:
                missing = serve.model
    report, other = _folder(folder)
    return Facts(
        words=tuple(words),
        environment=variables,
        packages=packages,
        python=version,
        deploy=deploy,
        deploy_problem=problem,
        machine=platform.machine().lower(),
        folder=folder,
        report=report,
        other_model_type=other,
        gpus=gpus(path),
        missing_model=missing,
    )


def _packages(
    words: Sequence[str],
    python: str | None,
    programs: Mapping[str, str | None],
    environment: Mapping[str, str],
) -> tuple[dict[str, tuple[Package, ...]] | None, str | None]:
    """The packages and the version of `python`, or of the Python of the program that the command runs."""
    path = environment.get("PATH")
    if python is not None:
        found = shutil.which(python, path=path)
        if found is None:
            raise DeployError(f"{python} is not an executable Python; name the environment's bin/python.")
        interpreter: str | None = os.path.abspath(found)
    else:
        programs_to_try = (
            shutil.which(words[0], path=path) if words else None,
            programs.get("vllm-omni") or programs.get("vllm"),
        )
        pythons = (_python_of(Path(program).absolute()) for program in programs_to_try if program)
        interpreter = next(filter(None, pythons), None)
    if interpreter is None:
        return None, None
    try:
        answer = _Environment.model_validate_json(
            _run([interpreter, "-c", _LIST_PACKAGES], environment) or ""
        )
        return answer.packages, answer.python
    except ValueError:
        if python is not None:
            hint = "name the environment's bin/python"
            raise DeployError(f"{python} did not list its packages; {hint}.") from None
        return None, None


def _python_of(program: Path) -> str | None:
    """The interpreter of a program: itself, or the one in its first lines, or the one in its folder."""
    if program.name.startswith("python"):
        return str(program)
    try:
        with open(program, "rb") as file:
            lines = file.read(1024).decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines[:3]:
        # `#!/venv/bin/python`, or pip's form for long paths: `'''exec' "/venv/bin/python" "$0" "$@"`.
        text = line.removeprefix("#!").removeprefix("'''exec' ").strip()
        first = text[1:].split('"')[0] if text.startswith('"') else text.split(" ")[0]
        if Path(first).name.startswith("python") and Path(first).is_absolute() and Path(first).is_file():
            return first
    sibling = program.parent / "python"
    return str(sibling) if sibling.is_file() and lines[:1] and lines[0].startswith("#!") else None


def _deploy_file(flags: Mapping[str, str | None]) -> tuple[dict[str, Any] | None, str | None]:
    """The deploy file that the command names, parsed, or why it cannot be."""
    import yaml

    named = flags.get("deploy-config", "")
    if not named:
        return None, None if named == "" else "--deploy-config has no value"
    path = Path(named).expanduser()
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            return None, f"{path} is not a file"
        with open(path, "rb") as file:
            text = file.read(MAX_DEPLOY_BYTES + 1)
        if len(text) > MAX_DEPLOY_BYTES:
            return None, f"{path} is larger than any deploy file"
        parsed = yaml.safe_load(text)
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        return None, f"{path} is not YAML ({next(iter(str(error).splitlines()), 'nested too deeply')})"
    return (parsed, None) if isinstance(parsed, dict) else (None, f"{path} does not hold a mapping")


def _folder(folder: Path | None) -> tuple[Any, str | None]:
    """The folder's report, and the model_type of its config.json if that is another than Voxtral's."""
    if folder is None:
        return None, None
    if not folder.is_dir():
        raise DeployError(f"{folder} is not a folder here; name a checkpoint's folder.")
    from revox.checkpoint.inspect import inspect
    from revox.checkpoint.params import MODEL_TYPE, read_json

    config = folder / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    return inspect(folder), None if model_type in (None, MODEL_TYPE) else str(model_type)


def gpus(path: str | None) -> tuple[Gpu, ...]:
    """The GPUs of this machine, as nvidia-smi (found on `path`) tells; none where it is missing."""
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
    """The machine's total and available memory in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, IndexError, KeyError):
        return None


def _run(words: list[str], environment: Mapping[str, str] | None = None) -> str | None:
    """A program's output, or None if it fails. It runs in the root folder."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL, check=True,
            cwd="/", env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def start(words: list[str], environment: Mapping[str, str]) -> None:
    """Replace this process by the command. Does not return.

    Raises DeployError if the program is not on PATH.
    """
    program = shutil.which(words[0])
    if program is None:
        raise DeployError(
            f"{words[0]} is not on PATH; make an environment from the requirements.txt that was written, and "
            "activate it."
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, words, {**os.environ, **environment})
