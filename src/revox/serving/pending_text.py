"""Text that arrives in parts, as from a language model: which sentences are to be spoken, and when."""

from __future__ import annotations

import asyncio

from revox.synthesis.split import Granularity, Splitter

QUIET_SECONDS = 0.3
"""Without a message, after which a text that ends with a stop is taken for complete."""
OVERDUE_SECONDS = 2.0
"""For which text without an end waits: then its clauses or words are spoken, and all of it if the client was
quiet for as long."""


class PendingText:
    """The text of a session that is not spoken yet, by the clock of the running event loop."""

    def __init__(self, by: Granularity = "sentence") -> None:
        self._splitter = Splitter(by)
        self._message_at = self._pending_since = 0.0
        self._settled = False  # what was complete at the last message is spoken

    @property
    def characters(self) -> int:
        """How many wait."""
        return self._splitter.pending

    def touch(self) -> None:
        """A message came."""
        self._message_at, self._settled = _now(), False

    def feed(self, text: str) -> list[str]:
        """The sentences that `text` completes."""
        began, sentences = self._splitter.pending == 0, self._splitter.feed(text)
        if began or sentences:
            self._pending_since = _now()
        return sentences

    def seconds(self) -> float | None:
        """Seconds until `waiting` has something to say if no message comes; None when nothing waits."""
        if not self._splitter.pending or self._splitter.by == "none":
            return None
        due = self._message_at + QUIET_SECONDS if not self._settled else float("inf")
        return max(0.0, min(due, self._pending_since + OVERDUE_SECONDS) - _now())

    def waiting(self) -> list[str]:
        """What of the text is complete, or overdue, where no message came for `seconds`."""
        now = _now()
        if now < self._pending_since + OVERDUE_SECONDS:
            self._settled = True
            return self._splitter.settle()
        self._pending_since = now
        quiet = now >= self._message_at + OVERDUE_SECONDS
        return self._splitter.flush() if quiet else self._splitter.overdue()

    def flush(self) -> list[str]:
        """The rest, complete or not."""
        return self._splitter.flush()


def _now() -> float:
    return asyncio.get_running_loop().time()
