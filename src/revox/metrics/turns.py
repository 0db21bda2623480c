"""Who speaks when: speech cut at pauses and at changes of voice, and its pieces grouped into speakers.

A voice is a window of 1.6 s as the speaker-verification model embeds it (GE2E, arXiv 1710.10467). Pieces are
grouped by average linkage of their cosines; a path through the groups that pays for each change (Viterbi)
then puts short pieces, whose embeddings are vague, with their neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from revox.metrics.speaker import WINDOW, SpeakerVerifier, VoiceFrames
from revox.speech.activity import HOP, runs

PAUSE = 0.12  # seconds that end a piece
_STEP = 40  # frames between windows
_SURE = 120  # frames from which a piece may found a speaker
_MOST = 3000  # pieces that are grouped, the longest; others go to the nearest group
_SAME = 0.74  # cosine of two groups from which they are one speaker
_CHANGED = 0.62  # cosine of the 1.6 s before and after, under which the voice has changed
_FLOOR = 0.1  # by which cosines around the least one may be higher
_SWITCH = 0.12  # cost of a change of speaker, in seconds of speech times cosine


@dataclass(frozen=True, eq=False)
class Turn:
    """A piece of speech without a pause: 10 ms frames from `first` to `last` (exclusive) of a `source`.

    `embedding` `[256]` is its voice, a unit vector, and `speaker` the number of its group, 0 for whoever
    speaks most.
    """

    source: int
    first: int
    last: int
    embedding: np.ndarray
    speaker: int = -1

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return (self.last - self.first) * HOP


def find_turns(
    verifier: SpeakerVerifier, sources: list[tuple[VoiceFrames, np.ndarray]]
) -> tuple[list[Turn], np.ndarray]:
    """The pieces of speech of each source, in order, by speaker; and the speakers' voices `[speakers, 256]`.

    `sources` are frames and where somebody speaks in them (bool `[frames]`). The same voice in two sources is
    one speaker.
    """
    pieces = []
    for number, (frames, speaking) in enumerate(sources):
        for first, last in _islands(speaking):
            pieces += _split(verifier, frames, number, first, last)
    if not pieces:
        return [], np.zeros((0, 256), np.float32)
    centers = _speakers(pieces)
    labels = _path(pieces, centers)
    seconds = np.bincount(labels, [piece.seconds for piece in pieces], len(centers))
    order = [int(k) for k in np.argsort(-seconds) if seconds[k] > 0]
    place = {k: i for i, k in enumerate(order)}
    turns = [
        Turn(piece.source, piece.first, piece.last, piece.embedding, place[int(k)])
        for piece, k in zip(pieces, labels, strict=True)
    ]
    voices = np.stack([mean_voice([turn for turn in turns if turn.speaker == i]) for i in range(len(order))])
    return turns, voices


def mean_voice(turns: list[Turn]) -> np.ndarray:
    """The voice of several pieces, weighted by their length, as a unit vector."""
    total = np.sum([turn.embedding * turn.seconds for turn in turns], axis=0)
    return total / max(float(np.linalg.norm(total)), 1e-9)


def voice_changes(turns: list[Turn], seconds: float = 6.0) -> np.ndarray:
    """How much alike the voice is before and after each of the pauses between `turns`, `[turns - 1]`.

    Cosines of up to `seconds` of speech on either side: of one speaker 0.93 on average, and over 0.85.
    """
    lengths = np.array([turn.seconds for turn in turns])
    ends = np.cumsum(lengths)
    weighted = np.stack([turn.embedding for turn in turns]) * lengths[:, None]
    sums = np.concatenate([np.zeros((1, weighted.shape[1])), np.cumsum(weighted, axis=0)])
    found = []
    for i in range(1, len(turns)):
        a = int(np.searchsorted(ends, ends[i - 1] - seconds))
        b = min(len(turns), int(np.searchsorted(ends, ends[i - 1] + seconds)) + 1)
        left, right = sums[i] - sums[a], sums[b] - sums[i]
        found.append(float(left @ right) / max(float(np.linalg.norm(left) * np.linalg.norm(right)), 1e-9))
    return np.array(found)


def _islands(speaking: np.ndarray) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for first, last in runs(speaking):
        if found and (first - found[-1][1]) * HOP < PAUSE:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


def _split(verifier: SpeakerVerifier, frames: VoiceFrames, source: int, first: int, last: int) -> list[Turn]:
    """A stretch without a pause as one piece, or as several where the voice changes within it."""
    starts = _window_starts(first, last)
    windows = verifier.embed_windows(frames, starts, last)
    cuts = [first]
    apart = round(WINDOW / _STEP)
    if len(starts) > apart:
        similar = np.sum(windows[:-apart] * windows[apart:], axis=1)
        while similar.min(initial=1.0) < _CHANGED:
            k = int(similar.argmin())
            # The model hears the end of a window most, so that the least cosine has a floor: its middle.
            floor = next(r for r in runs(similar < similar[k] + _FLOOR) if r[0] <= k < r[1])
            at = int(starts[(floor[0] + floor[1] - 1) // 2 + apart])
            near = frames.power[at - 15 : at + 15]
            cuts.append(at - 15 + _quietest(near))
            similar[max(0, k - apart) : k + apart + 1] = 1.0
    pieces = []
    for a, b in pairwise([*sorted(cuts), last]):
        inside = (starts >= a) & (starts + WINDOW <= b)
        own = windows[inside] if inside.any() else verifier.embed_windows(frames, _window_starts(a, b), b)
        mean = own.mean(axis=0)
        pieces.append(Turn(source, a, b, mean / max(float(np.linalg.norm(mean)), 1e-9)))
    return pieces


def _quietest(power: np.ndarray) -> int:
    """The middle of the quietest five frames of `power` `[frames]`; of fewer, the middle."""
    if len(power) < 5:
        return len(power) // 2
    return int(np.convolve(power, np.ones(5), "valid").argmin()) + 2


def _window_starts(first: int, last: int) -> np.ndarray:
    """First frames of windows that cover a stretch and stay inside it, where it is long enough."""
    room = max(0, last - first - WINDOW)
    return first + np.round(np.linspace(0, room, -(-room // _STEP) + 1)).astype(int)


def _speakers(pieces: list[Turn]) -> np.ndarray:
    """Voices of the groups of pieces, unit vectors `[speakers, 256]`."""
    from scipy.cluster.hierarchy import fcluster, linkage

    longest = sorted(pieces, key=lambda piece: -piece.seconds)[:_MOST]
    sure = [piece for piece in longest if piece.last - piece.first >= _SURE] or longest[:1]
    if len(sure) == 1:
        return sure[0].embedding[None]
    tree = linkage(np.stack([piece.embedding for piece in sure]).astype(np.float64), "average", "cosine")
    labels = fcluster(tree, 1 - _SAME, "distance")
    groups = [[p for p, k in zip(sure, labels, strict=True) if k == label] for label in np.unique(labels)]
    return np.stack([mean_voice(group) for group in groups])


def _path(pieces: list[Turn], centers: np.ndarray) -> np.ndarray:
    """The speaker of each piece: the sequence that fits best with a price on each change."""
    labels = np.zeros(len(pieces), dtype=int)
    order = range(len(pieces))
    for source in {piece.source for piece in pieces}:
        own = [i for i in order if pieces[i].source == source]
        fit = np.stack([centers @ pieces[i].embedding * min(pieces[i].seconds, 3.0) for i in own])
        best, back = fit[0], np.zeros(fit.shape, dtype=int)
        for i in range(1, len(own)):
            changed = int(best.argmax())
            stay = best >= best[changed] - _SWITCH
            back[i] = np.where(stay, np.arange(len(centers)), changed)
            best = np.where(stay, best, best[changed] - _SWITCH) + fit[i]
        k = int(best.argmax())
        for i in range(len(own) - 1, -1, -1):
            labels[own[i]] = k
            k = int(back[i][k])
    return labels
