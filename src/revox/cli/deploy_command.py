"""`revox deploy`: the same folder under vllm-omni, and the traps on the way there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from revox.deploy.facts import Scene
    from revox.deploy.rules import Finding
    from revox.deploy.server import ServerReport

app = typer.Typer(
    help="Serve a folder with vllm-omni, and find what stands in the way.", no_args_is_help=True
)


@app.command("vllm-omni")
def vllm_omni_command(
    folder: Annotated[Path, typer.Argument(help="The checkpoint's folder (no hub id).")],
    gpu_memory: Annotated[
        float, typer.Option(help="The share of the GPU's memory for both stages together, 0 to 1.")
    ] = 0.9,
    port: Annotated[int, typer.Option(help="Where it listens.")] = 8000,
    host: Annotated[
        str, typer.Option(help="The address it listens at; 0.0.0.0 is all of them.")
    ] = "127.0.0.1",
    gpu: Annotated[int | None, typer.Option(help="The GPU's number; else the first that is visible.")] = None,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("vllm-omni-deploy"),
    run: Annotated[bool, typer.Option("--run", help="Start it here, after looking for traps.")] = False,
) -> None:
    """Write what vllm-omni needs to serve FOLDER, and print the command.

    A deploy file with the shares of memory, a compose file, the command as a script, and the versions that
    belong together.
    """
    from rich.console import Console

    from revox.deploy.vllm_omni import VERSION, Deployment, servable

    folder, out = folder.expanduser(), out.expanduser()
    report = servable(folder)
    plan = Deployment(folder, out, gpu_memory, host, port, gpu)
    written = plan.write()
    console = Console(stderr=True, highlight=False)
    for path in written:
        _say(console, f"written: {path}")
    first, second = plan.fractions
    _say(console, f"for vllm-omni {VERSION}: {first:g} of the GPU for speech, {second:g} for the codec")
    if report.encoder == "absent":
        _say(console, "ref_audio will be refused: the folder has no encoder (cloned voices serve as presets)")
    for note in report.notes:
        _say(console, f"note: {note}", "yellow")
    if host not in ("127.0.0.1", "::1", "localhost"):
        open_to = "note: whoever reaches this address may use it, unless VLLM_API_KEY holds a key to ask for"
        _say(console, open_to, "yellow")
    print(_plain(plan.shell_command()))
    if run:
        _run(plan.command(), plan.environment(), folder, console)


def _run(words: list[str], environment: dict[str, str], folder: Path, console: Console) -> None:
    from revox.deploy.check import gather, start
    from revox.deploy.errors import DeployError
    from revox.deploy.rules import check
    from revox.deploy.vllm_omni import VERSION

    scene = gather(words, folder, environment={**os.environ, **environment})
    findings = check(scene)
    _print_findings(findings, console)
    stops = [finding for finding in findings if finding.stops]
    if stops:
        raise DeployError(f"it is not started: {stops[0].seen}; {stops[0].mend}.")
    from revox.deploy.facts import minor

    if scene.packages is not None and scene.omni != minor(VERSION):
        found = scene.package("vllm-omni")
        raise DeployError(
            f"it is not started: the files are for vllm-omni {VERSION} and "
            f"{found.version if found else 'none'} is installed; make an environment from requirements.txt."
        )
    start(words, environment)


@app.command("check")
def check_command(
    target: Annotated[
        list[str] | None,
        typer.Argument(help="A server's address, or the command that would start one (quoted, or after --)."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="The checkpoint, where the command does not say.")
    ] = None,
    python: Annotated[str | None, typer.Option(help="The Python of vllm-omni's environment.")] = None,
    key_from: Annotated[str | None, typer.Option(help="The variable that holds the server's key.")] = None,
    no_ref_audio: Annotated[
        bool, typer.Option("--no-ref-audio", help="Do not try ref_audio on the server.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for the known traps in a command, an environment and a folder, or ask a running server.

    Exit code 1 if something was found that keeps the server from working. A server is never sent ref_audio
    when its version could crash on it.
    """
    from rich.console import Console

    console = Console(highlight=False)
    words = target or []
    if len(words) == 1 and re.fullmatch(r"[\w.-]+:\d+(/\S*)?", words[0]):
        from revox.deploy.errors import DeployError

        raise DeployError(f"{words[0]} lacks its beginning; a server is named as http://{words[0]}.")
    if len(words) == 1 and words[0].lower().startswith(("http://", "https://")):
        healthy = _check_server(words[0], folder, key_from, not no_ref_audio, as_json, console)
    else:
        healthy = _check_command(words, folder, python, as_json, console)
    if not healthy:
        raise typer.Exit(1)


def _check_command(
    words: list[str], folder: Path | None, python: str | None, as_json: bool, console: Console
) -> bool:
    from revox.deploy.check import gather
    from revox.deploy.rules import check, trap_named

    command: str | list[str] | None = words[0] if len(words) == 1 else words or None
    scene = gather(command, folder.expanduser() if folder else None, python)
    findings = check(scene)
    if as_json:
        listed = [
            vars(finding) | {"why": trap_named(finding.trap).why, "sources": trap_named(finding.trap).sources}
            for finding in findings
        ]
        print(json.dumps({"looked_at": _looked_at(scene), "findings": listed}, indent=2))
    else:
        for what, said in _looked_at(scene).items():
            _say(console, f"{what}: {said}")
        _print_findings(findings, console)
        if not findings:
            _say(console, "none of the known traps was found in what was looked at", "green")
    return not any(finding.stops for finding in findings)


def _looked_at(scene: Scene) -> dict[str, str]:
    """What the traps had to go by, so that silence about the rest is not taken for a pass."""
    omni, vllm = scene.package("vllm-omni"), scene.package("vllm")
    if scene.packages is None:
        environment = "not seen (no vllm-omni or vllm on PATH, or in a container); --python names one"
    else:
        versions = (
            f"vllm-omni {omni.version if omni else 'none'}",
            f"vllm {vllm.version if vllm else 'none'}",
        )
        environment = f"Python {scene.python}, {', '.join(versions)}, {len(scene.packages)} packages"
    if not scene.words:
        command = "none given"
    elif scene.serve is None:
        command = "not one that starts vllm or vllm-omni"
    else:
        command = "starts a server" + (f" from the image {scene.serve.image}" if scene.serve.image else "")
    gpus = ", ".join(f"{g.name} ({g.total / 1e9:.0f} GB, {g.free / 1e9:.0f} free)" for g in scene.gpus)
    return {
        "command": command,
        "environment": environment,
        "folder": str(scene.folder) if scene.folder else "none seen",
        "machine": f"{scene.machine}, {gpus or 'no GPU seen'}",
    }


def _print_findings(findings: list[Finding], console: Console) -> None:
    from revox.deploy.rules import trap_named

    for finding in findings:
        trap = trap_named(finding.trap)
        word, style = ("stops it", "bold red") if finding.stops else ("beware", "bold yellow")
        _say(console, f"{word}: {finding.seen} [{finding.trap}]", style)
        _say(console, f"  why: {trap.why}")
        _say(console, f"  mend: {finding.mend}")
        _say(console, f"  known from: {'; '.join(trap.sources)}", "dim")


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
    lacking, more = _voices_apart(report, folder.expanduser()) if folder is not None else ([], [])
    if as_json:
        print(json.dumps(report.to_json() | {"voices_apart": lacking + more}, indent=2))
    else:
        _print_server(report, lacking + more, console)
    speaks = report.kind in ("vllm-omni", "revox", "unknown")
    return report.healthy and speaks and report.ref_audio != FAILED and not lacking


def _voices_apart(report: ServerReport, folder: Path) -> tuple[list[str], list[str]]:
    """What the server lacks of a folder's voices, and what it has more (uploads, say)."""
    from revox.checkpoint.inspect import inspect

    if report.voices is None:
        return [], []
    served = set(report.voices)
    held = {voice.name for voice in inspect(folder).voices if voice.in_params}
    apart = [f"the server does not have {name} of the folder" for name in sorted(held - served)]
    if apart:
        apart[-1] += "; it reads the voices when it starts, so restart it"
    return apart, [f"the folder does not list {name} of the server" for name in sorted(served - held)]


def _print_server(report: ServerReport, differences: list[str], console: Console) -> None:
    said: dict[str, Any] = {
        "server": f"{report.kind}{f' (version {report.version})' if report.version else ''} at {report.url}",
        "health": "well" if report.healthy else "not well",
        "models": ", ".join(report.models) or "none listed",
    }
    if report.voices is None:
        said["voices"] = "none listed"
    else:
        said["voices"] = f"{len(report.voices)}: {', '.join(report.voices) or 'none'}"
    said["ref_audio"] = report.ref_audio + (f": {report.ref_audio_said}" if report.ref_audio_said else "")
    for what, text in said.items():
        _say(console, f"{what}: {text}")
    for note in (*report.notes, *differences):
        _say(console, f"note: {note}", "yellow")


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(_plain(text), style=style, markup=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Names and answers from anywhere, without what a terminal would obey."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
