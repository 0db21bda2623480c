"""Segments spoken once: each stays on disk for as long as nothing that it depends on changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from revox import __version__
from revox.api import Revox
from revox.checkpoint.adapter import adapter_files
from revox.checkpoint.params import read_json, read_params
from revox.checkpoint.tensors import weight_files
from revox.checkpoint.voices import Voice, load_voice
from revox.evaluation.cache import file_identity
from revox.render.errors import RenderError
from revox.render.levels import Level
from revox.render.script import Script, Segment
from revox.speech.files import load_stamped, save_stamped, stamp_of
from revox.synthesis.errors import SpeakError
from revox.synthesis.longform import Line, SpeechSettings, language_of, no_sound_advice, pieces_of

SUFFIX = ".segment"
"""Of the files in a cache: a line of JSON, then samples, float32."""


@dataclass(frozen=True)
class SpokenSegment:
    """A segment as it was spoken, mono samples `[n]`, and what no take said well."""

    samples: np.ndarray
    level: Level
    warnings: tuple[str, ...]


class SegmentSpeaker:
    """Speaks the segments of a script with a checkpoint, and keeps them in a folder.

    rate: samples a second of what it speaks. Raises RenderError for a segment that cannot be spoken and
    VoiceError for a voice that is not there, before anything is spoken.
    """

    def __init__(
        self, folder: Path, script: Script, settings: SpeechSettings, cache: Path, adapter: Path | None = None
    ) -> None:
        self._settings, self._cache = settings, cache
        names = dict.fromkeys(segment.voice.voice for segment in script.segments)
        self._voices: Mapping[str, Voice] = {name: load_voice(folder, name) for name in names}
        self._identity = _identity(folder, adapter)
        self.rate = read_params(folder).voxtral_config().codec.sampling_rate
        for segment in script.segments:
            try:
                pieces_of(segment.text, self.settings_of(segment))
            except SpeakError as error:
                raise RenderError(f"segment {segment.number} ({segment.where}): {error}") from None

    def settings_of(self, segment: Segment) -> SpeechSettings:
        """How a segment is spoken."""
        language = self._settings.language or language_of(segment.voice.voice)
        own, usual = segment.voice, self._settings
        return replace(
            usual,
            language=language,
            seed=usual.seed if own.seed is None else own.seed,
            cfg=usual.cfg if own.cfg is None else own.cfg,
        )

    def stored(self, segment: Segment, weights: str) -> SpokenSegment | None:
        """The segment as it is on disk, for weights held so; None when it has to be spoken."""
        content = load_stamped(*self._place(segment, weights))
        if content is None:
            return None
        header, _, samples = content.partition(b"\n")
        facts = json.loads(header)
        return SpokenSegment(
            np.frombuffer(samples, "<f4").astype(np.float32),
            Level(*(float(value) for value in facts["level"])),
            tuple(facts["warnings"]),
        )

    def speak(self, segments: Sequence[Segment], tts: Revox) -> Iterator[Segment]:
        """Speak segments together and keep them; gives each one when it is done.

        Raises RenderError for one that came out without a sound, after the others are kept.
        """
        silent = None
        lines = [
            Line(segment.text, self._voices[segment.voice.voice], self.settings_of(segment))
            for segment in segments
        ]
        for spoken in tts.speak_batch(lines):
            segment, samples = segments[spoken.number], spoken.audio.samples
            if not len(samples):
                silent = silent or segment
                continue
            level = Level.of(samples, spoken.audio.rate)
            found = [str(warning) for warning in spoken.warnings]
            facts = {"level": [str(level.loudness), str(level.peak)], "warnings": found}
            content = json.dumps(facts).encode() + b"\n" + samples.astype("<f4").tobytes()
            save_stamped(*self._place(segment, tts.weights), content)
            yield segment
        if silent is not None:
            raise RenderError(
                f"segment {silent.number} ({silent.where}) came out without a sound; "
                f"{no_sound_advice(self.settings_of(silent).takes)}"
            )

    def forget_others(self, script: Script, weights: str) -> None:
        """Delete the segments in the folder that this script does not have (any more)."""
        own = {self._place(segment, weights)[0] for segment in script.segments}
        for path in self._cache.glob(f"*{SUFFIX}"):
            if path not in own:
                path.unlink(missing_ok=True)

    def _place(self, segment: Segment, weights: str) -> tuple[Path, str]:
        """Where a segment is kept, and the stamp of everything that its sound depends on."""
        embedding = self._voices[segment.voice.voice].embedding
        voice = hashlib.sha256(embedding.float().numpy().tobytes()).hexdigest()
        stamp = stamp_of(
            __version__, self._identity, weights, voice, segment.text, asdict(self.settings_of(segment))
        )
        return self._cache / f"{stamp[:32]}{SUFFIX}", stamp


def _identity(folder: Path, adapter: Path | None) -> str:
    """A hash of what speaks in a checkpoint's folder: weights, vocabulary, an adapter. Voices come and go."""
    words = {key: value for key, value in read_json(folder / "tekken.json").items() if key != "audio"}
    files = [*sorted(weight_files(folder)), *([] if adapter is None else adapter_files(adapter))]
    return stamp_of([file_identity(path) for path in files], words)
