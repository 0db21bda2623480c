"""Stretches of one speaker, and how good each is to clone from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from revox.find.listen import Track
from revox.metrics.turns import Turn, voice_changes
from revox.speech.activity import HOP
from revox.speech.selection import speech_over_noise, stretch_score

GAP = 1.5  # seconds of silence after which a stretch does not go on
LEAST_SECONDS = 3.0  # what is shorter is of no use
_MARGIN = 10  # frames kept around the speech
_UNLIKE = 5.0  # cost of a cosine that is lower by 1
_STEADY = 0.86  # cosine of the voice before and after a pause, from which it is the same
_EDGE = 4.0  # seconds of speech on either side of a pause that are needed to tell
_NEARER = 0.02  # cosine by which a turn is nearer to another speaker


@dataclass(frozen=True, eq=False)
class TargetSpeaker:
    """What is looked for: the `speaker` of that number, a `voice` `[256]` to be like, a `band` of pitch in Hz
    or None, and clips of `shortest` to `longest` seconds."""

    speaker: int
    voice: np.ndarray
    band: tuple[float, float] | None
    shortest: float
    longest: float


@dataclass(frozen=True)
class Candidate:
    """A stretch of a source by 10 ms frames, `first` to `last` (exclusive), its score and what it is made of.

    `scores`: seconds_of_speech, share_of_speech, snr_db, pitch_hz (median), pitch_spread (semitones, half of
    the middle 68 %), in_band (share of the voiced frames), similarity (cosine), other_speaker (share of the
    speech that is nearer to another voice), steadiness (cosine before and after the pause where it is least).
    """

    source: int
    first: int
    last: int
    score: float
    scores: dict[str, float]

    @property
    def start(self) -> float:
        """Seconds."""
        return self.first * HOP

    @property
    def end(self) -> float:
        """Seconds."""
        return self.last * HOP

    def less(self, cost: float) -> Candidate:
        """The same with a score that is lower by `cost`."""
        return replace(self, score=self.score - cost)

    def overlaps(self, other: Candidate) -> bool:
        """Whether they have sound in common."""
        return self.source == other.source and self.first < other.last and other.first < self.last


def find_candidates(
    tracks: list[Track], turns: list[Turn], voices: np.ndarray, wanted: TargetSpeaker
) -> list[Candidate]:
    """The best stretches of the speaker, best first, none overlapping another.

    A stretch begins and ends at pauses and holds no turn of anybody else. Where none is as long as is wanted,
    the longest of each monologue is given, of 3 s or more. `voices` is `[speakers, 256]`.
    """
    found: list[Candidate] = []
    groups = _groups(turns, wanted.speaker)
    for shortest in (wanted.shortest, LEAST_SECONDS):
        for group in groups:
            own = [turns[i] for i in group]
            steady = voice_changes(own)
            cut_in = _touches(turns, group.start - 1), _touches(turns, group.stop - 1)
            for i, j in _spans(own, shortest, wanted.longest):
                if (i == 0 and cut_in[0]) or (j == len(own) - 1 and cut_in[1]):
                    continue  # it would begin or end where two people speak without a pause
                lead, tail = _room(turns, group[i], group[j])
                track, part = tracks[own[i].source], own[i : j + 1]
                first = max(0, own[i].first - lead)
                last = min(len(track.level), own[j].last + tail)
                scores = _sound(track, first, last, wanted.band) | _voice(part, steady[i:j], voices, wanted)
                found.append(Candidate(own[i].source, first, last, _score(scores), scores))
        if found:
            break
    best: list[Candidate] = []
    for one in sorted(found, key=lambda one: -one.score):
        if not any(one.overlaps(other) for other in best):
            best.append(one)
    return best


def _groups(turns: list[Turn], speaker: int) -> list[range]:
    """Turns of `speaker` that follow one another, by number."""
    groups: list[range] = []
    for i, turn in enumerate(turns):
        if turn.speaker != speaker:
            continue
        last = turns[i - 1] if i else turn
        goes_on = groups and groups[-1].stop == i and last.source == turn.source
        if goes_on and (turn.first - last.last) * HOP <= GAP:
            groups[-1] = range(groups[-1].start, i + 1)
        else:
            groups.append(range(i, i + 1))
    return groups


def _spans(group: list[Turn], shortest: float, longest: float) -> list[tuple[int, int]]:
    """First and last turns of all stretches of `shortest` to `longest` seconds."""
    found = []
    for i, begin in enumerate(group):
        for j in range(i, len(group)):
            seconds = (group[j].last - begin.first) * HOP
            if seconds > longest:
                break
            if seconds >= shortest:
                found.append((i, j))
    return found


def _touches(turns: list[Turn], i: int) -> bool:
    """Whether there is no pause between turns i and i + 1."""
    if not 0 <= i < len(turns) - 1 or turns[i].source != turns[i + 1].source:
        return False
    return turns[i + 1].first <= turns[i].last


def _room(turns: list[Turn], i: int, j: int) -> tuple[int, int]:
    """Frames kept before and after: no more than half of the pause to the neighboring turn."""
    lead = tail = _MARGIN
    if i and turns[i - 1].source == turns[i].source:
        lead = min(lead, (turns[i].first - turns[i - 1].last) // 2)
    if j + 1 < len(turns) and turns[j + 1].source == turns[j].source:
        tail = min(tail, (turns[j + 1].first - turns[j].last) // 2)
    return max(0, lead), max(0, tail)


def _sound(track: Track, first: int, last: int, band: tuple[float, float] | None) -> dict[str, float]:
    speaking, f0 = track.speaking[first:last], track.f0[first:last]
    voiced = f0[speaking & np.isfinite(f0)]
    low, high = np.percentile(voiced, (16, 84)) if voiced.size else (math.nan, math.nan)
    in_band = 1.0
    if band is not None:
        in_band = float(((voiced >= band[0]) & (voiced <= band[1])).mean()) if voiced.size else 0.0
    return {
        "seconds_of_speech": float(speaking.sum() * HOP),
        "share_of_speech": float(speaking.mean()),
        "snr_db": speech_over_noise(track.level[first:last], speaking),
        "pitch_hz": float(np.median(voiced)) if voiced.size else math.nan,
        "pitch_spread": float(6 * np.log2(high / low)),
        "in_band": in_band,
    }


def _voice(
    part: list[Turn], steady: np.ndarray, voices: np.ndarray, wanted: TargetSpeaker
) -> dict[str, float]:
    lengths = np.array([turn.seconds for turn in part])
    embeddings = np.stack([turn.embedding for turn in part])
    others = np.delete(voices, wanted.speaker, axis=0)
    foreign = np.zeros(len(part), dtype=bool)
    if len(others):
        own = embeddings @ voices[wanted.speaker]
        foreign = (embeddings @ others.T).max(axis=1) > own + _NEARER
    mean = lengths @ embeddings
    before = np.cumsum(lengths)[:-1]
    telling = (before >= _EDGE) & (lengths.sum() - before >= _EDGE)
    return {
        "similarity": float(mean @ wanted.voice / max(float(np.linalg.norm(mean)), 1e-9)),
        "other_speaker": float(lengths[foreign].sum() / lengths.sum()),
        "steadiness": float(steady[telling].min(initial=1.0)),
    }


def _score(scores: dict[str, float]) -> float:
    spoken, share, snr = (
        np.array([scores[name]]) for name in ("seconds_of_speech", "share_of_speech", "snr_db")
    )
    return float(
        stretch_score(spoken, share, snr, np.zeros(1))[0]
        - _UNLIKE * (1 - scores["similarity"])
        - _UNLIKE * max(0.0, _STEADY - scores["steadiness"])
        - 2 * scores["other_speaker"]
        - (1 - scores["in_band"])
    )
