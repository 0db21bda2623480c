"""Everything that is scored, as WAV files and a manifest: recordings, decoded recordings, new speech.

A checkpoint is used as users do, through `revox.load`; the reference encoder is injected into a copy of the
folder, so that cloning takes its codes as it would be served. One seed, nothing is chosen among several.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.data import RATE, SpeechSet
from lab.errors import LabError
from lab.quality.lists import LENGTHS, read_lists, shorter
from revox import load
from revox.api import Revox
from revox.checkpoint.inject import InjectionOptions, inject
from revox.cloning.clone import ClonedVoice, SelectedSpeech, source_of
from revox.coding import CodingSettings
from revox.demo.demo import EXAMPLES, REFERENCE_SECONDS
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio, read_audio, select_reference, write_audio
from revox.speech.files import replace_file, stamp_of

SEED = 0
MAX_SECONDS = 15.0
EVERY = 3  # with `quick`, one item of so many
MANIFEST = "manifest.json"
WITH_ENCODER = "checkpoint-with-encoder"
CONSENT = "speakers of the lab's lists; human ones read for the public domain (LibriSpeech, CC BY 4.0)"

Made = tuple[np.ndarray, dict[str, Any]]


@dataclass(frozen=True)
class SpeakRequest:
    """What to score.

    checkpoint: its folder, without an encoder. encoder: the file of its reference encoder. data: where the
    build put its speech. out: gets the files. quick: validation speakers and sentences, a third of them.
    inversion: so many human voices and bundled clips are cloned by inversion as well. limit: at most so many
    items of each list, to see it run.
    """

    checkpoint: Path
    encoder: Path
    data: Path
    out: Path
    quick: bool = False
    inversion: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class Step:
    """Makes several files at once: their names, and a function that gives samples and facts of each."""

    names: Sequence[str]
    make: Callable[[], list[Made]] = field(repr=False)


def speak(request: SpeakRequest, progress: ProgressCallback = ignore_progress) -> Path:
    """Write what is missing in `request.out`; returns the manifest's path.

    Raises LabError where `out` has another checkpoint's speech or the build's speech is not that of the
    lists, and what `revox.load` and `revox.checkpoint.inject` raise.
    """
    torch.set_num_threads(1)
    request.out.mkdir(parents=True, exist_ok=True)
    path = request.out / MANIFEST
    manifest = _begin(request, path)
    steps = [
        step
        for step in _Speaking(request, manifest["lists"]).steps(manifest["split"])
        if not all(name in manifest["items"] for name in step.names)
    ]
    for done, step in enumerate(steps):
        progress(Progress("speech to score", done, len(steps), {"now": step.names[0]}))
        for name, (samples, facts) in zip(step.names, step.make(), strict=True):
            file = request.out / f"{name}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            seconds = len(samples) / RATE
            write_audio(file, Audio(samples if len(samples) else np.zeros(RATE // 10, np.float32), RATE))
            manifest["items"][name] = {"file": f"{name}.wav", "seconds": round(seconds, 3), **facts}
        replace_file(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    progress(Progress("speech to score", len(steps), len(steps)))
    return path


def _begin(request: SpeakRequest, path: Path) -> dict[str, Any]:
    lists, split = read_lists(), "validation" if request.quick else "heldout"
    every = EVERY if request.quick else 1
    chosen = {**shorter(lists[split], every, request.limit), "inversion": request.inversion}
    files = sorted(f for f in request.checkpoint.rglob("*") if f.is_file())
    weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (*files, request.encoder)]
    stamp = stamp_of(weights, {**chosen, "inversion": None}, SEED, MAX_SECONDS)
    items: dict[str, Any] = {}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["stamp"] != stamp:
            raise LabError(
                f"{path} is of another checkpoint, encoder or lists: use another folder, or remove it"
            )
        items = found["items"]
    return {
        "stamp": stamp,
        "split": split,
        "lists": chosen,
        "goals": lists["goals"],
        "facts": {
            "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 2),
            "weights": weights,
            "seed": SEED,
            "processor": platform.machine(),
        },
        "items": items,
    }


class _Speaking:
    def __init__(self, request: SpeakRequest, lists: Mapping[str, Any]) -> None:
        self._request, self._lists = request, lists
        self._streams: dict[tuple[str, str], np.ndarray] = {}

    @cached_property
    def _plain(self) -> Revox:
        tts = load(self._request.checkpoint, device="cpu", dtype=torch.float32)
        tts.speak(
            "One.", tts.voices()[0], seed=SEED, max_seconds=1.0
        )  # what the first call costs is not speed
        return tts

    @cached_property
    def _with_encoder(self) -> Revox:
        folder = self._request.out / WITH_ENCODER
        shutil.rmtree(folder, ignore_errors=True)
        inject(self._request.checkpoint, self._request.encoder, InjectionOptions(out=folder))
        return load(folder, device="cpu", dtype=torch.float32)

    def _tts(self, method: str) -> Revox:
        return self._with_encoder if method == "encoder" else self._plain

    def steps(self, split: str) -> Iterator[Step]:
        """All steps, those that everything else is compared with first."""
        yield from self._preset_steps(split)
        for kind, voices in self._lists["voices"].items():
            speech = SpeechSet(self._request.data, split, kind)
            for n, voice in enumerate(voices):
                yield from self._voice_steps(kind, voice, speech)
                inverted = sum(v["spoken"] for v in voices[: n + 1]) <= self._lists["inversion"]
                if kind == "human" and voice["spoken"] and inverted:
                    yield self._clone_step(kind, voice, "inversion", voice["reference"])
        for n, clip in enumerate(self._lists["bundled"]):
            yield from self._bundled_steps(clip, n < self._lists["inversion"])

    def _preset_steps(self, split: str) -> Iterator[Step]:
        speech = SpeechSet(self._request.data, split, "synthetic")
        index = {utterance.text: i for i, utterance in enumerate(speech.utterances)}
        for n, sentence in enumerate(self._lists["sentences"]):
            text, facts = sentence["text"], {"text": sentence["text"], "kind": sentence["kind"]}
            if text not in index:
                raise LabError(f"nobody says {text!r} in {self._request.data}: build its speech anew")

            def spoken(sentence: Mapping[str, Any] = sentence, facts: dict[str, Any] = facts) -> list[Made]:
                samples, more = _say(self._plain, sentence["text"], sentence["preset"])
                return [(samples, {**facts, **more, "preset": sentence["preset"]})]

            def recorded(i: int = index[text], facts: dict[str, Any] = facts) -> list[Made]:
                source = speech.waveform(i)
                return [(source, facts), (self._decoded(source), facts)]

            yield Step([f"preset/{n:02d}"], spoken)
            yield Step([f"preset-source/{n:02d}", f"preset-decoded/{n:02d}"], recorded)

    def _voice_steps(self, kind: str, voice: Mapping[str, Any], speech: SpeechSet) -> Iterator[Step]:
        speaker, facts = voice["speaker"], {"text": voice["text"]}
        stream, cut = self._stream(voice, speech), round(voice["reference"] * RATE)
        self._streams[kind, speaker] = stream
        yield Step(
            [f"voice/{kind}/{speaker}/{part}" for part in ("stream", "reference", "other")],
            lambda: [(stream, facts), (stream[:cut], {}), (stream[cut:], {})],
        )
        if not voice["spoken"]:
            return
        yield Step([f"voice/{kind}/{speaker}/decoded-stream"], lambda: [(self._decoded(stream), facts)])
        for seconds in sorted({voice["reference"], *(s for s in LENGTHS if s <= voice["reference"])}):
            yield self._clone_step(kind, voice, "encoder", seconds)

    def _clone_step(self, kind: str, voice: Mapping[str, Any], method: str, seconds: float) -> Step:
        place = f"voice/{kind}/{voice['speaker']}/{method}-{seconds:g}"
        samples = self._streams[kind, voice["speaker"]][: round(seconds * RATE)]

        def made() -> list[Made]:
            # Exactly these seconds: 3 s with pauses in them are less speech than `select` takes.
            found = select_reference(Audio(samples, RATE), rate=RATE, min_seconds=0.5, whole=True)
            reference = SelectedSpeech(found, source_of(samples.tobytes()))
            return self._cloned(reference, voice["sentences"], method)

        return Step(_parts(place, voice["sentences"]), made)

    def _bundled_steps(self, clip: Mapping[str, Any], inverted: bool) -> Iterator[Step]:
        speaker, path = clip["file"].split("-")[0], EXAMPLES / clip["file"]
        yield Step([f"bundled/{speaker}/source"], lambda: [(read_audio(path, rate=RATE).samples, {})])
        for method in ("encoder", "inversion")[: 1 + inverted] if clip["spoken"] else ():
            yield self._bundled_clone(speaker, path, clip["sentences"], method)

    def _bundled_clone(self, speaker: str, path: Path, sentences: Sequence[str], method: str) -> Step:
        def made() -> list[Made]:
            reference = self._tts(method).select(path, max_seconds=REFERENCE_SECONDS)
            return self._cloned(reference, sentences, method)

        return Step(_parts(f"bundled/{speaker}/{method}", sentences), made)

    def _cloned(self, reference: SelectedSpeech, sentences: Sequence[str], method: str) -> list[Made]:
        tts = self._tts(method)
        voice: ClonedVoice = tts.clone(reference, consent=CONSENT, method=method, seed=SEED)
        return [(voice.decoded.samples, {}), *(_say(tts, text, voice) for text in sentences)]

    def _decoded(self, samples: np.ndarray) -> np.ndarray:
        coder = self._with_encoder.coder
        padded = np.pad(samples, (0, -len(samples) % coder.codec.samples_per_frame))
        found = self._with_encoder.find_codes(Audio(padded, RATE), CodingSettings("encoder", seed=SEED))
        return coder.decode(found.codes).numpy()[: len(samples)]

    def _stream(self, voice: Mapping[str, Any], speech: SpeechSet) -> np.ndarray:
        mine = speech.of(voice["speaker"]) if voice["speaker"] in speech.speakers else []
        wanted = voice["utterances"]
        texts = [speech.utterances[mine[i]].text for i in wanted if i < len(mine)]
        known = None if None in texts else " ".join(map(str, texts))
        if len(texts) < len(wanted) or known != voice["text"]:
            raise LabError(
                f"{voice['speaker']} does not say in {self._request.data} what lab/lists/judged.json "
                "expects: build its speech anew from the committed plan"
            )
        return np.concatenate([speech.waveform(mine[i]) for i in wanted])


def _parts(place: str, sentences: Sequence[str]) -> list[str]:
    return [f"{place}/decoded", *(f"{place}/{n}" for n in range(len(sentences)))]


def _say(tts: Revox, text: str, voice: Any) -> Made:
    began = time.process_time()
    audio = tts.synthesize(text, voice, seed=SEED, max_seconds=MAX_SECONDS).audio
    took = time.process_time() - began
    facts = {"text": text, "ended": not audio.truncated, "cpu_seconds": round(took, 3)}
    return audio.samples, facts
