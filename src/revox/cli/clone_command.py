"""`revox clone`: a voice from a recording, added to a checkpoint."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from torch import Tensor

    from revox.checkpoint.voices import Voice
    from revox.cloning.clone import ClonedVoice
    from revox.coding.invert import InversionProgress
    from revox.coding.student import QuickEncoder
    from revox.model.voxtral import Voxtral


def command(
    clip: Annotated[Path, typer.Argument(help="The recording: any audio or video file.")],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", help="The checkpoint's folder, or a hub id.")
    ],
    name: Annotated[str, typer.Option(help="The new voice's name: a-z, 0-9, _ and -.")],
    consent: Annotated[
        str | None, typer.Option(help="Whose voice it is, and that they agreed to it being cloned. Required.")
    ] = None,
    transcript: Annotated[
        str | None,
        typer.Option(
            help="What is said in CLIP (30 s at most), or @FILE: the language model is then asked as well."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="auto|encoder|inversion|best",
            help="Where the codes come from: the checkpoint's encoder if it has one, else inversion (auto); "
            "or both, and the better ones are kept (best).",
        ),
    ] = "auto",
    refine: Annotated[
        int, typer.Option(min=0, help="Steps of inversion that improve the encoder's codes.")
    ] = 0,
    quick_encoder: Annotated[
        bool,
        typer.Option(
            "--quick-encoder", help="First train a small encoder for this checkpoint (kept for later)."
        ),
    ] = False,
    budget: Annotated[float | None, typer.Option(help="Seconds to spend on finding the codes.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of descent (the same number gives the same voice).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For everything left to chance.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a voice of that name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace even a preset.")] = False,
    decoded: Annotated[
        Path | None,
        typer.Option(help="Also write how the reference sounds through the codes, marked, to this file."),
    ] = None,
) -> None:
    """Clone a voice from CLIP and add it to the checkpoint, with its encoder if it has one, or by search.

    Ctrl-C ends the search and keeps the best voice found so far. If it cannot be added (a full disk, a name
    taken meanwhile), its codes are written to a file that `revox voice add` takes.
    """
    from rich.console import Console
    from rich.markup import escape

    from revox.cloning.consent import record_consent

    console = Console(stderr=True, highlight=False)
    # What can be wrong is said before anything is computed.
    record_consent(consent)
    from revox.checkpoint.locate import locate
    from revox.checkpoint.params import read_params
    from revox.checkpoint.voice_journal import check_writable
    from revox.checkpoint.voices import add_voice, check_voice_free

    folder = locate(checkpoint)
    rate = read_params(folder).voxtral_config().codec.sampling_rate
    check_voice_free(folder, name, overwrite, force)
    check_writable(folder)
    from revox.checkpoint.inspect import inspect
    from revox.cloning.clone import choose_ways

    encoder_there = inspect(folder).encoder
    ways = choose_ways(encoder_there == "complete", method, refine, budget, steps, quick_encoder)
    searches = ways != ("encoder",)
    if encoder_there == "partial":
        console.print("[yellow]a part of an encoder is in the weights, and left off: inverting[/]")
    from revox.speech import AudioError, format_for, read_audio, select_reference

    if decoded is not None:
        format_for(decoded)
        if not decoded.parent.is_dir():
            raise AudioError(f"There is no folder {decoded.parent}; create it or choose another path.")
    said = _transcript(transcript)
    audio = read_audio(clip)
    console.print(f"[bold]{escape(clip.name)}[/]: {audio.seconds:.1f} s at {audio.rate} Hz")
    selection = select_reference(audio, rate=rate, whole=said is not None)
    for line in (*selection.reasons, *(f"[yellow]{w}[/]" for w in selection.warnings)):
        console.print(line)
    import torch

    from revox.checkpoint.load import PARTS as WHOLE
    from revox.checkpoint.load import load_model
    from revox.cloning.clone import PARTS, check_transcript, clone_voice, preset_codes

    check_transcript(said)
    # The whole model is read only to be asked about a transcript.
    asked = said is not None and searches
    model = load_model(folder, dtype=torch.float32, parts=WHOLE if asked else PARTS)
    presets = preset_codes(folder, model) if searches else []
    encoder = _quick_encoder(console, model, presets) if quick_encoder and presets else None
    opinion = None
    if asked:
        from functools import partial

        from revox.coding.likelihood import opinion_on
        from revox.synthesis.prompt import Prompter

        prompter = Prompter(folder)
        opinion = opinion_on(model, partial(prompter.tokens_for_rows, said or ""), prompter.audio_token)
    with _Progress(console) as progress:
        cloned = clone_voice(
            model, audio, consent=consent or "", name=name, method=method, refine_steps=refine,
            budget=budget, steps=steps, seed=seed, progress=progress, presets=presets, source=clip,
            selection=selection, encoder=encoder, transcript=said, opinion=opinion,
        )  # fmt: skip
    voice = cloned.voice
    with _kept_if_not_added(voice, folder):
        add_voice(folder, name, voice.embedding, voice.codes, voice.provenance, overwrite, force)
    if decoded is not None:
        from revox.cli.marked import who_signs, write_synthetic

        write_synthetic(decoded, cloned.decoded, checkpoint, name, who_signs())
    _summary(console, cloned, folder)


@contextmanager
def _kept_if_not_added(voice: Voice, folder: Path) -> Iterator[None]:
    """What a search of minutes found outlasts a full disk, a name taken meanwhile, or Ctrl-C."""
    from revox.checkpoint.errors import CheckpointError
    from revox.cloning.errors import CloneError

    try:
        yield
    except (CheckpointError, OSError, KeyboardInterrupt) as error:
        path = _keep(voice)
        why = getattr(error, "strerror", None) or str(error) or "stopped"
        if path is None:
            raise CloneError(f"{why}; nor could the codes found be written anywhere: they are lost") from None
        consent = voice.provenance["consent"]["statement"]
        arguments = (voice.name, path, "--checkpoint", folder, "--consent", consent)
        raise CloneError(
            f"{why}. The codes found are kept in {path}; when that is mended, add them with: "
            f"revox voice add {shlex.join(str(argument) for argument in arguments)}"
        ) from None


def _keep(voice: Voice) -> Path | None:
    """Write a voice's codes to this folder, else the one for temporary files; where, or None for nowhere."""
    from revox.checkpoint.voices import save_codes

    assert voice.codes is not None
    for place in (Path(), Path(tempfile.gettempdir())):
        stems = (voice.name, *(f"{voice.name}-{number}" for number in range(2, 100)))
        paths = (place / f"{stem}.codes.safetensors" for stem in stems)
        path = next((path for path in paths if not path.exists()), None)
        try:
            if path is not None:
                save_codes(path, voice.codes, voice.provenance)
                return path.absolute()
        except OSError:
            continue
    return None


def _transcript(given: str | None) -> str | None:
    from revox.cloning.errors import CloneError

    try:
        if given is None or not given.startswith("@"):
            (given or "").encode()
            return given
        return Path(given[1:]).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise CloneError(f"the transcript {given} cannot be read: {reason}") from None


def _quick_encoder(console: Console, model: Voxtral, presets: list[Tensor]) -> QuickEncoder | None:
    """From the cache, or trained with a bar to watch."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from revox.checkpoint.locate import user_cache
    from revox.cloning.clone import float_codec
    from revox.coding.student import default_training, quick_encoder_for

    codec = float_codec(model.audio_tokenizer)
    training = default_training(codec)
    columns = (
        TextColumn("quick encoder"), BarColumn(), TextColumn("{task.fields[losses]}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=training.steps, losses="")

        def told(step: int, steps: int, losses: dict[str, float]) -> None:
            line = f"semantic {losses['semantic']:.2f} nats, acoustic {losses['acoustic']:.2f} levels"
            bar.update(task, completed=step, total=steps, losses=line)

        encoder = quick_encoder_for(codec, presets, training, user_cache(), told)
    if encoder is None:
        console.print("[yellow]the quick encoder is no better than a blind guess: going on without it[/]")
    return encoder


class _Progress:
    """The inversion's progress as a bar on stderr, with loss and time left."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[best]:.4f}"),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, at: InversionProgress) -> None:
        left = f"{at.seconds_left:.0f} s left, Ctrl-C keeps the best"
        if at.phase not in self._tasks:
            self._tasks[at.phase] = self._bar.add_task(at.phase, total=at.steps, best=at.best, left=left)
        self._bar.update(self._tasks[at.phase], completed=at.step, best=at.best, left=left)


def _summary(console: Console, cloned: ClonedVoice, folder: Path) -> None:
    result = cloned.result
    if not cloned.scores and cloned.kept == "encoder":
        console.print(
            f"codes from the checkpoint's encoder in {result.seconds:.1f} s: "
            f"spectral distance {result.loss:.4f}"
        )
    elif result.losses and cloned.kept != "encoder":
        ended = "stopped by hand after" if result.stopped else "done after"
        losses = f"{result.losses[0]:.4f} -> {result.loss:.4f}"
        console.print(f"{ended} {result.steps} steps, {result.seconds:.0f} s: loss {losses}")
    if cloned.scores:
        said = (
            f"{name} {score.total:.4f} (sound {score.reconstruction:.4f}, acceptance {score.acceptance:.4f})"
            for name, score in cloned.scores.items()
        )
        console.print(f"score, less is better: {', '.join(said)}")
        console.print(f"kept: {cloned.kept}")
    name, frames = cloned.voice.name, cloned.voice.frames
    seconds = cloned.reference.seconds
    from rich.markup import escape

    where = escape(str(folder))
    console.print(
        f"voice [bold]{name}[/] ({frames} frames, {seconds:.1f} s) is now in {where}", soft_wrap=True
    )
    command = f'revox speak "..." --checkpoint {shlex.quote(str(folder))} --voice {name} -o out.wav'
    console.print(f"Speak with it: {command}", markup=False, soft_wrap=True)
