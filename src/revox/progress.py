"""Where a long job stands: one form for every job, whoever runs it and whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Where a long job stands.

    `what` is the phase in a few words; `done` of `total` is in the phase's own unit, and `total` is None
    where the end is not known. `facts` are figures beside them, such as a loss; `seconds_left` among them is
    an estimate by the job itself.
    """

    what: str
    done: float
    total: float | None = None
    facts: Mapping[str, float | str] = field(default_factory=dict)


ProgressCallback = Callable[[Progress], None]
"""Called from the job's own thread; must return quickly."""


def ignore_progress(progress: Progress) -> None:
    """The callback for a job that nobody watches."""
