"""Balanced draws: a language, one of its speakers, one of their clips; in batches of similar length.

lhotse's `CutSet.mux` balances by one stream a group; with 5,000 speakers a draw takes it 6 ms and its
state is lost, so the draws are ours and their order within a block is `DynamicBucketingSampler`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from revox.training.data.errors import DataError
from revox.training.data.manifest import Manifest
from revox.training.data.sources import SpeechSource
from revox.training.errors import library

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

BALANCE = {"language": 0.5, "speaker": 0.5}
BLOCK = 512  # draws that are sorted into buckets together: what a resumed run draws again, at most
_BUCKETS = 4


class ClipSampler:
    """An endless sequence of cuts of at most `seconds`, the same for the same clips, balance and seed.

    A language is drawn with a probability proportional to its number of clips to the power of
    `balance["language"]`, then one of its speakers in the same way, then any of their clips: 1 is the data
    as they are, 0 uniform (temperature sampling, arXiv 1901.07291, section 3.1). Clips of unknown language
    count as a language. In a round of as many draws as there are clips, each clip is drawn as often as its
    probability asks for, rounded up or down: at 1 and 1 each clip once, in random order.

    A clip that is longer than `seconds` is cut at a random place. Blocks of draws are put in an order in
    which `batch` neighbors have similar lengths. Of `world` samplers, number `rank` gets every `world`-th
    draw.

    Raises DataError when there is nothing to draw from.
    """

    def __init__(
        self,
        sources: Sequence[SpeechSource],
        *,
        seconds: float,
        batch: int,
        balance: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is not one of {world} processes; give 0 to {world - 1}")
        if batch < 1 or seconds <= 0:
            raise DataError("a batch needs at least one clip, and clips need a length above 0")
        self.seconds, self.batch, self.seed, self.rank, self.world = seconds, batch, seed, rank, world
        self.balance = {**BALANCE, **(balance or {})}
        if unknown := set(self.balance) - set(BALANCE):
            raise DataError(f"clips cannot be balanced by {sorted(unknown)[0]}; only by language and speaker")
        if not all(0 <= power <= 1 for power in self.balance.values()):
            raise DataError("a balance is a power from 0 (uniform) to 1 (the data as they are)")
        self._manifests = [source.cuts for source in sources if len(source.cuts)]
        self._starts = np.cumsum([0, *map(len, self._manifests)])
        self.size = int(self._starts[-1])
        if not self.size:
            raise DataError("there are no clips to draw from; give a folder of audio files")
        self._order, self._cumulative = _probabilities(self._manifests, self.balance, seed)
        self._round = (-1, np.zeros(0, np.int64), 0.0, np.zeros(0))
        self._identity = self._hash()
        self._number, self._place = 0, 0  # of the block, and of the next cut in it
        self._block: list[MonoCut] | None = None

    def __iter__(self) -> ClipSampler:
        return self

    def __next__(self) -> MonoCut:
        """The next cut. `custom["place"]` (0 to 1) is where it was cut from what is left over."""
        if self._block is None:
            self._block = self._filled()
        cut = self._block[self._place]
        self._place += 1
        if self._place == len(self._block):
            self._number, self._place, self._block = self._number + 1, 0, None
        return cut

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence is: numbers and a string, ready for JSON."""
        return {
            "block": self._number,
            "place": self._place,
            "world": self.world,
            "identity": self._identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`: the block is drawn again, and what was used of it is skipped.

        With another number of processes, the next whole block that none of them has used is continued with.
        Raises DataError for a state of other clips.
        """
        if state.get("identity") != self._identity:  # states of revox 0.1 have none
            raise DataError(
                "the speech, its balance or the seed differs from what the run began with; name the same "
                "sources as before, or start a new run"
            )
        self._number, self._place, self._block = int(state["block"]), int(state["place"]), None
        if state["world"] != self.world:
            used = (self._number + bool(self._place)) * int(state["world"])
            self._number, self._place = -(-used // self.world), 0

    def _filled(self) -> list[MonoCut]:
        """The block's draws, in the order of lhotse's bucketing sampler."""
        sampler = library("lhotse.dataset").DynamicBucketingSampler(
            [self._draw(self._number * BLOCK + i) for i in range(BLOCK)],
            max_cuts=self.batch,
            duration_bins=[self.seconds * k / _BUCKETS for k in range(1, _BUCKETS)],
            shuffle=True,
            buffer_size=BLOCK,
            seed=self.seed,
            rank=0,
            world_size=1,
        )
        sampler.set_epoch(self._number)
        batches = list(sampler)
        # lhotse draws from all buckets alike until one is empty, so rare lengths would come first.
        np.random.default_rng([self.seed, 4, self._number]).shuffle(batches)
        batches.sort(key=lambda cuts: len(cuts) < self.batch)  # incomplete ones last
        return [cut for cuts in batches for cut in cuts]

    def _draw(self, n: int) -> MonoCut:
        """Draw number `n` of this process."""
        row, place = self._pooled(n * self.world + self.rank)
        manifest = int(np.searchsorted(self._starts, row, side="right")) - 1
        cut = self._manifests[manifest][row - int(self._starts[manifest])]
        length = cut.duration or self.seconds  # 0: unknown
        cut.start = place * max(0.0, length - self.seconds)
        cut.duration = min(length, self.seconds)
        cut.custom = {**(cut.custom or {}), "place": place}
        return cut

    def _pooled(self, number: int) -> tuple[int, float]:
        """Row and place of a draw of the global sequence. A round lays `size` evenly spaced points, moved by
        one random offset, over the clips' probabilities, and takes them in random order.
        """
        which, i = divmod(number, self.size)
        if self._round[0] != which:
            rng = np.random.default_rng([self.seed, 0, which])
            self._round = (which, rng.permutation(self.size), rng.random(), rng.random(self.size))
        _, order, offset, places = self._round
        at = np.searchsorted(self._cumulative, (order[i] + offset) / self.size, side="right")
        return int(self._order[min(int(at), self.size - 1)]), float(places[i])

    def _hash(self) -> str:
        """Of everything that decides the sequence but rank and position."""
        # The empty list stands for the streams that sources could once be: states saved since then go on.
        settings = (self.seed, sorted(self.balance.items()), self.seconds, self.batch, list[str]())
        digest = hashlib.sha256(repr(settings).encode())
        for manifest in self._manifests:
            for column in ("id", "speaker", "language"):
                digest.update(np.ascontiguousarray(manifest.rows[column]).tobytes())
        return digest.hexdigest()[:16]


def _probabilities(
    manifests: Sequence[Manifest], balance: Mapping[str, float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Clips grouped by language and speaker, shuffled within, and the running sum of their probabilities."""
    size = sum(map(len, manifests))
    speaker, language = _joined(manifests, "speaker"), _joined(manifests, "language")
    shuffled = np.random.default_rng([seed, 2]).permutation(size)
    order = shuffled[np.lexsort((speaker[shuffled], language[shuffled]))]
    language, speaker = language[order], speaker[order]
    # One group for each speaker of a language, in order; a language is a stretch of groups.
    first = np.r_[True, (np.diff(language) != 0) | (np.diff(speaker) != 0)]
    group = np.cumsum(first) - 1
    clips = np.bincount(group)
    language_of = language[first]
    weight = clips.astype(np.float64) ** balance["speaker"]
    _, where = np.unique(language_of, return_inverse=True)
    of_language = np.bincount(where, clips) ** balance["language"]
    probability = weight / np.bincount(where, weight)[where] * (of_language / of_language.sum())[where]
    cumulative = np.cumsum((probability / clips)[group])
    return order, cumulative / cumulative[-1]


def _joined(manifests: Sequence[Manifest], column: str) -> np.ndarray:
    """Speakers or languages of all manifests as numbers: equal names are one speaker, wherever they are."""
    known: dict[str, int] = {}
    parts = []
    for manifest in manifests:
        names = manifest.speakers if column == "speaker" else manifest.languages
        numbers = np.array([known.setdefault(name, len(known)) for name in names] + [-1], dtype=np.int64)
        parts.append(numbers[manifest.rows[column]])
    return np.concatenate(parts)
