"""`revox clone`: a voice from a recording, added to a checkpoint."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from revox.cli.options import Checkpoint, Device, Dtype, Method, Refine, Seed

if TYPE_CHECKING:
    from rich.console import Console

    from revox.api import Revox
    from revox.checkpoint.voices import Voice
    from revox.cloning.clone import ClonedVoice
    from revox.coding import CodingSettings
    from revox.progress import Progress, ProgressCallback

VERIFIER = "speechbrain/spkrec-ecapa-voxceleb"
OLD_NAMES = {"--quick-encoder": "--method student"}


def command(
    clips: Annotated[
        list[Path],
        typer.Argument(help="The recording, any audio or video file; several of one speaker make one voice."),
    ],
    checkpoint: Checkpoint,
    name: Annotated[str, typer.Option(help="The new voice's name: a-z, 0-9, _ and -.")],
    consent: Annotated[
        str | None, typer.Option(help="Whose voice it is, and that they agreed to it being cloned. Required.")
    ] = None,
    transcript: Annotated[
        str | None,
        typer.Option(
            help="What is said in the recording (one, of 30 s at most), or @FILE: the language model then "
            "guides the search."
        ),
    ] = None,
    method: Method = "auto",
    refine: Refine = 0,
    budget: Annotated[float | None, typer.Option(help="Seconds to spend on finding the codes.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of inversion (the same number gives the same voice).")
    ] = None,
    seed: Seed = 0,
    candidates: Annotated[
        int,
        typer.Option(
            "--best-of", min=1, help="Search with so many seeds, at so many times the cost; see docs."
        ),
    ] = 1,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="With --best-of, chooses: an ECAPA-TDNN, or one of your own; a file or hub id. Else "
            "speechbrain/spkrec-ecapa-voxceleb."
        ),
    ] = None,
    recognizer: Annotated[
        str,
        typer.Option(help="With --best-of, counts wrong words: none, or whisper:FOLDER_OR_HUB_ID."),
    ] = "none",
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a voice of that name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace even a preset.")] = False,
    decoded: Annotated[
        Path | None,
        typer.Option(help="Also write how the reference sounds through the codes, marked, to this file."),
    ] = None,
) -> None:
    """Clone a voice from CLIPS and add it to the checkpoint: by its encoder, a trained student, or a search.

    Ctrl-C ends the search and keeps the best voice found so far. If it cannot be added (a full disk, a name
    taken meanwhile), its codes are written to a file that `revox voice add` takes.
    """
    from rich.console import Console

    from revox.cloning.consent import record_consent

    console = Console(stderr=True, highlight=False)
    # What can be wrong is said before anything is computed.
    agreed = record_consent(consent)
    from revox.checkpoint.locate import locate
    from revox.checkpoint.voice_journal import check_writable
    from revox.checkpoint.voices import add_voice, check_voice_free

    folder = locate(checkpoint)
    check_voice_free(folder, name, overwrite, force)
    check_writable(folder)
    from revox.speech import AudioError, format_for

    signer = None
    if decoded is not None:
        from revox.cli.marked import who_signs, write_synthetic

        signer = who_signs()
        format_for(decoded)
        if not decoded.parent.is_dir():
            raise AudioError(f"There is no folder {decoded.parent}; create it or choose another path.")
    spoken = _transcript(transcript)
    import revox
    from revox.api import find_dtype
    from revox.coding import CodingSettings

    tts = revox.load(folder, device, find_dtype(dtype), lazy=True)
    if tts.encoder == "partial":
        console.print("[yellow]the weights hold only a part of an encoder, which is not used[/]")
    if method == "auto" and tts.encoder != "complete" and tts.coder.student is None:
        _offer_student(console, tts)
    settings = CodingSettings(method, refine, steps, budget)
    choose = _chooser(console, tts, candidates, verifier, recognizer, settings)
    if spoken is not None and tts.coder.ways(settings) in (("encoder",), ("student",)):
        console.print(
            "the transcript is recorded with the voice and guides nothing: these codes are not searched for "
            "(--refine N does)",
            style="yellow",
        )
    with _show_progress(console) as progress:

        def clone(seed: int) -> ClonedVoice:
            return tts.clone(
                clips, consent=agreed, name=name, transcript=spoken, method=method, refine=refine,
                steps=steps, budget=budget, seed=seed, progress=progress,
            )  # fmt: skip

        voice = clone(seed) if choose is None else choose(clone, range(seed, seed + candidates), progress)
    with saved_on_failure(voice, folder):
        add_voice(folder, name, voice.embedding, voice.codes, voice.provenance, overwrite, force)
    if decoded is not None:
        write_synthetic(decoded, voice.decoded, checkpoint, name, signer)
    _summary(console, voice, folder, str(tts.device))


def _chooser(
    console: Console,
    tts: Revox,
    candidates: int,
    verifier: str | None,
    recognizer: str,
    settings: CodingSettings,
) -> Callable[[Callable[[int], ClonedVoice], range, ProgressCallback], ClonedVoice] | None:
    """What takes the best of several clones; None for one. What it needs is loaded before any search."""
    from revox.cloning.errors import CloneError

    if candidates == 1:
        if verifier is not None or recognizer != "none":
            raise CloneError(
                "--verifier and --recognizer choose among several voices: add --best-of N, or leave them out"
            )
        return None
    if tts.coder.ways(settings) in (("encoder",), ("student",)):
        raise CloneError(
            "--best-of searches with several seeds, and these codes are taken at once, the same for every "
            "seed: add --refine N, or use --method inversion"
        )
    from revox.evaluation.best_of import best_of
    from revox.metrics.intelligibility import load_recognizer
    from revox.training.speaker import SpeakerLoss

    network = SpeakerLoss.load(verifier or VERIFIER, tts.sampling_rate, str(tts.device))
    words = load_recognizer(recognizer, device=str(tts.device))
    console.print(
        f"{candidates} voices are made and spoken with, at {candidates} times the cost of one; the whole "
        "model is loaded for it"
    )

    def choose(clone: Callable[[int], ClonedVoice], seeds: range, progress: ProgressCallback) -> ClonedVoice:
        voice, scores = best_of(tts, clone, seeds, network, words, progress)
        if len(scores) < len(seeds):
            console.print(f"stopped early: {len(scores)} of {len(seeds)} voices were scored", style="yellow")
        for score in scores:
            wrong = "" if score.word_errors is None else f", word errors {score.word_errors:.0%}"
            console.print(f"seed {score.seed}: similarity {score.similarity:.3f}{wrong}")
        return voice

    return choose


def _offer_student(console: Console, tts: Revox) -> None:
    from revox.cli.progress import duration
    from revox.training.student import StudentRequest
    from revox.training.student_plan import plan_student

    request = StudentRequest()
    cost = plan_student(tts.folder, request.sentences, request.training, str(tts.device))
    command = f"revox train student {shlex.quote(str(tts.folder))}"
    console.print(
        f"Searching for the codes; `{command}` would train an encoder that gives better ones at once (once, "
        f"about {duration(cost.seconds)} on {tts.device}, {cost.memory / 1e9:.1f} GB of memory).",
        markup=False, soft_wrap=True,
    )  # fmt: skip


@contextmanager
def _show_progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Bars for the search, and sentences about the stretch selected."""
    from revox.cli.progress import show_progress
    from revox.cloning.clone import SELECTED

    with show_progress(console) as show:

        def report(at: Progress) -> None:
            if at.what != SELECTED:
                return show(at)
            console.print(f"{at.facts['file']}: {at.facts['reasons']}", markup=False)
            if at.facts["warnings"]:
                console.print(at.facts["warnings"], style="yellow", markup=False)
            if at.done == at.total:
                console.print("Ctrl-C ends a search and keeps the best voice so far.")

        yield report


@contextmanager
def saved_on_failure(voice: Voice, folder: Path, tuned: bool = False) -> Iterator[None]:
    """If the voice cannot be added (a full disk, a name taken meanwhile, Ctrl-C), its codes are saved.

    tuned: its embedding is, which is not the sum of its codes. Raises CloneError that names the file.
    """
    from revox.checkpoint.errors import CheckpointError
    from revox.cloning.errors import CloneError

    try:
        yield
    except (CheckpointError, OSError, KeyboardInterrupt) as error:
        path = _save(voice, tuned)
        what, are, them = ("embedding learned", "is", "it") if tuned else ("codes found", "are", "them")
        why = getattr(error, "strerror", None) or str(error) or "stopped"
        if path is None:
            raise CloneError(f"{why}; nor could the {what} be written anywhere, and {are} lost") from None
        consent = voice.provenance["consent"]["statement"]
        arguments = (voice.name, path, "--checkpoint", folder, "--consent", consent)
        raise CloneError(
            f"{why}. The {what} {are} saved in {path}; once that is fixed, add {them} with: "
            f"revox voice add {shlex.join(str(argument) for argument in arguments)}"
        ) from None


def _save(voice: Voice, tuned: bool = False) -> Path | None:
    """Write a voice's codes, or its embedding, to this folder, else the one for temporary files; where, or
    None for nowhere.
    """
    from revox.checkpoint.voices import save_codes, save_embedding

    kind = "embedding" if tuned else "codes"
    for place in (Path(), Path(tempfile.gettempdir())):
        stems = (voice.name, *(f"{voice.name}-{number}" for number in range(2, 100)))
        paths = (place / f"{stem}.{kind}.safetensors" for stem in stems)
        path = next((path for path in paths if not path.exists()), None)
        try:
            if path is None:
                continue
            if tuned:
                save_embedding(path, voice.embedding, voice.provenance)
            else:
                assert voice.codes is not None
                save_codes(path, voice.codes, voice.provenance)
            return path.absolute()
        except OSError:
            continue
    return None


def _transcript(given: str | None) -> str | None:
    from revox.cloning.errors import CloneError
    from revox.speech.files import read_text

    if given is not None and given.startswith("@"):
        return read_text(given[1:], CloneError).strip()
    try:
        (given or "").encode()
    except UnicodeEncodeError:
        raise CloneError("the transcript is not UTF-8 text") from None
    return given


def _summary(console: Console, voice: ClonedVoice, folder: Path, device: str) -> None:
    coding = voice.coding
    if not coding.searches:
        console.print(
            f"codes from the {'trained student' if coding.method == 'student' else 'encoder'} in "
            f"{coding.seconds:.1f} s: spectral distance {voice.distance:.4f}"
        )
    elif coding.search is not None and coding.search.losses:
        search = coding.search
        ended = "stopped by hand after" if search.stopped else "done after"
        losses = f"{search.losses[0]:.4f} -> {search.loss:.4f}"
        console.print(f"{ended} {search.steps} steps, {search.seconds:.0f} s: loss {losses}")
    if coding.scores:
        scores = (
            f"{way} {score.total:.4f} (sound {score.reconstruction:.4f}, other {score.regularization:.4f})"
            for way, score in coding.scores.items()
        )
        console.print(f"score, less is better: {', '.join(scores)}")
        console.print(f"kept: {coding.method}")
    size = f"{voice.frames} frames, {voice.reference.seconds:.1f} s, by {coding.description} on {device}"
    console.print(f"voice {voice.name} ({size}) is now in {folder}", markup=False, soft_wrap=True)
    command = f'revox speak "..." --checkpoint {shlex.quote(str(folder))} --voice {voice.name} -o out.wav'
    console.print(f"Speak with it: {command}", markup=False, soft_wrap=True)
