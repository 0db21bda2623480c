"""`python -m lab`: build the small checkpoint, write a full-size one, run the recovery experiment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from revox.cli.options import ENVIRONMENT, with_old_names
from revox.cli.progress import duration, show_progress

if TYPE_CHECKING:
    from lab.build import Report
    from lab.recover_arms import Arm

app = typer.Typer(
    help="The lab: a small complete Voxtral to test on, and a full-size one of random weights.",
    no_args_is_help=True,
)
console = Console(stderr=True)

Run = Annotated[Path, typer.Argument(help="The build's folder.")]


@app.command("fullsize")
def fullsize_command(
    folder: Annotated[Path, typer.Argument(help="The folder to write, 8.0 GB.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
) -> None:
    """Write a folder of random weights with the release's exact inventory, to check memory and speed."""
    from lab.fullsize import write_fullsize

    with show_progress(console, unit="bytes") as progress:
        write_fullsize(folder, seed=seed, progress=progress)
    console.print(f"{folder}: random weights at the release's sizes; what they speak is noise")


@app.command("pack")
def pack_command(
    run: Run,
    most: Annotated[
        int | None, typer.Option(help="At most so many sentences of a speaker that is not a preset.")
    ] = None,
    bit_rate: Annotated[int, typer.Option(help="Of the Opus in the shards, in bits per second.")] = 20_000,
) -> None:
    """Pack a build's speech into RUN/shards, to copy it; a build that finds shards there unpacks them."""
    from lab.shards import SHARDS, pack

    shards = run / SHARDS
    with show_progress(console) as progress:
        size = pack(run / "data", shards, bit_rate=bit_rate, most=most, progress=progress)
    console.print(f"{shards}: {size / 1e6:.1f} MB")


@app.command("state")
def state_command(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder; by default RUN/state.")] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="teacher, encoder, decoder, finish, language or tune; by default all."),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Weights alone, in bf16: a sixth of the size, optimizers begin anew."),
    ] = False,
) -> None:
    """Bundle a build's training state into files under 16 MB, to copy it; a build resumes from RUN/state."""
    from lab.state_bundle import STAGES_WITH_STATE, write_bundles

    folder = out or run / "state"
    made = write_bundles(run, folder, _stages(stage, STAGES_WITH_STATE), weights=weights)
    sizes = [path.stat().st_size for path in made]
    console.print(
        f"{folder}: {len(made)} files, {sum(sizes) / 1e6:.1f} MB, the largest {max(sizes) / 1e6:.1f} MB",
        soft_wrap=True,
    )


@app.command("spoken")
def spoken_command(
    run: Run,
    speech: Annotated[list[Path], typer.Option(help="A folder of synthetic speech; may be repeated.")],
    config: Annotated[Path | None, typer.Option(help="The settings of the build.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to add to; by default lab/spoken, where builds look.")
    ] = None,
) -> None:
    """Keep the codes of training speech by a build's encoder: the language model learns from them without
    the sound."""
    from lab.build import BuildRun, BuildSettings, pack_spoken
    from lab.settings import read_settings
    from lab.spoken import FOLDER

    settings = read_settings(config) if config else BuildSettings()
    folder = out or FOLDER
    added, there = pack_spoken(BuildRun(run, settings, report=_printed()), folder, speech)
    size = sum(path.stat().st_size for path in folder.iterdir())
    console.print(f"{folder}: {added} utterances added, {there} in all, {size / 1e6:.1f} MB", soft_wrap=True)


@app.command("build")
def build_command(
    run: Run,
    out: Annotated[Path, typer.Option(help="The checkpoint's folder.")],
    encoder: Annotated[Path, typer.Option(help="The reference encoder's file; the checkpoint has none.")],
    speech: Annotated[
        list[Path] | None, typer.Option(help="A folder of synthetic speech; may be given several times.")
    ] = None,
    librispeech: Annotated[
        Path | None,
        typer.Option(help="Folder of human clips and their transcripts; without it, synthetic speech only."),
    ] = None,
    whisper: Annotated[
        Path | None,
        typer.Option(help="Folder of a Whisper for transformers, the teacher of codec and decoder."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="speech, teacher, encoder, decoder, finish, language, tune or folder; by default all."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON with settings to change, as in RUN/settings.json.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    autocast: Annotated[
        bool, typer.Option(help="Compute in bf16: faster on GPUs, slower on most CPUs.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for all.")] = 0,
) -> None:
    """Build the lab checkpoint in stages: speech, teacher codec, encoder, decoder, the decoder again on the
    encoder's codes (finish), language model, the decoder on what that predicts (tune), folder. It can be
    interrupted with Ctrl-C; the same command resumes it."""
    import torch

    from lab.build import STAGES, BuildRun, BuildSettings, Materials, build
    from lab.settings import read_settings
    from revox.api import find_device

    stages = _stages(stage, STAGES)
    find_device(device)
    if threads:
        torch.set_num_threads(threads)
    settings = read_settings(config) if config else BuildSettings()
    materials = Materials(tuple(speech or ()), librispeech, whisper)
    build(BuildRun(run, settings, device, autocast, _printed()), out, encoder, materials, stages=stages)
    if "folder" in stages:
        console.print(f"{out} is complete; its encoder is in {encoder}", soft_wrap=True)
    else:
        console.print(f"done: {', '.join(stages)}; the stage `folder` writes {out}", soft_wrap=True)


def _printed() -> Report:
    """Prints what a build reports, with the seconds since now."""
    began = time.monotonic()

    def report(name: str, figures: dict[str, float]) -> None:
        figures = dict(figures)
        if "seconds_left" in figures:
            of, left = figures.pop("of"), duration(figures.pop("seconds_left"))
            name = f"{name}  step {figures.pop('step')} of {of}, {left} left"
        values = "  ".join(
            f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in figures.items()
        )
        console.print(f"[dim]{time.monotonic() - began:7.0f} s[/dim]  {name}  {values}", highlight=False)

    return report


def _stages(asked: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The stages that are asked for, by default all. Raises LabError for an unknown one."""
    from lab.errors import LabError
    from lab.settings import OLD_NAMES

    for stage in asked or ():
        if stage not in known:
            wrong = f"is now {OLD_NAMES[stage]!r}" if stage in OLD_NAMES else "is not one of them"
            raise LabError(f"the stages are {', '.join(known)}: {stage!r} {wrong}")
    return tuple(asked) if asked else known


@app.command("recover", cls=with_old_names({"--rows": "--arms", "--looks": "--evaluations"}))
def recover_command(
    data: Annotated[Path, typer.Option(help="The speech of a build: RUN/data.")],
    out: Annotated[Path, typer.Option(help="The experiment's folder; an experiment there is continued.")],
    encoder: Annotated[Path, typer.Option(help="The reference encoder; only scoring opens it.")] = Path(
        "lab/reference-encoder/encoder.safetensors"
    ),
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", "-c", envvar=ENVIRONMENT, help="The checkpoint's folder; by default the lab's."
        ),
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Names of arms, separated by commas; by default all.")
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="One loss or option less or more in each arm; other students.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Runs of each arm.")] = 3,
    minutes: Annotated[float, typer.Option(help="Training time of each arm and seed.")] = 30.0,
    clips: Annotated[int, typer.Option(help="Held-out speakers of each kind to score.")] = 20,
    evaluations: Annotated[int, typer.Option(help="Intermediate evaluations of a run, for the curves.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda, for training.")] = "cpu",
    whisper: Annotated[
        Path | None,
        typer.Option(help="Folder of a Whisper (transformers or CTranslate2), for the arms that distill it."),
    ] = None,
    recognizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Whisper (CTranslate2) that counts wrong words, those of humans too; by default "
            "pocketsphinx with the lab's grammar."
        ),
    ] = None,
) -> None:
    """Restore the lab's encoder by each method and score it against the reference: docs/recovery.md.
    It can be interrupted with Ctrl-C; the same command resumes it."""
    from lab.recover import recover
    from lab.recover_arms import GOALS_FOR, ablated_arms, arm_named, chosen_arms
    from lab.recover_experiment import Experiment
    from revox.api import find_device
    from revox.demo import checkpoint_folder

    find_device(device)
    if ablate:
        base = [arm_named(name) for name in ("original", GOALS_FOR, "student")]
        chosen = [*base, *ablated_arms()]
        if arms is not None:
            chosen = _only(chosen, arms)
    else:
        chosen = chosen_arms(_names(arms) if arms is not None else None)
    if arms is None and whisper is None and (left := [one.name for one in chosen if one.needs_whisper]):
        console.print(f"without --whisper, {' and '.join(left)} is left out", soft_wrap=True)
        chosen = [one for one in chosen if not one.needs_whisper]
    with show_progress(console) as progress:
        experiment = Experiment(
            out, data, checkpoint or checkpoint_folder(), encoder, minutes, seeds, clips,
            evaluations=evaluations, threads=threads, device=device, whisper=whisper, recognizer=recognizer,
            progress=progress,
        )  # fmt: skip
        made = recover(experiment, chosen)
    text = made.read_text(encoding="utf-8")
    begin = text.index("## Goals")
    print(text[begin : text.index("\n## ", begin + 1)])
    console.print(f"all tables: {made}", soft_wrap=True)


def _names(arms: str) -> list[str]:
    return [name.strip() for name in arms.split(",") if name.strip()]


def _only(arms: list[Arm], names: str) -> list[Arm]:
    """The named ones of `arms`. Raises LabError for an unknown name."""
    from lab.errors import LabError

    wanted, known = _names(names), [arm.name for arm in arms]
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        wrong = f"there is no arm {unknown[0]!r} to ablate" if unknown else "no arm is named"
        raise LabError(f"{wrong}: the arms are {', '.join(known)}")
    return [arm for arm in arms if arm.name in wanted]


def main() -> None:
    """Run the command line as `revox` does: a user's mistake is one sentence and exit code 2."""
    from lab.errors import LabError
    from revox.cli.main import run_app

    run_app(app, "lab", (LabError,))


if __name__ == "__main__":
    main()
