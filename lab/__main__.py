"""`python -m lab`: build the small checkpoint, write a full-size one, run the recovery experiment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from revox.cli.progress import duration, show_progress

if TYPE_CHECKING:
    from lab.recover_arms import Arm

app = typer.Typer(
    help="The lab: a small complete Voxtral to test on, and a full-size one of random weights.",
    no_args_is_help=True,
)
console = Console(stderr=True)


@app.command("fullsize")
def fullsize_command(
    folder: Annotated[Path, typer.Argument(help="Where to write it; 8.0 GB.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 0,
) -> None:
    """Write a folder of random weights with the release's exact inventory, to check memory and speed."""
    from lab.fullsize import write_fullsize

    with show_progress(console, unit="bytes") as progress:
        write_fullsize(folder, seed=seed, progress=progress)
    console.print(
        f"{folder}: random weights at the release's sizes (they babble; nothing else is wrong with them)"
    )


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
    from lab.data import KINDS
    from lab.errors import LabError
    from lab.flite import carry_flite
    from lab.shards import pack, require_speech

    shards = run / "shards"
    require_speech(run / "data")
    if flite and any(shards.glob("synthetic-*.shard")):
        raise LabError(f"{shards} holds synthetic speech already: remove it, or leave --flite out")
    carried = carry_flite(shards / "flite") if flite else 0  # first: what is missing is said before the work
    with show_progress(console) as progress:
        size = pack(
            run / "data",
            shards,
            bit_rate=bit_rate,
            most=most,
            kinds=("human",) if flite else KINDS,
            progress=progress,
        )
    console.print(f"{shards}: {(size + carried) / 1e6:.1f} MB")
    if flite:
        console.print(
            f"the synthesiser is {carried / 1e6:.1f} MB of it; over there: python -m lab build ... --flite "
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
    from lab.carried import STAGES_WITH_STATE, carry_state
    from lab.errors import LabError

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
        typer.Option(help="Folder of a synthesizer from `python -m lab pack --flite`; else the installed."),
    ] = None,
) -> None:
    """Build the lab checkpoint, encoder put aside: speech, guide, encoder, decoder, language model, folder.
    Ctrl-C loses nothing."""
    import torch

    from lab.build import STAGES, BuildSettings, build
    from lab.errors import LabError
    from lab.settings import read_settings
    from revox.api import find_device

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
        "lab/reference-encoder/encoder.safetensors"
    ),
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", "-c", help="Its checkpoint; the lab's by default.")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Names of arms, with commas between them; all by default.")
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Pairs and human speech, with one loss less or more each.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Each arm is run with so many.")] = 3,
    minutes: Annotated[float, typer.Option(help="Of training, for each arm and seed.")] = 30.0,
    clips: Annotated[int, typer.Option(help="Held-out speakers of each kind that are scored.")] = 20,
    evaluations: Annotated[int, typer.Option(help="Intermediate evaluations of a run, for the curves.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda, for training.")] = "cpu",
) -> None:
    """Restore the lab's encoder by each method and score it against the one put aside: docs/recovery.md.
    Ctrl-C loses nothing; the same command goes on."""
    from lab.recover import recover
    from lab.recover_arms import GOALS_FOR, ablations, arm_named, chosen_arms
    from lab.recover_experiment import Experiment
    from revox.api import find_device
    from revox.demo import checkpoint_folder

    find_device(device)
    if ablate:
        base = arm_named(GOALS_FOR)
        chosen = [arm_named("original"), base, *ablations(base)]
        if arms is not None:
            chosen = _only(chosen, arms)
    else:
        chosen = chosen_arms(_names(arms) if arms is not None else None)
    with show_progress(console) as progress:
        experiment = Experiment(
            out, data, checkpoint or checkpoint_folder(), encoder, minutes, seeds, clips,
            evaluations=evaluations, threads=threads, device=device, progress=progress,
        )  # fmt: skip
        made = recover(experiment, chosen)
    text = made.read_text(encoding="utf-8")
    begin = text.index("## Goals")
    print(text[begin : text.index("\n## ", begin + 1)])
    console.print(f"all tables: {made}", soft_wrap=True)


def _names(arms: str) -> list[str]:
    return [name.strip() for name in arms.split(",") if name.strip()]


def _only(arms: list[Arm], names: str) -> list[Arm]:
    """Those of `arms` that are named. Raises LabError for a name that is not there."""
    from lab.errors import LabError

    wanted, known = _names(names), [arm.name for arm in arms]
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        wrong = f"there is no arm {unknown[0]!r} to ablate" if unknown else "no arm is named"
        raise LabError(f"{wrong}: the arms are {', '.join(known)}")
    return [arm for arm in arms if arm.name in wanted]


def main() -> None:
    """Run the command line as `revox` does: sentences for a user's mistakes, exit code 2."""
    from lab.errors import LabError
    from revox.cli.main import run_app

    run_app(app, "lab", (LabError,))


if __name__ == "__main__":
    main()
