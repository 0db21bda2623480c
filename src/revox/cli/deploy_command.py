"""`revox deploy`: serve the same folder with vllm-omni, and find the known problems first."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from revox.cli.options import CheckpointArgument, CheckpointOption, chosen_checkpoint, with_old_names

if TYPE_CHECKING:
    from rich.console import Console

    from revox.deploy.facts import Facts
    from revox.deploy.rules import RuleFinding
    from revox.deploy.server import ServerReport

app = typer.Typer(help="Serve a folder with vllm-omni, and find what prevents it.", no_args_is_help=True)


@app.command("vllm-omni")
def vllm_omni_command(
    checkpoint: CheckpointArgument = None,
    checkpoint_option: CheckpointOption = None,
    gpu_memory: Annotated[
        float, typer.Option(help="The share of the GPU's memory for both stages together, 0 to 1.")
    ] = 0.9,
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is all of them.")
    ] = "127.0.0.1",
    gpu: Annotated[int | None, typer.Option(help="The GPU's number; default: the first visible one.")] = None,
    quantization: Annotated[
        str | None,
        typer.Option(metavar="fp8", help="Hold the language model in 8 bits, quantized as it is loaded."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the files.")] = Path("vllm-omni-deploy"),
    run: Annotated[bool, typer.Option("--run", help="Check for known problems, then start it here.")] = False,
) -> None:
    """Write what vllm-omni needs to serve CHECKPOINT, a folder and not a hub id, and print the command.

    Writes a deploy file with the shares of memory, a compose file, the command as a script, and a
    requirements file with versions that work together.
    """
    from rich.console import Console

    from revox.deploy.vllm_omni import VERSION, Deployment, servable

    folder = Path(chosen_checkpoint(checkpoint, checkpoint_option)).expanduser()  # not a hub id
    out = out.expanduser()
    report = servable(folder)
    plan = Deployment(folder, out, gpu_memory, host, port, gpu, quantization)
    written = plan.write()
    console = Console(stderr=True, highlight=False)
    for path in written:
        _print(console, f"written: {path}")
    speech, codec = plan.shares
    _print(console, f"for vllm-omni {VERSION}: {speech:g} of the GPU for speech, {codec:g} for the codec")
    if quantization is not None:
        message = "the language model in FP8; the acoustic transformer and the codec stay in BF16"
        _print(console, message)
    if report.encoder == "absent":
        message = "ref_audio will be refused: the folder has no encoder (cloned voices work as presets)"
        _print(console, message)
    for note in report.notes:
        _print(console, f"note: {note}", "yellow")
    if host not in ("127.0.0.1", "::1", "localhost"):
        message = "note: anyone who reaches this address can use it, unless VLLM_API_KEY holds a key"
        _print(console, message, "yellow")
    print(_printable(plan.shell_command()))
    if run:
        _run(plan.command(), plan.environment(), folder, console)


def _run(words: list[str], environment: dict[str, str], folder: Path, console: Console) -> None:
    from revox.deploy.errors import DeployError
    from revox.deploy.facts import minor
    from revox.deploy.gather import gather, start
    from revox.deploy.rules import find_problems
    from revox.deploy.vllm_omni import VERSION

    facts = gather(words, folder, environment={**os.environ, **environment})
    findings = find_problems(facts)
    _print_findings(findings, console)
    if findings and findings[0].stops:
        raise DeployError(f"not started: {findings[0].message}; {findings[0].fix}.")
    if facts.packages is not None and facts.omni != minor(VERSION):
        found = facts.package("vllm-omni")
        raise DeployError(
            f"not started: the files are for vllm-omni {VERSION}, and {found.version if found else 'none'} "
            "is installed; make an environment from requirements.txt."
        )
    start(words, environment)


@app.command("check", cls=with_old_names({"--folder": "--checkpoint"}))
def check_command(
    target: Annotated[
        list[str] | None,
        typer.Argument(help="A server's address, or the command that would start one (quoted, or after --)."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="The checkpoint's folder; default: the one in the command."),
    ] = None,
    python: Annotated[str | None, typer.Option(help="The Python of vllm-omni's environment.")] = None,
    key_from: Annotated[str | None, typer.Option(help="The variable that holds the server's key.")] = None,
    no_ref_audio: Annotated[
        bool, typer.Option("--no-ref-audio", help="Do not try ref_audio on the server.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a command, its environment and folder for known problems, or examine a running server.

    Exit code 1 if something prevents the server from working. ref_audio is never sent to a server whose
    version could crash on it.
    """
    from rich.console import Console

    from revox.deploy.errors import DeployError

    console = Console(highlight=False)
    words = target or []
    if len(words) == 1 and re.fullmatch(r"[\w.-]+:\d+(/\S*)?", words[0]):
        raise DeployError(f"{words[0]} lacks a scheme; write http://{words[0]}.")
    if len(words) == 1 and words[0].lower().startswith(("http://", "https://")):
        healthy = _check_server(words[0], folder, key_from, not no_ref_audio, as_json, console)
    else:
        healthy = _check_command(words, folder, python, as_json, console)
    if not healthy:
        raise typer.Exit(1)


def _check_command(
    words: list[str], folder: Path | None, python: str | None, as_json: bool, console: Console
) -> bool:
    from revox.deploy.errors import DeployError
    from revox.deploy.facts import parse_serve
    from revox.deploy.gather import gather, split_command
    from revox.deploy.rules import find_problems

    if len(words) == 1 and os.path.isdir(os.path.expanduser(words[0])):  # a Path of a long line raises
        raise DeployError(f"{words[0]} is a folder, not a command; name it with -c.")
    command: str | list[str] | None = words[0] if len(words) == 1 else words or None
    if command is not None and parse_serve(split_command(command)[1]) is None:
        raise DeployError(
            "the command starts neither vllm nor vllm-omni; pass the line that does (of a script, its "
            "line), such as 'vllm serve FOLDER --omni'."
        )
    facts = gather(command, folder.expanduser() if folder else None, python)
    findings = find_problems(facts)
    if as_json:
        listed = {"checked": _checked(facts), "findings": [vars(finding) for finding in findings]}
        print(json.dumps(listed, indent=2))
    else:
        for what, text in _checked(facts).items():
            _print(console, f"{what}: {text}")
        _print_findings(findings, console)
        if not findings:
            _print(console, "none of the known problems was found in what was checked", "green")
    return not any(finding.stops for finding in findings)


def _checked(facts: Facts) -> dict[str, str]:
    """What the rules could judge, so that silence about the rest is not taken for a pass."""
    omni, vllm = facts.package("vllm-omni"), facts.package("vllm")
    if facts.packages is None:
        environment = "not found (no vllm-omni or vllm on PATH, or in a container); --python names one"
    else:
        environment = (
            f"Python {facts.python}, vllm-omni {omni.version if omni else 'none'}, "
            f"vllm {vllm.version if vllm else 'none'}, {len(facts.packages)} packages"
        )
    if not facts.words:
        command = "none given"
    else:
        image = facts.serve.image if facts.serve is not None else None
        command = "starts a server" + (f" from the image {image}" if image else "")
    gpus = ", ".join(f"{g.name} ({g.total / 1e9:.0f} GB, {g.free / 1e9:.0f} free)" for g in facts.gpus)
    return {
        "command": command,
        "environment": environment,
        "folder": str(facts.folder) if facts.folder else "none found",
        "machine": f"{facts.machine}, {gpus or 'no GPU found'}",
    }


def _print_findings(findings: list[RuleFinding], console: Console) -> None:
    for finding in findings:
        label, style = ("error", "bold red") if finding.stops else ("warning", "bold yellow")
        _print(console, f"{label}: {finding.message} [{finding.rule}]", style)
        _print(console, f"  why: {finding.why}")
        _print(console, f"  fix: {finding.fix}")


def _check_server(
    url: str, folder: Path | None, key_from: str | None, probe: bool, as_json: bool, console: Console
) -> bool:
    from revox.deploy.errors import DeployError
    from revox.deploy.server import FAILED, examine_server

    key = None
    if key_from is not None:
        key = os.environ.get(key_from)
        if not key:
            raise DeployError(f"the variable {key_from} is not set; export the server's key in it.")
    report = examine_server(url, key, probe)
    missing, additional = _compare_voices(report, folder.expanduser()) if folder is not None else ([], [])
    if as_json:
        print(json.dumps(vars(report) | {"voice_differences": missing + additional}, indent=2))
    else:
        _print_server(report, missing + additional, console)
    speaks = report.kind in ("vllm-omni", "revox", "unknown")
    return report.healthy and speaks and report.ref_audio != FAILED and not missing


def _compare_voices(report: ServerReport, folder: Path) -> tuple[list[str], list[str]]:
    """Voices of the folder that the server lacks, and its additional ones (uploads, for example)."""
    from revox.checkpoint.inspect import inspect

    if report.voices is None:
        return [], []
    served = set(report.voices)
    in_folder = {voice.name for voice in inspect(folder).voices if voice.in_params}
    missing = [f"the server lacks the folder's voice {name}" for name in sorted(in_folder - served)]
    if missing:
        missing[-1] += "; it reads the voices at start, so restart it"
    return missing, [f"the folder does not list the server's voice {n}" for n in sorted(served - in_folder)]


def _print_server(report: ServerReport, differences: list[str], console: Console) -> None:
    version = f" (version {report.version})" if report.version else ""
    message = f": {report.ref_audio_message}" if report.ref_audio_message else ""
    voices = "none listed"
    if report.voices is not None:
        voices = f"{len(report.voices)}: {', '.join(report.voices) or 'none'}"
    lines = {
        "server": f"{report.kind}{version} at {report.url}",
        "health": "healthy" if report.healthy else "not healthy",
        "models": ", ".join(report.models) or "none listed",
        "voices": voices,
        "ref_audio": report.ref_audio + message,
    }
    for what, text in lines.items():
        _print(console, f"{what}: {text}")
    for note in (*report.notes, *differences):
        _print(console, f"note: {note}", "yellow")


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(_printable(text), style=style, markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
