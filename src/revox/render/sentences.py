"""When each sentence of a segment is spoken, from its length and the pauses in the sound."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from revox.synthesis.longform import SentenceTime, SpeechSettings
from revox.synthesis.normalize import normalize_text
from revox.synthesis.split import ends_in, expected_seconds

_WINDOW = 0.02  # seconds
_SILENT_BELOW = 10 ** (-35 / 20)  # of the level that 5 % of the windows pass
_SHORTEST_PAUSE = 0.08  # seconds
_LONGEST_COUNTED = 0.6
_PAUSE_WORTH = 2.0  # a second of pause is worth as much as this share of a sentence's deviation
_NO_PAUSE = 1.5
_DEVIATION, _LEAST_DEVIATION = 0.2, 0.3  # of the expected time since the start, and seconds


def sentences_of(text: str, settings: SpeechSettings) -> list[str]:
    """The sentences of a text, without its markup, as they are written."""
    how = "basic" if settings.text_normalization == "full" else settings.text_normalization
    found = []
    for stretch in normalize_text(text, how):
        ends = ends_in(stretch.text, "sentence", whole=True)
        bounds = [0, *ends, len(stretch.text)]
        parts = (stretch.text[first:last].strip() for first, last in itertools.pairwise(bounds))
        found += [" ".join(part.split()) for part in parts if any(map(str.isalnum, part))]
    return found


def sentence_times(sentences: Sequence[str], samples: np.ndarray, rate: int) -> list[SentenceTime]:
    """When each of the sentences spoken in `samples` (`[n]` at `rate` Hz) is said: an estimate.

    The sound between its first and its last word is shared out by how long reading each sentence takes; then
    each boundary moves into a pause near it, the longer the better, in order (dynamic programming). Between
    two sentences lies the pause.
    """
    if not sentences:
        return []
    runs, first, last = _pauses(samples, rate)
    sounding = (last - first) - sum(stop - start for start, stop in runs)
    shares = np.cumsum([expected_seconds(sentence) or 0.1 for sentence in sentences])
    expected = sounding * shares[:-1] / shares[-1]
    # A pause's place in the sound without pauses, where text and time run alike.
    silence = np.cumsum([0.0, *(stop - start for start, stop in runs)])
    places = np.array([start - first - before for (start, _), before in zip(runs, silence, strict=False)])
    chosen = _assign(expected, places, [stop - start for start, stop in runs], sounding)
    ends, starts = [], [first]
    for at, pause in zip(expected, chosen, strict=True):
        if pause is None:
            moment = first + at + float(silence[np.searchsorted(places, at)])
            ends.append(moment)
            starts.append(moment)
        else:
            ends.append(runs[pause][0])
            starts.append(runs[pause][1])
    ends.append(last)
    starts = [float(start) for start in np.maximum.accumulate(starts)]
    return [
        SentenceTime(text, start, max(start, float(end)))
        for text, start, end in zip(sentences, starts, ends, strict=True)
    ]


def _pauses(samples: np.ndarray, rate: int) -> tuple[list[tuple[float, float]], float, float]:
    """Start and end (seconds) of each pause inside, and of the sound."""
    window = max(1, int(_WINDOW * rate))
    count = len(samples) // window
    if not count:
        return [], 0.0, len(samples) / rate
    levels = np.sqrt(np.mean(np.square(samples[: count * window]).reshape(count, window), axis=1))
    sounding = np.flatnonzero(levels > _SILENT_BELOW * float(np.percentile(levels, 95)))
    if not len(sounding):
        return [], 0.0, len(samples) / rate
    seconds = window / rate
    gaps = [
        ((before + 1) * seconds, after * seconds)
        for before, after in itertools.pairwise(sounding)
        if (after - before - 1) * seconds >= _SHORTEST_PAUSE
    ]
    return gaps, sounding[0] * seconds, (sounding[-1] + 1) * seconds


def _assign(
    expected: np.ndarray, places: np.ndarray, lengths: Sequence[float], whole: float
) -> list[int | None]:
    """For each boundary the pause that it is in, in order; None where none is near."""
    deviation = np.maximum(_LEAST_DEVIATION, _DEVIATION * whole / (len(expected) + 1))
    worth = _PAUSE_WORTH * np.minimum(np.asarray(lengths), _LONGEST_COUNTED)
    # costs[j]: of the boundaries so far, with the pauses before j used up; ways: how.
    costs = np.zeros(len(places) + 1)
    ways: list[list[int | None]] = [[] for _ in range(len(places) + 1)]
    for at in expected:
        new_costs = costs + _NO_PAUSE
        new_ways: list[list[int | None]] = [[*way, None] for way in ways]
        for j in range(len(places)):
            cost = costs[j] + abs(places[j] - at) / deviation - worth[j]
            if cost < new_costs[j + 1]:
                new_costs[j + 1], new_ways[j + 1] = cost, [*ways[j], j]
            if new_costs[j] < new_costs[j + 1]:
                new_costs[j + 1], new_ways[j + 1] = new_costs[j], new_ways[j]
        costs, ways = new_costs, new_ways
    return ways[int(np.argmin(costs))] if len(expected) else []
