"""A script -> one file: segments spoken or found on disk, placed, leveled, joined, with music under them.

Two passes. The first speaks what is not on disk yet and measures; the second reads one segment at a time, so
that memory does not grow with the script.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from revox.api import Revox
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.render.captions import Cue
from revox.render.errors import RenderError
from revox.render.levels import Level, common_target, leveled
from revox.render.music import MusicBed, mixed
from revox.render.script import Script, Segment
from revox.render.segments import SegmentSpeaker, SpokenSegment
from revox.render.sentences import sentence_times, sentences_of
from revox.speech import Audio, loudness
from revox.speech.write import Chapter
from revox.synthesis.longform import SentenceTime, SpeechSettings, faded

LOUDNESS = -19.0
"""LUFS of one channel, which on two loudspeakers is as loud as -16 LUFS in stereo."""
CEILING = -1.5  # dBTP
MAX_CHARS = 450
"""About 30 s: longer turns are spoken in pieces."""
_EDGE = 0.005  # seconds of the fades at a segment's ends
_MOST_MUSIC = 0.5  # share of the ceiling that music under speech may take


@dataclass(frozen=True)
class RenderSettings:
    """loudness: the target of every segment, LUFS; None is the script's, or else -19.

    ceiling: of true peaks, dBTP. speech: how all is spoken. cache: the folder of spoken segments. own_cache:
    nothing else uses it, so what is not needed goes.
    """

    cache: Path
    own_cache: bool = False
    loudness: float | None = None
    ceiling: float = CEILING
    speech: SpeechSettings = field(default_factory=lambda: SpeechSettings(max_chars=MAX_CHARS))

    def __post_init__(self) -> None:
        if self.loudness is not None and not -40 <= self.loudness <= -10:
            raise RenderError(f"a loudness of {self.loudness:g} LUFS is out of range; give -40 to -10")
        if not -24 <= self.ceiling <= 0:
            raise RenderError(f"a ceiling of {self.ceiling:g} dBTP is out of range; give -24 to 0")


@dataclass
class PlacedSegment:
    """A segment in the file: samples from `start` to `end`, and its level as spoken.

    limited: dB that the limiter took from its peaks; loudness: in the file, LUFS. Both are known once the
    file is written.
    """

    segment: Segment
    start: int
    end: int
    level: Level
    sentences: list[SentenceTime]
    warnings: tuple[str, ...]
    cached: bool
    limited: float = 0.0
    loudness: float = math.nan


class Rendering:
    """A script that has been spoken; `parts` gives its sound.

    target: the loudness that segments have, LUFS, which may be lower than what was asked for.
    """

    def __init__(
        self,
        script: Script,
        settings: RenderSettings,
        placed: list[PlacedSegment],
        rate: int,
        bed: MusicBed | None,
        load: Callable[[Segment], SpokenSegment | None],
    ) -> None:
        self.script, self.settings, self.placed = script, settings, placed
        self.rate, self._load, self._bed = rate, load, bed
        self.length = placed[-1].end + (round(bed.music.tail * self.rate) if bed else 0)
        self._ceiling = _speech_ceiling(settings.ceiling, bed)
        wishes = (settings.loudness, script.loudness, LOUDNESS)
        self.asked = asked = next(wish for wish in wishes if wish is not None)
        self.target = common_target((one.level for one in placed), asked, self._ceiling)

    @property
    def seconds(self) -> float:
        """The whole file's."""
        return self.length / self.rate

    def parts(self) -> Iterator[Audio]:
        """The sound, a segment or a gap at a time; mono."""
        speech = self._speech()
        if self._bed is None:
            return speech
        return mixed(speech, [(one.start, one.end) for one in self.placed], self.length, self._bed)

    def _speech(self) -> Iterator[Audio]:
        at = 0
        for one in self.placed:
            yield from self._silence(one.start - at)
            spoken = _found(self._load(one.segment), one.segment, self.settings)
            samples, one.limited = leveled(spoken.samples, self.rate, one.level, self.target, self._ceiling)
            one.loudness = loudness(samples, self.rate)
            edge = round(_EDGE * self.rate)
            yield Audio(faded(faded(samples, edge), edge, start=True), self.rate)
            at = one.end
        yield from self._silence(self.length - at)

    def _silence(self, samples: int) -> Iterator[Audio]:
        for start in range(0, samples, self.rate):
            yield Audio(np.zeros(min(self.rate, samples - start), np.float32), self.rate)

    @property
    def cues(self) -> list[Cue]:
        """Every sentence with its speaker and its time in the file."""
        found = []
        for one in self.placed:
            offset, speaker = one.start / self.rate, one.segment.speaker
            found += [Cue(offset + s.start, offset + s.end, speaker, s.text) for s in one.sentences]
        return found

    @property
    def chapters(self) -> list[Chapter]:
        """Chapters, each until the next."""
        named = [one for one in self.placed if one.segment.chapter]
        starts = [one.start / self.rate for one in named]
        return [
            Chapter(start, end, one.segment.chapter or "")
            for one, start, end in zip(named, starts, [*starts[1:], self.seconds], strict=False)
        ]

    @property
    def speakers(self) -> list[str]:
        """Who speaks, in order of appearance."""
        return list(dict.fromkeys(one.segment.speaker for one in self.placed))

    def report(self) -> dict[str, Any]:
        """Everything about the file as plain JSON values, once `parts` are written."""
        return {
            "format": "revox render 1",
            "title": self.script.title,
            "seconds": round(self.seconds, 3),
            "loudness_asked": self.asked,
            "loudness": round(self.target, 2),
            "ceiling": self.settings.ceiling,
            "chapters": [{"start_s": round(one.start, 3), "title": one.title} for one in self.chapters],
            "segments": [self._entry(one) for one in self.placed],
        }

    def _entry(self, one: PlacedSegment) -> dict[str, Any]:
        return {
            "number": one.segment.number,
            "where": one.segment.where,
            "speaker": one.segment.speaker,
            "voice": one.segment.voice.voice,
            "start_s": round(one.start / self.rate, 3),
            "end_s": round(one.end / self.rate, 3),
            "spoken_loudness": _figure(one.level.loudness),
            "loudness": _figure(one.loudness),
            "limited_db": round(one.limited, 2),
            "cached": one.cached,
            "warnings": list(one.warnings),
        }

    def loudness_of_speakers(self) -> dict[str, tuple[float, float]]:
        """Of each speaker the lowest and the highest loudness of a segment in the file, LUFS."""
        found: dict[str, list[float]] = defaultdict(list)
        for one in self.placed:
            if math.isfinite(one.loudness):
                found[one.segment.speaker].append(one.loudness)
        return {speaker: (min(values), max(values)) for speaker, values in found.items()}


def render(
    tts: Revox,
    script: Script,
    settings: RenderSettings,
    progress: ProgressCallback = ignore_progress,
) -> Rendering:
    """Speak a script with a checkpoint; what is in the cache is not spoken again.

    Segments that are missing are spoken together, as by `Revox.speak_batch`; interrupted, it goes on with
    those that are missing then. tts: may be loaded lazily; its network is needed only where something is.

    Raises RenderError for what cannot be rendered, VoiceError for a voice that is not there, AudioError for
    music that cannot be read.
    """
    speaker = SegmentSpeaker(tts.folder, script, settings.speech, settings.cache, tts.adapter)
    rate, music = speaker.rate, script.music
    bed = None if music is None else MusicBed.of(music, rate, settings.ceiling)
    _speech_ceiling(settings.ceiling, bed)  # music that is too loud is found before anything is spoken
    total = len(script.segments)
    missing = [one for one in script.segments if speaker.stored(one, tts.weights) is None]
    for done, _ in enumerate(speaker.speak(missing, tts) if missing else (), total - len(missing) + 1):
        progress(Progress("segments", done, total))
    new = {one.number for one in missing}
    placed: list[PlacedSegment] = []
    at = round(music.lead * rate) if music else 0
    for segment in script.segments:
        spoken = _found(speaker.stored(segment, tts.weights), segment, settings)
        sentences = sentences_of(segment.text, speaker.settings_of(segment))
        times = sentence_times(sentences, spoken.samples, rate)
        end = at + len(spoken.samples)
        cached = segment.number not in new
        placed.append(PlacedSegment(segment, at, end, spoken.level, times, spoken.warnings, cached))
        at = end + round((script.gap if segment.pause is None else segment.pause) * rate)
    if settings.own_cache:
        speaker.forget_others(script, tts.weights)
    return Rendering(
        script, settings, placed, rate, bed, lambda segment: speaker.stored(segment, tts.weights)
    )


def _found(spoken: SpokenSegment | None, segment: Segment, settings: RenderSettings) -> SpokenSegment:
    if spoken is None:
        raise RenderError(
            f"{settings.cache} lost segment {segment.number} while the file was written; run the command "
            "again"
        )
    return spoken


def _speech_ceiling(ceiling: float, bed: MusicBed | None) -> float:
    """dBTP that speech may reach, so that with the music under it all stays under `ceiling`."""
    if bed is None:
        return ceiling
    room = 10 ** (ceiling / 20)
    if bed.ducked_peak > _MOST_MUSIC * room:
        raise RenderError("the music would leave speech no room; give it a lower loudness or a larger duck")
    return 20 * math.log10(room - bed.ducked_peak)


def _figure(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None
