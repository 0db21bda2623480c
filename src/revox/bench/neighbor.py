"""Does another service on the same machine suffer? It is probed before, during and after a run."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np

from revox.bench.errors import BenchError

PROBES = 20
"""Before and after a run."""
ABORT_ABOVE = 2.0
"""Times the baseline's median: slower answers stop the run."""
AFTER_AT_MOST = 1.2
"""Times the baseline's median: a slower median after the run fails it."""
_AGAIN = 2
_TIMEOUT, _RETURN_SECONDS = 10.0, 60.0


@dataclass
class NeighborProbe:
    """Times GET requests to `url`, seconds each.

    abort_above: seconds, None for `ABORT_ABOVE` times the baseline's median. A slow or failed answer counts
    when the next two at once are no better, so that one hiccup does not end a run. may_be_down: it was
    stopped for the run on purpose, so only slow answers end it.
    """

    url: str
    abort_above: float | None = None
    may_be_down: bool = False
    interval: float = 1.0
    before: list[float] = field(default_factory=list)
    during: list[float | None] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    stopped: str | None = None

    def __post_init__(self) -> None:
        self._client = httpx2.Client(timeout=_TIMEOUT, trust_env=False)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def baseline(self) -> None:
        """Probe before the run. Raises BenchError when it does not answer."""
        self.before = self._probes()

    @property
    def limit(self) -> float:
        """Seconds above which an answer stops the run."""
        return self.abort_above or ABORT_ABOVE * float(np.median(self.before))

    def watch(self) -> None:
        """Probe from now on, in a thread, until `end`."""
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def should_stop(self) -> str | None:
        """The sentence that ends the run, once there is one."""
        return self.stopped

    def end(self) -> None:
        """Stop probing, wait until it answers again (it may just have been started), and probe once more.

        Raises BenchError when it does not answer within a minute.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join(3 * _TIMEOUT)
        deadline = time.monotonic() + _RETURN_SECONDS
        while self._ask() is None:
            if time.monotonic() > deadline:
                raise BenchError(f"{self.url} does not answer any more; start it again.")
            time.sleep(0.5)
        self.after = self._probes()

    @property
    def harmed(self) -> bool:
        """Whether its median after the run is above `AFTER_AT_MOST` times that before."""
        return bool(self.after and np.median(self.after) > AFTER_AT_MOST * np.median(self.before))

    def report(self) -> dict[str, Any]:
        """For the report: medians in seconds, the limit, counts and what stopped the run."""
        answered = [seconds for seconds in self.during if seconds is not None]
        return {
            "url": self.url,
            "before_p50": _median(self.before),
            "during_p50": _median(answered),
            "during_max": max(answered, default=None),
            "after_p50": _median(self.after),
            "abort_above": self.limit,
            "probes": [len(self.before), len(self.during), len(self.after)],
            "unanswered": len(self.during) - len(answered),
            "stopped": self.stopped,
            "harmed": self.harmed,
        }

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            seconds = self._ask()
            self.during.append(seconds)
            for _ in range(_AGAIN):
                if not self._is_bad(seconds) or self._ended.is_set():
                    break
                seconds = self._ask()
                self.during.append(seconds)
            if self._is_bad(seconds) and not self._ended.is_set():
                took = "does not answer" if seconds is None else f"takes {1000 * seconds:.0f} ms"
                limit = f"at most {1000 * self.limit:.0f} ms were allowed"
                self.stopped = f"the neighbor {self.url} {took}; {limit}"
                return

    def _is_bad(self, seconds: float | None) -> bool:
        return not self.may_be_down if seconds is None else seconds > self.limit

    def _probes(self) -> list[float]:
        times = []
        for _ in range(PROBES):
            seconds = self._ask()
            if seconds is None:
                raise BenchError(f"the neighbor {self.url} does not answer; is it running there?")
            times.append(seconds)
        return times

    def _ask(self) -> float | None:
        """Seconds of one answer; None without one, or with a server error."""
        started = time.perf_counter()
        try:
            answer = self._client.get(self.url)
        except (httpx2.HTTPError, httpx2.InvalidURL):
            return None
        return time.perf_counter() - started if answer.status_code < 500 else None


def _median(times: list[float]) -> float | None:
    return float(np.median(times)) if times else None
