"""`revox voice tune`: a voice's embedding learned from a speaker's clips."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from revox.cli.clone_command import saved_on_failure
from revox.cli.options import Checkpoint, Device, Dtype, Method, Seed

if TYPE_CHECKING:
    from rich.console import Console

    from revox.cloning.tune import TunedVoice


def command(
    name: Annotated[str, typer.Argument(help="The tuned voice's name.")],
    checkpoint: Checkpoint,
    data: Annotated[
        Path,
        typer.Option(
            help="A folder of clips of one speaker, each with its transcript in a .txt beside it, or with "
            "manifest.csv (file, text)."
        ),
    ],
    consent: Annotated[
        str | None, typer.Option(help="Whose voice it is, and that they agreed to it being cloned. Required.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="The voice to begin with; by default a clone of the clips.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Of learning, at most.")] = 10.0,
    steps: Annotated[
        int, typer.Option(min=1, help="At most so many steps; the same number gives the same voice.")
    ] = 4000,
    replay: Annotated[
        bool,
        typer.Option(help="Also learn what the model says in the voice it begins with, so that words stay."),
    ] = True,
    recognizer: Annotated[
        str, typer.Option(help="Writes missing transcripts: none, or whisper:FOLDER_OR_HUB_ID.")
    ] = "none",
    method: Method = "auto",
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a voice of that name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace even a preset.")] = False,
) -> None:
    """Tune a voice to a speaker's clips and add it to the checkpoint; no weight of the model changes.

    A quarter of the clips is held out and decides when to stop. Ctrl-C keeps the best so far. If the voice
    cannot be added, its embedding is written to a file that `revox voice add` takes.
    """
    from rich.console import Console

    from revox.checkpoint.locate import locate
    from revox.checkpoint.voice_journal import check_writable
    from revox.checkpoint.voices import add_voice, check_voice_free, find_voice
    from revox.cloning.consent import record_consent
    from revox.evaluation.clips import find_clips

    console = Console(stderr=True, highlight=False)
    # What can be wrong is said before anything is computed.
    agreed = record_consent(consent)
    folder = locate(checkpoint)
    check_voice_free(folder, name, overwrite, force)
    check_writable(folder)
    if start is not None:
        find_voice(folder, start)
    clips = [(clip.path, clip.text) for clip in find_clips(data)]
    recordings = _with_words(console, clips, recognizer, device)
    import revox
    from revox.api import find_dtype
    from revox.cli.progress import show_progress
    from revox.cloning.tune import VoiceTuning

    tts = revox.load(folder, device, find_dtype(dtype))
    settings = VoiceTuning(minutes=minutes, steps=steps, replay=replay, seed=seed)
    with show_progress(console) as progress, _asked_to_stop() as stop:
        voice = tts.tune(
            recordings, consent=agreed, name=name, voice=start, settings=settings, method=method,
            progress=progress, should_stop=stop.is_set,
        )  # fmt: skip
    with saved_on_failure(voice, folder, tuned=True):
        add_voice(folder, name, voice.embedding, voice.codes, voice.provenance, overwrite, force)
    _summary(console, voice, folder)


def _with_words(
    console: Console, clips: list[tuple[Path, str | None]], recognizer: str, device: str | None
) -> list[tuple[Path, str]]:
    """The clips with transcripts; missing ones are the recognizer's, where it hears words."""
    from revox.cloning.errors import CloneError
    from revox.metrics.intelligibility import load_recognizer
    from revox.speech import AudioError, read_audio

    silent = [path for path, text in clips if not text]
    words = load_recognizer(recognizer, device=device or "cpu") if silent else None
    if silent and words is None:
        raise CloneError(
            f"{len(silent)} of {len(clips)} clips have no transcript, the first {silent[0].name}: write what "
            f"is said in {silent[0].with_suffix('.txt').name}, or let --recognizer whisper:MODEL write it"
        )
    found: list[tuple[Path, str]] = []
    for path, text in clips:
        if not text and words is not None:
            try:
                text = words.transcribe(read_audio(path))
            except AudioError as error:
                console.print(f"left out: {path.name}: {error}", markup=False)
        if text:
            found.append((path, text))
        else:
            console.print(f"left out: {path.name}: no words were heard", markup=False)
    return found


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C; a second one ends the command."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def once(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, once)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _summary(console: Console, voice: TunedVoice, folder: Path) -> None:
    tuning = voice.tuning
    for file, reason in voice.left_out.items():
        console.print(f"left out: {file}: {reason}", markup=False)
    before, after = tuning.before, tuning.after
    console.print(
        f"held out: {before.semantic:.3f} -> {after.semantic:.3f} nats a frame, flow error "
        f"{before.flow:.3f} -> {after.flow:.3f}, after step {tuning.best_step} of {tuning.steps}"
    )
    console.print(
        f"the embedding moved by {tuning.change:.2f} standard deviations, nine tenths of it in "
        f"{tuning.concentration:.0%} of the dimensions"
    )
    console.print(f"voice {voice.name} is now in {folder}", markup=False, soft_wrap=True)
    command = f'revox speak "..." --checkpoint {shlex.quote(str(folder))} --voice {voice.name} -o out.wav'
    console.print(f"Speak with it: {command}", markup=False, soft_wrap=True)
    console.print(
        "Compare it by ear with the voice it began with: likelier clips are no proof of a better voice "
        "(docs/adaptation.md).",
        soft_wrap=True,
    )
