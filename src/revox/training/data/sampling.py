"""Draws in balance: a language, one of its speakers, one of their clips; the same for everybody who asks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from revox.training.data.errors import DataError
from revox.training.data.sources import Source
from revox.training.data.stream import ClipStream, StreamReader
from revox.training.data.table import Clip, ClipTable

BALANCE = {"language": 0.5, "speaker": 0.5}


@dataclass(frozen=True)
class Draw:
    """A clip, and where in it to cut: `place` in [0, 1) of what the cut leaves over.

    `data` is a streamed clip's file (or its path); elsewhere None, and the clip's key says where it lies.
    """

    clip: Clip
    place: float
    data: str | bytes | None = None


class ClipSampler:
    """An endless sequence of draws over `sources`, the same for the same clips, balance and seed.

    A language is drawn with a probability proportional to its number of clips to the power of
    `balance["language"]`, then one of its speakers in the same way, then any clip of theirs: 1 takes the
    data as they lie, 0 all alike (temperature sampling, arXiv 1901.07291, section 3.1). Clips of unknown
    language are a language. The draws come in rounds of as many as there are clips; in a round each clip is
    drawn as often as its share asks for, rounded up or down: at 1 and 1 each clip once, in random order.

    Of `world` samplers, number `rank` gets every `world`-th draw of one sequence. A stream has no such
    balance: with S sources every S-th draw is of a stream, in its own order, shuffled in blocks.

    Raises DataError when there is nothing to draw from.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        balance: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is none of {world} processes; give 0 to {world - 1}")
        self.sources, self.seed, self.rank, self.world = list(sources), seed, rank, world
        self.balance = {**BALANCE, **(balance or {})}
        if unknown := set(self.balance) - set(BALANCE):
            raise DataError(f"clips cannot be balanced by {sorted(unknown)[0]}; only by language and speaker")
        if not all(0 <= power <= 1 for power in self.balance.values()):
            raise DataError("a balance is a power from 0 (all alike) to 1 (as the data lie)")
        self._streams = [s.clips for s in sources if isinstance(s.clips, ClipStream)]
        self._tables = [
            _table(s.clips) for s in sources if not isinstance(s.clips, ClipStream) and len(s.clips)
        ]
        self._starts = np.cumsum([0, *map(len, self._tables)])
        self.size = int(self._starts[-1])
        if not self.size and not self._streams:
            raise DataError("there are no clips to draw from; name a folder of audio files")
        self._order, self._upto = _shares(self._tables, self.balance, seed)
        self._round = (-1, np.zeros(0, np.int64), 0.0, np.zeros(0))
        self.position = 0
        self._readers: list[StreamReader] = [s.reader(rank, world, seed) for s in self._streams]

    def __iter__(self) -> ClipSampler:
        return self

    def __next__(self) -> Draw:
        return self.draw()

    def draw(self) -> Draw:
        """The next draw."""
        n, pooled, all_of = self.position, len(self._tables), len(self._tables) + len(self._streams)
        self.position += 1
        within = n % all_of
        if within >= pooled:
            clip, data = self._readers[within - pooled].next()
            place = np.random.default_rng([self.seed, 1, self.rank, n]).random()
            return Draw(clip, float(place), data)
        number = ((n // all_of) * pooled + within) * self.world + self.rank
        row, place = self._pooled(number)
        table = int(np.searchsorted(self._starts, row, side="right")) - 1
        return Draw(self._tables[table][row - int(self._starts[table])], place)

    def _pooled(self, number: int) -> tuple[int, float]:
        """Row and place of a draw of the global sequence. A round lays `size` evenly spaced points, moved by
        one random offset, over the clips' shares, and takes them in random order.
        """
        which, i = divmod(number, self.size)
        if self._round[0] != which:
            rng = np.random.default_rng([self.seed, 0, which])
            self._round = (which, rng.permutation(self.size), rng.random(), rng.random(self.size))
        _, order, offset, places = self._round
        at = np.searchsorted(self._upto, (order[i] + offset) / self.size, side="right")
        return int(self._order[min(int(at), self.size - 1)]), float(places[i])

    def shares(self) -> np.ndarray:
        """The probability of each clip of the sources that are not streamed, float64 `[clips]`, in order."""
        share = np.empty(self.size)
        share[self._order] = np.diff(self._upto, prepend=0.0)
        return share

    def identity(self) -> str:
        """A hash of everything that decides the sequence but rank and position."""
        digest = hashlib.sha256(repr((self.seed, sorted(self.balance.items()))).encode())
        for table in self._tables:
            for part in (table.keys.blob, table.keys.ends, table.speaker, table.language):
                digest.update(np.ascontiguousarray(part).tobytes())
        for stream in self._streams:
            digest.update(stream.name.encode())
        return digest.hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands: numbers and strings only, a few hundred bytes without streams."""
        return {
            "position": self.position,
            "world": self.world,
            "of": self._identity_once(),
            "streams": [reader.state() for reader in self._readers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. With another number of processes the global sequence goes on from the same
        place, as nearly as it divides; streams begin anew then. Raises DataError for a state of other clips.
        """
        if state["of"] != self._identity_once():
            raise DataError(
                "the speech, its balance or the seed is not what the run began with; name the same sources "
                "as before, or start a new run"
            )
        self.position = int(state["position"])
        if state["world"] == self.world:
            for reader, saved in zip(self._readers, state["streams"], strict=True):
                reader.load(saved)
        else:
            self.position = self.position * int(state["world"]) // self.world

    def copy(self) -> ClipSampler:
        """Another sampler at the same place; the clips are shared."""
        other = object.__new__(ClipSampler)
        other.__dict__.update(self.__dict__)
        other._readers = [s.reader(self.rank, self.world, self.seed) for s in self._streams]
        other.load_state_dict(self.state_dict())
        return other

    def _identity_once(self) -> str:
        if "_identity" not in self.__dict__:
            self._identity = self.identity()
        return self._identity


def _table(clips: Sequence[Clip]) -> ClipTable:
    return clips if isinstance(clips, ClipTable) else ClipTable.of(clips)


def _shares(
    tables: Sequence[ClipTable], balance: Mapping[str, float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows grouped by language and speaker, shuffled within, and the running sum of their shares to 1."""
    size = sum(map(len, tables))
    if not size:
        return np.zeros(0, np.int64), np.zeros(0)
    speaker, language = _joined(tables, "speaker"), _joined(tables, "language")
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
    share = weight / np.bincount(where, weight)[where] * (of_language / of_language.sum())[where]
    upto = np.cumsum((share / clips)[group])
    return order, upto / upto[-1]


def _joined(tables: Sequence[ClipTable], column: str) -> np.ndarray:
    """A column of all tables as numbers into one list of names: who has one name is one speaker."""
    known: dict[str, int] = {}
    parts = []
    for table in tables:
        names = table.speakers if column == "speaker" else table.languages
        numbers = np.array([known.setdefault(name, len(known)) for name in names] + [-1], dtype=np.int64)
        parts.append(numbers[getattr(table, column)])
    return np.concatenate(parts)
