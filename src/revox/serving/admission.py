"""Limits the concurrent requests so that no client's player runs dry.

A step generates one frame of each request that takes part, and takes longer with more of them. While a step
of all is shorter than the audio of a frame, all players keep up; with one request too many, all of them run
dry. A request that does not fit therefore waits: a late start is heard once, gaps are heard throughout.

The cost of one more request depends on the machine (on a GPU it is small), so it is tried, one at a time, and
a number that was too many is not tried again for a while.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import linear_regression

from revox.synthesis.engine import FIRST_CHUNK

WEIGHT = 0.1  # of the latest step in an average
DELAY = 0.04  # seconds that a chunk may take on its way to the player
STEADY = 0.85  # of real time: the rest is for whatever else the machine does
FORGOTTEN = 0.02  # of the longest step, at each step after it
REMEMBERED = 30.0  # seconds for which a number that was too many is not tried again


class AdmissionControl:
    """Recent seconds per step, by the number of active requests.

    frame_seconds: duration of a frame's audio. clock: seconds.
    """

    def __init__(self, frame_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.frame_seconds, self.clock = frame_seconds, clock
        self._steps: dict[int, tuple[float, float]] = {}  # streams: average, when it was last seen
        self._longest = 0.0  # of late, all that came together included

    def observe(self, streams: int, seconds: float, joined: bool = False, whole: float | None = None) -> None:
        """A step of so many streams took `seconds`, or `whole` with what others do at other times.

        If one `joined` with it, a prompt was read too: the time counts where such steps were seen before, but
        is not a first measurement."""
        self._longest = max(seconds if whole is None else whole, (1 - FORGOTTEN) * self._longest)
        if joined and streams not in self._steps:
            return
        before, _ = self._steps.get(streams, (seconds, 0.0))
        self._steps[streams] = (before + WEIGHT * (seconds - before), self.clock())

    def expected(self, streams: int) -> float | None:
        """Seconds that a step of so many streams takes; None while nothing is known.

        Where no such step was seen: on the line through those that were, and no less than a smaller one.
        """
        if not self._steps:
            return None
        if streams in self._steps:
            return self._steps[streams][0]
        seen = {n: seconds for n, (seconds, _) in self._steps.items()}
        if len(seen) == 1:
            return next(iter(seen.values()))
        line = linear_regression(list(seen), list(seen.values()))
        smaller = [seconds for n, seconds in seen.items() if n < streams]
        return max(line.intercept + line.slope * streams, *smaller, 0.0)

    def allows(self, streams: int, speed: float = 1.0) -> bool:
        """Whether so many may be spoken at once: it is expected to be in time, and so many were not too slow
        within the last `REMEMBERED` seconds. `speed`: of the fastest playback among them.

        True where nothing is known yet, and where even the smallest number is too slow: then more at once
        finish sooner.
        """
        in_time = STEADY * self.frame_seconds / speed
        if all(seconds > in_time for seconds, _ in self._steps.values()):
            return True
        _, seen = self._steps.get(streams, (0.0, self.clock()))
        if self.clock() - seen >= REMEMBERED:
            return (self.expected(streams - 1) or 0.0) <= in_time
        return (self.expected(streams) or 0.0) <= in_time

    def margin(self, streams: int) -> float:
        """Seconds of sound that a player needs in hand while so many are spoken: two steps, as long as the
        longest of late, and a delay."""
        return 2 * max(self.expected(streams) or self.frame_seconds, self._longest) + DELAY

    def first_frames(self, streams: int, speed: float) -> int:
        """Frames in the first chunk of a stream, 1 to 5: so many that its player can wait for the second, two
        steps later."""
        seconds = 2 * (self.expected(streams) or self.frame_seconds) + DELAY
        frames = math.ceil(seconds * speed / self.frame_seconds)
        return min(frames, FIRST_CHUNK) if self._steps else FIRST_CHUNK
