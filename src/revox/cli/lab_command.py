"""`revox lab`: the small checkpoint that ships with the project, and a full-size folder of random weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from revox.cli.duration import duration

if TYPE_CHECKING:
    from revox.cloning.invert import InversionProgress
    from revox.lab.recover_rows import Row

app = typer.Typer(
    help="The lab: a small complete Voxtral to test on, and a full-size one of random weights.",
    no_args_is_help=True,
)
console = Console(stderr=True)


@app.command("path")
def path_command() -> None:
    """Print the folder of the lab checkpoint that ships with revox."""
    from revox.lab import checkpoint_folder

    print(checkpoint_folder())


@app.command("fullsize")
def fullsize_command(
    folder: Annotated[Path, typer.Argument(help="Where to write it; 8.0 GB.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 0,
) -> None:
    """Write a folder of random weights with the release's exact inventory, to check memory and speed."""
    from revox.lab.fullsize import write_fullsize

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("writing", total=None)
        write_fullsize(
            folder, seed=seed, progress=lambda done, of: progress.update(task, completed=done, total=of)
        )
    console.print(
        f"{folder}: random weights at the release's sizes (they babble; nothing else is wrong with them)"
    )


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where the sounds, the picture and the figures go.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(help="Steps of the search for codes.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
) -> None:
    """Clone the voice of a bundled human clip with the lab checkpoint, and speak two sentences with it."""
    from revox.lab.demo import Stages, run_demo

    columns = (
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("distance {task.fields[best]:.3f}, {task.fields[left]:.0f} s left"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def cloning(at: InversionProgress) -> None:
            if at.phase not in tasks:
                tasks[at.phase] = progress.add_task(at.phase, best=at.best, left=at.seconds_left)
            progress.update(
                tasks[at.phase], completed=at.step, total=at.steps, best=at.best, left=at.seconds_left
            )
            # A log gets a line at each quarter, where a terminal has a bar.
            if not console.is_terminal and at.step * 4 // at.steps > (at.step - 1) * 4 // at.steps:
                line = f"  {at.phase} {at.step} of {at.steps}: distance {at.best:.3f}"
                console.print(f"{line}, {at.seconds_left:.0f} s left", highlight=False)

        def say(line: str) -> None:
            for task in tasks.values():
                progress.update(task, visible=False)
            console.print(line, highlight=False, soft_wrap=True)

        summary = run_demo(out, steps=steps, seed=seed, stages=Stages(say, cloning))
    _print_demo(out, summary)


def _print_demo(out: Path, summary: dict[str, Any]) -> None:
    result = Console(highlight=False)
    if summary["similarity"]:
        decoded, speech = summary["similarity"]["decoded"], summary["similarity"]["speech"]
        table = Table(title="How alike the voices are (Resemblyzer; 1 is the same)", title_justify="left")
        table.add_column("compared with")
        table.add_column("decoded.wav", justify="right")
        table.add_column("speech.wav", justify="right")
        table.add_row(
            f"the reference, speaker {summary['reference']['speaker']}",
            f"{decoded['to_reference']:.2f}",
            f"{speech['to_reference']:.2f}",
            style="bold",
        )
        for name, score in decoded["to_others"].items():
            table.add_row(f"another, speaker {name}", f"{score:.2f}", f"{speech['to_others'][name]:.2f}")
        result.print(table)
    took = summary["seconds"]
    result.print(
        f"cloned from {summary['reference']['seconds']:.1f} s in {took['clone']:.0f} s; spoke "
        f"{summary['speech_seconds']:.1f} s in {took['speak']:.1f} s, real-time factor "
        f"{summary['real_time_factor']:.2f}; {summary['cpu_seconds']:.0f} s of CPU time in all",
        soft_wrap=True,
    )
    for note in summary["notes"]:
        result.print(f"note: {note}", markup=False, soft_wrap=True)
    result.print(f"in {out}/: reference.wav, decoded.wav, speech.wav, mel.png, summary.json", soft_wrap=True)


@app.command("pack")
def pack_command(
    run: Annotated[Path, typer.Argument(help="The folder of a build whose stage `speech` is done.")],
    most: Annotated[
        int | None, typer.Option(help="At most so many sentences of a speaker without a preset.")
    ] = None,
    bit_rate: Annotated[int, typer.Option(help="Of the Opus in the shards, bits a second.")] = 20_000,
    flite: Annotated[
        bool,
        typer.Option(
            "--flite",
            help="Pack the synthesiser in place of what it said: smaller, and nothing is lost to Opus.",
        ),
    ] = False,
) -> None:
    """Pack a build's speech into RUN/shards, small enough to carry; a build with shards unpacks them."""
    from revox.lab.data import KINDS
    from revox.lab.errors import LabError
    from revox.lab.flite import carry_flite
    from revox.lab.shards import pack, require_speech

    shards = run / "shards"
    require_speech(run / "data")
    if flite and any(shards.glob("synthetic-*.shard")):
        raise LabError(f"{shards} holds synthetic speech already: remove it, or leave --flite out")
    carried = carry_flite(shards / "flite") if flite else 0  # first: what is missing is said before the work
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("packing", total=None)
        size = pack(
            run / "data",
            shards,
            bit_rate=bit_rate,
            most=most,
            kinds=("human",) if flite else KINDS,
            progress=lambda what, done, of: progress.update(task, description=what, completed=done, total=of),
        )
    console.print(f"{shards}: {(size + carried) / 1e6:.1f} MB")
    if flite:
        console.print(
            f"the synthesiser is {carried / 1e6:.1f} MB of it; over there: revox lab build ... --flite "
            f"{shards / 'flite'}",
            soft_wrap=True,
        )


@app.command("state")
def state_command(
    run: Annotated[Path, typer.Argument(help="The folder of a build, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Where to put it; RUN/state by default.")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="guide, encoder, decoder, language; all by default.")
    ] = None,
) -> None:
    """Put what a build has learnt so far into files under 16 MB, to carry; a build goes on from RUN/state."""
    from revox.lab.carried import STAGES_WITH_STATE, carry_state
    from revox.lab.errors import LabError

    unknown = set(stage or ()) - set(STAGES_WITH_STATE)
    if unknown:
        raise LabError(f"{sorted(unknown)[0]!r} has no state: the stages are {', '.join(STAGES_WITH_STATE)}")
    folder = out or run / "state"
    made = carry_state(run, folder, stage or STAGES_WITH_STATE)
    sizes = [path.stat().st_size for path in made]
    console.print(
        f"{folder}: {len(made)} files, {sum(sizes) / 1e6:.1f} MB, the largest {max(sizes) / 1e6:.1f} MB",
        soft_wrap=True,
    )


@app.command("build")
def build_command(
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    run: Annotated[
        Path, typer.Option(help="Where work in progress is kept; an interrupted build goes on from it.")
    ],
    encoder: Annotated[Path, typer.Option(help="The file for the encoder, which the folder leaves out.")],
    librispeech: Annotated[
        Path | None,
        typer.Option(
            help="Folder of human clips (LibriSpeech FLAC); without it the codec hears synthetic speech only."
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="speech, guide, encoder, decoder, language, folder; all by default."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON with settings to change, as in RUN/settings.json.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    autocast: Annotated[
        bool, typer.Option(help="Compute in bf16 (for a GPU; most CPUs are slower with it).")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all.")] = 0,
    flite: Annotated[
        Path | None,
        typer.Option(help="Folder of a synthesiser from `revox lab pack --flite`; else the installed one."),
    ] = None,
) -> None:
    """Build the lab checkpoint, encoder put aside: speech, guide, encoder, decoder, language model, folder.
    Ctrl-C loses nothing."""
    import torch

    from revox.api import find_device
    from revox.lab.build import STAGES, BuildSettings, build
    from revox.lab.errors import LabError
    from revox.lab.settings import read_settings

    unknown = set(stage or ()) - set(STAGES)
    if unknown:
        raise LabError(f"there is no stage {sorted(unknown)[0]!r}: the stages are {', '.join(STAGES)}")
    find_device(device)
    if threads:
        torch.set_num_threads(threads)
    settings = read_settings(config) if config else BuildSettings()
    began = time.monotonic()

    def report(name: str, row: dict[str, float]) -> None:
        row = dict(row)
        if "seconds_left" in row:
            of, left = row.pop("of"), duration(row.pop("seconds_left"))
            name = f"{name}  step {row.pop('step')} of {of}, {left} left"
        values = "  ".join(
            f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in row.items()
        )
        console.print(f"[dim]{time.monotonic() - began:7.0f} s[/dim]  {name}  {values}", highlight=False)

    stages = tuple(stage) if stage else STAGES
    build(
        run, out, librispeech, settings, encoder_out=encoder, stages=stages, device=device,
        autocast=autocast, flite=flite, report=report,
    )  # fmt: skip
    if "folder" in stages:
        console.print(f"{out} is complete; its encoder is in {encoder}", soft_wrap=True)
    else:
        console.print(f"done: {', '.join(stages)}; the stage `folder` makes {out}", soft_wrap=True)


@app.command("recover")
def recover_command(
    out: Annotated[Path, typer.Argument(help="The experiment's folder; what is there is gone on with.")],
    data: Annotated[Path, typer.Option(help="The speech of a build: RUN/data.")],
    encoder: Annotated[Path, typer.Option(help="The encoder put aside; only scoring opens it.")] = Path(
        "lab-encoder/encoder.safetensors"
    ),
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", "-c", help="Its checkpoint; the lab's by default.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Names of rows, with commas between them; all by default.")
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Pairs and human speech, with one loss less or more each.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Each row is run with so many.")] = 3,
    minutes: Annotated[float, typer.Option(help="Of training, for each row and seed.")] = 30.0,
    clips: Annotated[int, typer.Option(help="Held-out speakers of each kind that are scored.")] = 20,
    looks: Annotated[int, typer.Option(help="At what a run has learnt so far, for the curves.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda, for training.")] = "cpu",
) -> None:
    """Restore the lab's encoder by each method and score it against the one put aside: docs/recovery.md.
    Ctrl-C loses nothing; the same command goes on."""
    from revox.api import find_device
    from revox.lab import checkpoint_folder
    from revox.lab.recover import Experiment, recover
    from revox.lab.recover_rows import GOALS_FOR, ablations, chosen_rows, row_named

    find_device(device)
    if ablate:
        base = row_named(GOALS_FOR)
        chosen = [row_named("original"), base, *ablations(base)]
        if rows is not None:
            chosen = _only(chosen, rows)
    else:
        chosen = chosen_rows(_names(rows) if rows is not None else None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = {"what": "", "quarter": -1}
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: float, of: float) -> None:
            if what != last["what"]:
                bar.reset(task, description=what, total=of)
            bar.update(task, completed=done)
            # A log gets a line at each quarter, where a terminal has a bar.
            quarter = int(4 * done // max(of, 1))
            if not console.is_terminal and (what, quarter) != (last["what"], last["quarter"]):
                console.print(f"{what}: {done:g} of {of:g}", highlight=False, soft_wrap=True)
            last.update(what=what, quarter=quarter)

        made = recover(
            Experiment(
                out, data, checkpoint or checkpoint_folder(), encoder, minutes, seeds, clips, looks=looks,
                threads=threads, device=device, progress=progress,
            ),
            chosen,
        )  # fmt: skip
    text = made.read_text(encoding="utf-8")
    begin = text.index("## Goals")
    print(text[begin : text.index("\n## ", begin + 1)])
    console.print(f"all tables: {made}", soft_wrap=True)


def _names(rows: str) -> list[str]:
    return [name.strip() for name in rows.split(",") if name.strip()]


def _only(rows: list[Row], names: str) -> list[Row]:
    """Those of `rows` that are named. Raises LabError for a name that is not there."""
    from revox.lab.errors import LabError

    wanted, known = _names(names), [row.name for row in rows]
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        wrong = f"there is no row {unknown[0]!r} to ablate" if unknown else "no row is named"
        raise LabError(f"{wrong}: the rows are {', '.join(known)}")
    return [row for row in rows if row.name in wanted]
