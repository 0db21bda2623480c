"""`revox train`: restore the missing encoder from the released checkpoint and speech."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from revox.cli.options import (
    Checkpoint,
    CheckpointArgument,
    CheckpointOption,
    Device,
    Dtype,
    Seed,
    chosen_checkpoint,
    with_old_names,
)
from revox.cli.progress import duration, show_progress
from revox.progress import Progress

if TYPE_CHECKING:
    from revox.training.adapt import Objective
    from revox.training.deltas import Part

app = typer.Typer(help="Train what the release leaves out.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("student")
def student_command(
    checkpoint: CheckpointArgument = None,
    checkpoint_option: CheckpointOption = None,
    sentences: Annotated[int, typer.Option(min=1, help="How many the model says.")] = 10_000,
    texts: Annotated[
        Path | None, typer.Option(help="Sentences to say, one a line; else English ones of our own.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of learning.")] = 4000,
    minutes: Annotated[float | None, typer.Option(help="The most that learning may take.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it would cost here.")] = False,
) -> None:
    """Train a small encoder for cloning on the model's own speech; once, in minutes on a GPU.

    The model says some thousand sentences in its presets' voices and in voices between and around them, and
    the student learns the codes. `revox clone` then takes the codes of any clip from it at once. Everything
    is cached for this checkpoint: after Ctrl-C the same command goes on where it stopped.
    """
    from rich.console import Console

    from revox.api import find_device, find_dtype
    from revox.checkpoint.locate import locate
    from revox.coding.student import student_folder
    from revox.training.spoken import read_sentences
    from revox.training.student import StudentRequest, StudentTraining, make_student
    from revox.training.student_plan import plan_student

    console = Console(stderr=True, highlight=False)
    place, arithmetic = str(find_device(device)), find_dtype(dtype)
    folder = locate(chosen_checkpoint(checkpoint, checkpoint_option))
    training = StudentTraining(steps=steps, seconds=minutes and 60 * minutes, seed=seed)
    request = StudentRequest(sentences, read_sentences(texts) if texts else (), training, place, arithmetic)
    cost = plan_student(folder, sentences, training, place, arithmetic)
    console.print(
        f"The model says {sentences:,} sentences (about {duration(cost.speaking)}), then the student learns "
        f"for {steps:,} steps (about {duration(cost.learning)}), on {place} with {cost.memory / 1e9:.1f} GB "
        f"of memory and {cost.disk / 1e6:,.0f} MB in {student_folder(folder)}; counted operations at this "
        "device's speed.",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if plan:
        return
    try:
        with show_progress(console) as show:
            path, student, scores = make_student(folder, request, show)
    except KeyboardInterrupt:  # stopped as asked: nothing failed
        console.print("stopped and saved; the same command goes on from there")
        raise typer.Exit(0) from None
    console.print(
        f"On speech that it did not learn from it is right in {scores.agreement:.0%} of the semantic codes "
        f"(the most frequent code: {scores.usual_agreement:.0%}) and {scores.levels:.2f} levels of "
        f"{student.levels - 1} off (the median codes: {scores.usual_levels:.2f}).",
        soft_wrap=True,
    )  # fmt: skip
    console.print(f"The student is {path}; `revox clone` now uses it", markup=False, soft_wrap=True)


@app.command("encoder", cls=with_old_names({"-o": "--out"}))
def encoder_command(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="The run's folder: log, state, encoder.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "-d", help="Folders of speech, or hf:OWNER/NAME[:config][:split]; repeatable."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings (YAML or JSON); see docs/training.md.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Speech to validate on and not to train on (else some speakers).")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Sentences for the model to say, one a line; else the data's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all, in place of the config's.")] = None,
    seed: Annotated[int | None, typer.Option(help="In place of the config's.")] = None,
    refuse_below: Annotated[
        int | None, typer.Option(help="Leave out speech sampled below this many Hz.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode speech.")] = 2,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, or bfloat16 for matrix products alone; in place of the config's autocast."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in OUT where it stopped.")
    ] = False,
) -> None:
    """Train the codec's encoder; `accelerate launch -m revox.cli train encoder ...` does it on several GPUs.

    Ctrl-C or SIGTERM finishes the current step and saves; `--resume` continues exactly there. The encoder so
    far is always in OUT/encoder.safetensors, ready for `revox inject`.
    """
    import torch
    from rich.console import Console

    from revox.api import find_device, find_dtype
    from revox.checkpoint.locate import locate
    from revox.training.restore import ENCODER_FILE, SETTINGS_FILE, TRAINING, RunOptions, restore_encoder
    from revox.training.settings import read_settings
    from revox.training.spoken import read_sentences

    console = Console(stderr=True, highlight=False)
    if device is not None:
        find_device(device)
    autocast = None if dtype is None else find_dtype(dtype) == torch.bfloat16
    settings = read_settings(config, console.print, steps=steps, seed=seed, autocast=autocast)

    options = RunOptions(
        validation=validation or (), refuse_below=refuse_below, workers=workers, device=device, resume=resume,
        sentences=read_sentences(texts) if texts else (), message=console.print,
    )  # fmt: skip
    try:
        with show_progress(console) as show:
            options.progress = lambda at: (
                console.print(training_line(at), soft_wrap=True) if at.what == TRAINING else show(at)
            )
            encoder = restore_encoder(locate(checkpoint), data or (), out, settings, options)
    except KeyboardInterrupt:  # stopped as asked: nothing failed
        if (out / ENCODER_FILE).is_file():
            so_far = f"stopped and saved; go on with --resume. The encoder so far: {out / ENCODER_FILE}"
        elif (out / SETTINGS_FILE).is_file():
            so_far = "stopped before the first step; what was prepared is kept: go on with --resume"
        else:
            so_far = "stopped before anything was written; the same command begins anew"
        console.print(so_far, soft_wrap=True)
        raise typer.Exit(0) from None
    console.print(f"the encoder is {encoder}; try it: revox inject --checkpoint {checkpoint} --encoder {out}")


def training_line(at: Progress) -> str:
    """A report of the encoder's training as a line."""
    shown = ("mel", "semantic", "acoustic", "agreement", "perplexity", "valid_mel", "valid_agreement",
             "valid_levels", "valid_nll", "valid_saturated", "audio_seconds_per_second",
             "memory_gb")  # fmt: skip
    figures = "  ".join(f"{name} {at.facts[name]:.4g}" for name in shown if name in at.facts)
    left = duration(float(at.facts["seconds_left"]))
    return f"step {at.done} of {at.total}, {left} left  {figures}"


@app.command("adapt")
def adapt_command(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="The run's folder: log, state, adaptation.")],
    part: Annotated[
        str, typer.Option("--adapt", metavar="map|lora|attention|embeddings|layers", help="What is changed.")
    ] = "lora",
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="distill|speech",
            help="What it learns; speech needs --data. By default speech with --data, else distill.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "-d", help="Folders of speech with transcripts, or hf:OWNER/NAME; repeatable."
        ),
    ] = None,
    consent: Annotated[
        str | None, typer.Option(help="Whose speech --data is, and that they agreed. Required with --data.")
    ] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="The encoder's file or run, for a checkpoint without one.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Sentences for the presets to say, one a line; else our own.")
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="Has the guard compare voices: an ECAPA-TDNN, or one of your own; a file or hub id."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of map, lora and attention.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 300,
    sentences: Annotated[int, typer.Option(min=2, help="That each preset says.")] = 8,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of the adaptation, and of its control.")] = 2,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Adapt the language model to a restored encoder or to speakers, if that helps and no preset is harmed.

    Beside each run a control only replays the presets. The change is kept at the largest scale that leaves
    the presets as they were, and only if it gains more over the control than seeds differ; otherwise the
    command ends with the advice to leave the model alone. Ctrl-C saves; the same command goes on.
    """
    from rich.console import Console

    from revox.api import find_device, find_dtype
    from revox.checkpoint.locate import locate
    from revox.cloning.consent import record_consent
    from revox.training.adapt import MAP_LEARNING_RATE, SCALES, AdaptTraining
    from revox.training.adapt_model import ADAPTER_FOLDER, AdaptRequest, adapt_model
    from revox.training.deltas import PARTS
    from revox.training.errors import TrainingError
    from revox.training.spoken import read_sentences

    console = Console(stderr=True, highlight=False)
    objective = objective or ("speech" if part == "map" or data else "distill")
    known = {"--adapt": (part, PARTS), "--objective": (objective, ("distill", "speech"))}
    for option, (given, offered) in known.items():
        if given not in offered:
            raise TrainingError(f"{option} {given} is not offered; give one of {', '.join(offered)}")
    if part == "map" and objective != "speech":
        raise TrainingError("a map is learned from clips of many speakers: give it the objective speech")
    if objective == "speech" and not data:
        raise TrainingError("the objective speech learns from clips with transcripts: name them with --data")
    if objective == "distill" and data:
        raise TrainingError("distill learns from the presets' own speech: leave --data out, or say speech")
    if consent and not data:
        raise TrainingError("--consent says whose speech --data is, and there is none: leave it out")
    agreed = record_consent(consent).statement if data else None
    place = str(find_device(device))
    training = AdaptTraining(
        cast("Part", part), cast("Objective", objective), rank, steps, warmup=max(1, steps // 15),
        decay_steps=max(1, steps // 3), seed=seed,
        learning_rate=MAP_LEARNING_RATE if part == "map" else AdaptTraining.learning_rate,
    )  # fmt: skip

    def report(run: str, row: dict[str, float]) -> None:
        console.print(f"{run}: step {row['step']:.0f} of {steps}, loss {row['loss']:.4g}", soft_wrap=True)

    spoken = read_sentences(texts) if texts else ()
    try:
        with show_progress(console) as show:
            request = AdaptRequest(
                training, data or (), spoken, agreed, sentences, encoder, verifier, seeds, place,
                find_dtype(dtype), show, report,
            )  # fmt: skip
            decision, path = adapt_model(locate(checkpoint), out, request)
    except KeyboardInterrupt:  # stopped as asked: nothing failed
        console.print("stopped and saved; the same command goes on from there")
        raise typer.Exit(0) from None
    guard = decision.guard
    presets = (
        f"presets at scale {decision.scale or SCALES[-1]:g}: {guard.agreement:.1%} of the semantic codes "
        f"equal, likelihood {guard.nats:+.4f} nats a frame"
        if training.changes_weights
        else "weights and presets are as they were"
    )
    console.print(
        f"held-out cost {decision.before:.4f}, adapted {decision.after:.4f}, control {decision.control:.4f} "
        f"(seeds differ by {decision.spread:.4f}); {presets}; new speech is less likely by "
        f"{guard.spoken:.2f} nats a frame"
        + (
            f", and its similarity to its voices changes by {guard.similarity:+.3f} "
            f"(standard error {guard.similarity_error:.3f})"
            if verifier
            else ""
        ),
        soft_wrap=True,
    )
    if not verifier and objective == "speech":
        console.print("whether new speech is still like its voices was not asked: give --verifier")
    if path is None:
        console.print(
            "leave the model alone: nothing better was found that leaves the presets, and what is said, as "
            "they are"
        )
        raise typer.Exit(1)
    if decision.voice_map is not None:
        console.print(
            f"the map is {path}; give it to a voice with `revox voice map NAME --from VOICE --map {out}`. It "
            "changes voices and not the model, so it cannot serve ref_audio",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        return
    console.print(
        f"the adaptation is {path}; write it into a new folder with `revox inject --merge --adaptation`",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if decision.adapter is not None:
        console.print(
            f"or keep the release as it is: `revox speak --adapter {out / ADAPTER_FOLDER}`, `revox serve`",
            markup=False, soft_wrap=True,
        )  # fmt: skip
