"""Limits the concurrent requests so that no client's player runs dry.

A step generates one frame of every active request, and takes longer with more of them. While a step is
shorter than the audio of a frame, all players keep up; with one request too many, all of them run dry. A
request that does not fit therefore waits: a late start is heard once, gaps are heard throughout.

The cost of one more request depends on the machine (on a GPU it is small), so it is tried, one at a time, and
a number that was too many is not tried again for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable

WEIGHT = 0.1  # of the latest step in an average
STEADY = 0.85  # of real time: the rest is for whatever else the machine does
REMEMBERED = 30.0  # seconds for which a number that was too many is not tried again


class AdmissionControl:
    """Recent seconds per step, by the number of active requests.

    frame_seconds: duration of a frame's audio. clock: seconds.
    """

    def __init__(self, frame_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.frame_seconds, self.clock = frame_seconds, clock
        self._steps: dict[int, tuple[float, float]] = {}  # streams: average, when it was last seen

    def observe(self, streams: int, seconds: float, joined: bool = False) -> None:
        """A step of so many streams took `seconds`. If one `joined` with it, a prompt was read too: the time
        counts where such steps were seen before, but is not a first measurement."""
        if joined and streams not in self._steps:
            return
        before, _ = self._steps.get(streams, (seconds, 0.0))
        self._steps[streams] = (before + WEIGHT * (seconds - before), self.clock())

    def expected(self, streams: int) -> float | None:
        """Seconds that a step of so many streams takes, or of the next smaller number that was seen; None
        where neither was."""
        seen = max((n for n in self._steps if n <= streams), default=None)
        return None if seen is None else self._steps[seen][0]

    def allows(self, streams: int, speed: float = 1.0) -> bool:
        """Whether so many may be spoken at once: one less are spoken in time, and so many were not too slow
        within the last `REMEMBERED` seconds. `speed`: of the fastest playback among them.

        True where nothing is known yet, and where even the smallest number is too slow: then more at once
        finish sooner.
        """
        in_time = STEADY * self.frame_seconds / speed
        if all(seconds > in_time for seconds, _ in self._steps.values()):
            return True
        seconds, seen = self._steps.get(streams, (0.0, 0.0))
        if seconds > in_time and self.clock() - seen < REMEMBERED:
            return False
        return (self.expected(streams - 1) or 0.0) <= in_time

    def soon_dry(self, sent: float, since: float, streams: int) -> bool:
        """Whether a player runs dry unless it gets more within a step or two of so many streams. It was sent
        `sent` seconds of sound, the first of them `since` seconds ago."""
        return sent - since < 2 * (self.expected(streams) or 0.0)
