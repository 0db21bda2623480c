"""From recordings of any length to the best reference clips of one speaker, with the reasons."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from revox.find.candidates import Candidate, TargetSpeaker, find_candidates
from revox.find.errors import FindError
from revox.find.listen import SpeechDetector, Track, listen
from revox.find.subtitles import Monologue, read_monologues
from revox.metrics.speaker import SpeakerVerifier
from revox.metrics.turns import Turn, find_turns
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import audio_header
from revox.speech.activity import HOP

LISTENING = "listening"
"""`Progress.what`; `done` and `total` are seconds of the recordings."""
_LOOSE = 0.3  # seconds by which a subtitle's times may be off
_UNLIKE = 0.70  # cosine with the clip under which the speaker may be another one

Media = str | os.PathLike[str]


@dataclass(frozen=True)
class FindRequest:
    """What to look for in `media`.

    `subtitles`: a file for each of the media, or none. `like`: a clip of the speaker. `pitch`: the band (Hz)
    of the speaker's median. Without both it is whoever speaks most. `seconds`: how long a clip may be, least
    and most. `most`: how many clips are wanted.
    """

    media: Sequence[Media]
    subtitles: Sequence[Media] = ()
    like: Media | None = None
    pitch: tuple[float, float] | None = None
    seconds: tuple[float, float] = (10.0, 40.0)
    most: int = 5

    def __post_init__(self) -> None:
        if not self.media:
            raise FindError("no recording was given; give at least one")
        if self.subtitles and len(self.subtitles) != len(self.media):
            raise FindError(
                f"{len(self.subtitles)} files of subtitles were given for {len(self.media)} recordings; give "
                "one for each, in the same order"
            )
        if not 3 <= self.seconds[0] <= self.seconds[1] <= 120:
            raise FindError(f"{_range(self.seconds)} s is out of range; give 3 s or more and at most 120 s")
        if self.pitch and not 50 <= self.pitch[0] < self.pitch[1] <= 600:
            raise FindError(f"{_range(self.pitch)} Hz is out of range; give 50 to 600 Hz")


@dataclass(frozen=True, eq=False)
class FoundSpeaker:
    """One who speaks in the recordings: `number` as in the turns, how long, and the median pitch in Hz."""

    number: int
    seconds: float
    pitch: float


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found: the stretches of `chosen`, best first, and the whole analysis.

    `notes` are sentences about the choice of speaker.
    """

    request: FindRequest
    tracks: list[Track]
    turns: list[Turn]
    speakers: list[FoundSpeaker]
    chosen: int
    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)


def find_references(request: FindRequest, progress: ProgressCallback = ignore_progress) -> Findings:
    """The best stretches of one speaker in recordings of any length, read as streams.

    Memory grows by 0.1 GB an hour of recording. Raises FindError where nothing can be found, AudioError for
    files that cannot be read, MetricError without the speaker-verification model.
    """
    monologues = [read_monologues(path) for path in request.subtitles]
    verifier, detector = SpeakerVerifier(), SpeechDetector()
    like = None if request.like is None else _voice_of(request.like, detector, verifier)
    tracks = _listen_to_all(request.media, detector, verifier, progress)
    for track, cues in zip(tracks, monologues, strict=False):
        _keep_subtitled(track, cues)
    turns, voices = find_turns(verifier, [(track.frames, track.speaking) for track in tracks])
    if not turns:
        raise FindError("no speech was found; check that the recordings and the subtitles belong together")
    speakers = [_speaker(tracks, turns, number) for number in range(len(voices))]
    chosen, notes = _choose(request, speakers, voices, like)
    wanted = TargetSpeaker(chosen, voices[chosen] if like is None else like, request.pitch, *request.seconds)
    candidates = find_candidates(tracks, turns, voices, wanted)
    if not candidates:
        raise FindError(
            f"the speaker never speaks for 3 s without another ({speakers[chosen].seconds:.0f} s in all); "
            "give a recording in which they speak longer"
        )
    return Findings(request, tracks, turns, speakers, chosen, candidates, notes)


def _voice_of(clip: Media, detector: SpeechDetector, verifier: SpeakerVerifier) -> np.ndarray:
    """The voice `[256]` of whoever speaks most in a clip."""
    track = listen(clip, detector, verifier, lambda _: None)
    turns, voices = find_turns(verifier, [(track.frames, track.speaking)])
    if not turns:
        raise FindError(f"no speech was found in {Path(clip).name}; give another clip of the speaker")
    return voices[0]


def _listen_to_all(
    media: Sequence[Media], detector: SpeechDetector, verifier: SpeakerVerifier, progress: ProgressCallback
) -> list[Track]:
    lengths = [audio_header(one)[0] for one in media]
    total = None if None in lengths else math.fsum(length or 0.0 for length in lengths)
    tracks: list[Track] = []
    for one in media:
        before = math.fsum(track.seconds for track in tracks)

        def tell(seconds: float, before: float = before, name: str = Path(one).name) -> None:
            progress(Progress(LISTENING, before + seconds, total, {"file": name}))

        tracks.append(listen(one, detector, verifier, tell))
    return tracks


def _keep_subtitled(track: Track, monologues: list[Monologue]) -> None:
    """Only what has subtitles counts as speech, and each monologue ends with a pause."""
    inside = np.zeros(len(track.speaking), dtype=bool)
    for i, one in enumerate(monologues):
        earlier = monologues[i - 1].end if i else -math.inf
        first = max(one.start - _LOOSE, min((earlier + one.start) / 2, one.start))
        inside[max(0, round(first / HOP)) : max(0, round((one.end + _LOOSE) / HOP))] = True
    track.speaking[~inside] = False


def _speaker(tracks: list[Track], turns: list[Turn], number: int) -> FoundSpeaker:
    own = [turn for turn in turns if turn.speaker == number]
    f0 = np.concatenate([tracks[turn.source].f0[turn.first : turn.last] for turn in own])
    voiced = f0[np.isfinite(f0)]
    pitch = float(np.median(voiced)) if voiced.size else math.nan
    return FoundSpeaker(number, math.fsum(turn.seconds for turn in own), pitch)


def _choose(
    request: FindRequest, speakers: list[FoundSpeaker], voices: np.ndarray, like: np.ndarray | None
) -> tuple[int, list[str]]:
    """The speaker who is meant, and sentences about the choice."""
    numbers = [one.number for one in speakers]
    notes: list[str] = []
    if request.pitch is not None:
        low, high = request.pitch
        numbers = [one.number for one in speakers if low <= one.pitch <= high]
        if not numbers:
            others = ", ".join(f"{one.pitch:.0f} Hz ({one.seconds:.0f} s)" for one in speakers[:5])
            raise FindError(
                f"nobody's median pitch lies between {_range(request.pitch)} Hz; it is {others}: give a band "
                "around one of these"
            )
    if like is None:
        return numbers[0], notes  # speakers are in the order of how long they speak
    similar = voices @ like
    best = max(numbers, key=lambda number: float(similar[number]))
    if similar[best] < _UNLIKE:
        notes.append(
            f"The nearest speaker is not very much like the clip (similarity {similar[best]:.2f}); check by "
            "ear that it is the same person."
        )
    return best, notes


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:g}-{pair[1]:g}"
