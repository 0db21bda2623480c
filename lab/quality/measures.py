"""Scores of the files in a manifest: words by Whisper, naturalness by distillmos, voices by Resemblyzer.

Runs in the recognizers' environment (lab/speech/README.md) with this project's folders on the path; nothing
of the model is loaded. Each score is kept in `measures.jsonl` by the contents of what it is a score of, so a
second run computes what is new.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import LabError
from lab.quality.tables import RECOGNIZERS, Wanted, markdown, tables, wanted
from revox.metrics.speaker import SpeakerVerifier
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio, read_audio
from revox.speech.files import replace_file

RATE = 16_000  # Hz, of every model here
_SHORTEST = 0.4  # seconds; what is shorter has no words and the lowest naturalness
_LOWEST_NATURALNESS = 1.0


class Models:
    """The models, each loaded when it is first needed; on one thread of the CPU.

    whisper: the folder of each recognizer in `RECOGNIZERS` (CTranslate2's format).
    """

    def __init__(self, whisper: Mapping[str, Path]) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._folders = whisper
        self._whisper: dict[str, Any] = {}

    def score(self, measure: str, audio: Audio) -> Any:
        """The text, the opinion score (1 to 5) or the embedding [256] of 16 kHz mono audio."""
        short = audio.seconds < _SHORTEST
        if measure == "embedding":
            return np.round(self._verifier.embed(audio), 5).tolist()
        if measure == "naturalness":
            return _LOWEST_NATURALNESS if short else self._naturalness(audio.samples)
        return "" if short else self._transcribe(measure.removeprefix("words "), audio.samples)

    @cached_property
    def _verifier(self) -> SpeakerVerifier:
        return SpeakerVerifier()

    @cached_property
    def _naturalness(self) -> Callable[[np.ndarray], float]:
        import distillmos
        import torch

        torch.set_num_threads(1)
        model = distillmos.ConvTransformerSQAModel().eval()

        def score(samples: np.ndarray) -> float:
            with torch.inference_mode():
                return round(float(model(torch.from_numpy(samples.copy())[None])), 4)

        return score

    def _transcribe(self, name: str, samples: np.ndarray) -> str:
        if name not in self._whisper:
            from faster_whisper import WhisperModel

            folder = self._folders[name]
            if not (folder / "model.bin").is_file():
                raise LabError(f"{folder} holds no Whisper model: see lab/speech/README.md, Materials")
            self._whisper[name] = WhisperModel(
                str(folder), device="cpu", compute_type="int8", cpu_threads=1, num_workers=1
            )
        segments, _ = self._whisper[name].transcribe(
            samples,
            language="en",
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)


def measure(
    out: Path, models: Models, progress: ProgressCallback = ignore_progress
) -> tuple[dict[str, Any], dict[Wanted, Any]]:
    """The manifest in `out` and every score that its tables want.

    Raises LabError if there is no manifest.
    """
    path = out / "manifest.json"
    if not path.is_file():
        raise LabError(f"{path} is missing: make the speech first, with `lab_quality.py speak`")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    cache = dict(_read(out / "measures.jsonl"))
    contents: dict[str, str] = {}
    found: dict[Wanted, Any] = {}
    requests = wanted(manifest)
    with open(out / "measures.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")  # ends the line that a stopped run may have left
        for done, request in enumerate(requests):
            names = [manifest["items"][name]["file"] for name in request.names]
            for name in names:
                if name not in contents:
                    contents[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
            key = " ".join((request.measure, *(contents[name][:32] for name in names)))
            if key not in cache:
                progress(Progress("scores", done, len(requests), {"now": request.measure}))
                parts = [read_audio(out / name, rate=RATE).samples for name in names]
                cache[key] = models.score(request.measure, Audio(np.concatenate(parts), RATE))
                file.write(json.dumps([key, cache[key]]) + "\n")
                file.flush()
            found[request] = cache[key]
    progress(Progress("scores", len(requests), len(requests)))
    return manifest, found


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                key, value = json.loads(line)
            except ValueError:  # an empty line, or one that a stopped run left
                continue
            yield key, value


def report(out: Path, models: Models, progress: ProgressCallback = ignore_progress) -> str:
    """Score what `speak` made in `out`; writes results.json and results.md there and returns the latter."""
    manifest, found = measure(out, models, progress)
    results = tables(manifest, found)
    transcripts = {
        name: {"text": manifest["items"][name]["text"]}
        | {model: found[Wanted(f"words {model}", (name,))] for model in RECOGNIZERS}
        for name in sorted({request.names[0] for request in found if request.measure.startswith("words")})
    }
    content = {
        "facts": manifest["facts"],
        "split": manifest["split"],
        "results": results,
        "transcripts": transcripts,
    }
    replace_file(out / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    text = markdown(results, manifest["goals"], manifest["split"])
    replace_file(out / "results.md", text)
    return text
