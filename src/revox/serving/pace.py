"""How many streams this machine speaks at once so that nobody's player runs dry.

A frame of everybody takes longer the more they are. As long as it takes less time than it lasts as sound, all
players are fed; one stream more than that, and all of them run dry. So who does not fit waits: a late
beginning is heard once, a gap again and again.

How much longer one more makes it depends on the machine (on a GPU hardly at all), so it is tried, one at a
time, and what was too many is remembered for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable

WEIGHT = 0.1  # of the latest round in an average
STEADY = 0.85  # of real time: what is left over is for what a machine also does
REMEMBERED = 30.0  # seconds for which too many are not tried again


class Pace:
    """Seconds that a round, one frame of everybody, takes by how many speak, as they were lately.

    `frame_seconds`: how long a frame lasts as sound. `clock`: seconds.
    """

    def __init__(self, frame_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.frame_seconds, self.clock = frame_seconds, clock
        self._rounds: dict[int, tuple[float, float]] = {}  # streams: average, when it was last seen

    def observe(self, streams: int, seconds: float, joined: bool = False) -> None:
        """A round of so many streams took so long. Where somebody `joined` in it, a prompt was read too: it
        counts among other rounds, and tells nothing alone."""
        if joined and streams not in self._rounds:
            return
        before, _ = self._rounds.get(streams, (seconds, 0.0))
        self._rounds[streams] = (before + WEIGHT * (seconds - before), self.clock())

    def expected(self, streams: int) -> float | None:
        """Seconds that a round of so many takes, or, where those were not seen, one of the most below them;
        None where neither was."""
        seen = max((n for n in self._rounds if n <= streams), default=None)
        return None if seen is None else self._rounds[seen][0]

    def holds(self, streams: int, speed: float = 1.0) -> bool:
        """Whether so many may be spoken at once: one less are spoken in time, and so many were not too slow
        within the last `REMEMBERED` seconds. `speed`: of the one who is heard fastest.

        True where nothing is known yet, and where nobody is spoken in time however few they are: then more at
        once are done sooner.
        """
        in_time = STEADY * self.frame_seconds / speed
        if all(seconds > in_time for seconds, _ in self._rounds.values()):
            return True
        seconds, seen = self._rounds.get(streams, (0.0, 0.0))
        if seconds > in_time and self.clock() - seen < REMEMBERED:
            return False
        return (self.expected(streams - 1) or 0.0) <= in_time

    def soon_dry(self, handed: float, since: float, streams: int) -> bool:
        """Whether a player who got `handed` seconds of sound, the first of them `since` seconds ago, runs dry
        unless it gets more within a round or two of so many streams."""
        return handed - since < 2 * (self.expected(streams) or 0.0)
