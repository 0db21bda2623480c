"""The demonstration: clone the voice of a bundled clip with the lab checkpoint and speak with it.

Everything goes the way it goes with the real checkpoint: the folder's files, the inversion through the frozen
decoder, the voice added to the folder, the prompt from its tekken.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revox.demo import checkpoint_folder
from revox.demo.errors import DemoError
from revox.progress import ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from revox.speech import Audio

EXAMPLES = Path(__file__).parent / "examples"
REFERENCE = "5867-48852-0000.flac"
OTHERS = (
    "248-130644-0000.flac",
    "1926-143879-0000.flac",
    "4680-16026-0000.flac",
    "1034-121119-0000.flac",
    "2159-179154-0000.flac",
)
CONSENT = "speaker 5867 of LibriSpeech, who read for the public domain; published under CC BY 4.0"
SENTENCES = (
    "Please open the window in the kitchen.",
    "The next plane to the city leaves at quarter past four.",
)
"""Two sentences of the small checkpoint's domain that its training did not use."""

VOICE = "demo"
REFERENCE_SECONDS = 8.0  # of the clip, at most
SENTENCE_SECONDS = 8.0  # at most; a sentence of the domain takes 2 to 4
PAUSE_SECONDS = 0.3
THREADS = 1  # the same result for any number of cores; so small a model gains little from more
MARK = "made-by-revox-lab-demo"


@dataclass(frozen=True)
class Stages:
    """Callbacks: `say` takes a line at each stage, `cloning` the inversion's progress."""

    say: Callable[[str], None] = lambda line: None
    cloning: ProgressCallback = ignore_progress


def run_demo(
    out: Path,
    *,
    checkpoint: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    stages: Stages | None = None,
) -> dict[str, Any]:
    """Clone, speak and compare; writes files to `out` and returns the contents of summary.json.

    out: gets reference.wav, decoded.wav (the decoded codes of the reference), speech.wav, mel.png,
    summary.json, and checkpoint/, the copy that the voice is added to. checkpoint: the folder to copy, by
    default the one that ships with the project. steps: of the inversion, by default its own number. The same
    seed gives the same result on the same machine. Without Resemblyzer, the summary's `similarity` is None
    and `notes` says so.

    Raises DemoError if there is no checkpoint to copy, `out` holds another folder named checkpoint, or the
    model ends without a sound.
    """
    stages = stages or Stages()
    source = checkpoint_folder() if checkpoint is None else checkpoint
    out.mkdir(parents=True, exist_ok=True)
    folder = _copy(source, out / "checkpoint")
    with _threads(THREADS):
        return _run(out, folder, steps, seed, stages)


def _run(out: Path, folder: Path, steps: int | None, seed: int, stages: Stages) -> dict[str, Any]:
    import numpy as np

    import revox
    from revox.checkpoint.voices import add_voice
    from revox.evaluation.mel_picture import mel_picture
    from revox.marking import MarkError, load_signer, new_record, write_marked
    from revox.speech import Audio, write_audio
    from revox.speech.files import replace_file

    began = time.perf_counter()
    stages.say("loading the checkpoint")
    tts = revox.load(folder, device="cpu")
    seconds = {"load": time.perf_counter() - began}

    began = time.perf_counter()
    clip = EXAMPLES / REFERENCE
    stages.say(f"cloning the voice of {clip.name}: searching for codes that sound like it")
    reference = tts.select(clip, max_seconds=REFERENCE_SECONDS)
    cloned = tts.clone(
        reference, consent=CONSENT, name=VOICE, method="inversion", steps=steps, seed=seed,
        progress=stages.cloning,
    )  # fmt: skip
    add_voice(folder, VOICE, cloned.embedding, cloned.codes, cloned.provenance)
    write_audio(out / "reference.wav", cloned.reference)
    try:
        signer = load_signer()
    except MarkError as error:
        stages.say(f"{error}; marked by tags only")
        signer = None
    record = new_record("revox demo", VOICE)
    write_marked(out / "decoded.wav", cloned.decoded, record=record, signer=signer)
    seconds["clone"] = time.perf_counter() - began

    began = time.perf_counter()
    stages.say(f"speaking {len(SENTENCES)} sentences with it")
    spoken = [tts.speak(text, VOICE, seed=seed, max_seconds=SENTENCE_SECONDS) for text in SENTENCES]
    seconds["speak"] = time.perf_counter() - began
    speech_seconds = sum(audio.seconds for audio in spoken)
    if not speech_seconds:
        raise DemoError("the model ended without a sound; the checkpoint does not speak this text")
    pause = np.zeros(round(PAUSE_SECONDS * tts.sampling_rate), dtype=np.float32)
    pieces = [piece for audio in spoken for piece in (audio.samples, pause)][:-1]
    speech = Audio(np.concatenate(pieces), tts.sampling_rate)
    write_marked(out / "speech.wav", speech, record=new_record("revox demo", VOICE), signer=signer)

    search = cloned.coding.searches["inversion"]
    began = time.perf_counter()
    stages.say("comparing the speakers, drawing the spectrograms")
    similarity, notes = _similarity(cloned.reference, {"decoded": cloned.decoded, "speech": speech})
    notes += [
        f"{text!r} was cut after {SENTENCE_SECONDS:g} s: the model had not ended"
        for text, audio in zip(SENTENCES, spoken, strict=True)
        if audio.truncated
    ]
    titles = ("reference", "decoded: the reference through the cloned codes", "speech: a new text")
    if find_spec("matplotlib"):
        clips = (cloned.reference, cloned.decoded, speech)
        mel_picture(out / "mel.png", list(zip(titles, clips, strict=True)))
    else:
        notes.append("mel.png is left out: it needs matplotlib (`pip install 'revox[eval]'`)")
    seconds["compare"] = time.perf_counter() - began
    summary = {
        "reference": {
            "file": clip.name,
            "speaker": _speaker(clip.name),
            "start_s": round(cloned.selection.start, 2),
            "seconds": round(cloned.reference.seconds, 2),
        },
        "sentences": list(SENTENCES),
        "speech_seconds": round(speech_seconds, 2),
        "similarity": similarity,
        "real_time_factor": round(seconds["speak"] / speech_seconds, 3),
        "seconds": {stage: round(took, 2) for stage, took in seconds.items()},
        # Of the whole process, because users wait for loading too.
        "cpu_seconds": round(time.process_time(), 1),
        "inversion": {"steps": search.steps, "loss": round(search.loss, 4), "seed": seed},
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": THREADS,
            "python": platform.python_version(),
        },
        "notes": notes,
    }
    replace_file(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _similarity(reference: Audio, made: dict[str, Audio]) -> tuple[dict[str, Any] | None, list[str]]:
    """Resemblyzer's cosine of each clip in `made` to the reference and to the other speakers; and notes."""
    from revox.metrics.errors import MetricError
    from revox.metrics.speaker import SpeakerVerifier
    from revox.speech import read_audio

    try:
        verifier = SpeakerVerifier()
    except MetricError as error:
        return None, [f"similarities are left out: {error}"]
    own = verifier.embed(reference)
    others = {_speaker(name): verifier.embed(read_audio(EXAMPLES / name)) for name in OTHERS}
    table: dict[str, Any] = {}
    for title, audio in made.items():
        voice = verifier.embed(audio)
        table[title] = {
            "to_reference": round(verifier.similarity(voice, own), 3),
            "to_others": {
                name: round(verifier.similarity(voice, other), 3) for name, other in others.items()
            },
        }
    return table, []


def _speaker(file: str) -> str:
    return file.split("-", 1)[0]


def _copy(source: Path, folder: Path) -> Path:
    """A fresh copy of a checkpoint at `folder`, where only an earlier demonstration's copy may be."""
    if folder.exists() and not (folder / MARK).is_file():
        raise DemoError(f"{folder} already exists and is not from a demonstration; choose another --out")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    # Files of a hub's cache are links: copytree copies their contents.
    shutil.copytree(source, part)
    (part / MARK).write_text("A copy of the lab checkpoint; the next `revox demo` replaces it.\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


@contextmanager
def _threads(most: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
