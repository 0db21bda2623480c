"""How many streams this machine speaks at once so that nobody's player runs dry.

A frame of everybody takes longer the more they are. As long as it takes less time than it lasts as sound, all
players are fed; one stream more than that, and all of them run dry. So who does not fit waits: a late
beginning is heard once, a gap again and again.
"""

from __future__ import annotations

WEIGHT = 0.1  # of the latest round in an average
STEADY = 0.85  # of real time: what is left over is for what a machine also does


class Pace:
    """Seconds that a round, one frame of everybody, takes by how many speak, as they were lately.

    `frame_seconds`: how long a frame lasts as sound.
    """

    def __init__(self, frame_seconds: float) -> None:
        self.frame_seconds = frame_seconds
        self._rounds: dict[int, float] = {}

    def observe(self, streams: int, seconds: float) -> None:
        """A round of so many streams took so long."""
        before = self._rounds.get(streams)
        self._rounds[streams] = seconds if before is None else before + WEIGHT * (seconds - before)

    def expected(self, streams: int) -> float | None:
        """Seconds that a round of so many would take; None before anything near was seen.

        From the next smaller number that was seen it grows with the number at most, for a part of a round is
        the same for all; and where so many were seen, they may have been seen on a busier day.
        """
        smaller = [n for n in self._rounds if n < streams]
        found = [self._rounds[n] * streams / n for n in ([max(smaller)] if smaller else [])]
        if streams in self._rounds:
            found.append(self._rounds[streams])
        return min(found, default=None)

    def holds(self, streams: int) -> bool:
        """Whether so many are spoken as fast as they are heard. True where nothing is known yet, and where
        not even one is: then nobody can be kept from running dry, and more at once are done sooner."""
        alone, together = min(self._rounds.values(), default=0.0), self.expected(streams)
        in_time = STEADY * self.frame_seconds
        return together is None or alone > in_time or together <= in_time

    def soon_dry(self, handed: float, since: float, streams: int) -> bool:
        """Whether a player who got `handed` seconds of sound, the first of them `since` seconds ago, runs dry
        unless it gets more within a round or two of so many streams."""
        return handed - since < 2 * (self.expected(streams) or 0.0)
