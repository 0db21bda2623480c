"""Progress on a terminal: a bar where there is one, a line at each quarter in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from revox.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from rich.console import Console


def duration(seconds: float) -> str:
    """`seconds` as hours and minutes, or minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


@contextmanager
def show_progress(console: Console, unit: str = "") -> Iterator[ProgressCallback]:
    """A callback that shows progress on `console` while the context lasts.

    Each phase (`Progress.what`) has a bar of its own. `unit` is "bytes" where `done` counts bytes. Where
    `console` is not a terminal, a line is printed at each quarter of a phase instead.
    """
    from rich import progress as rich_progress

    counter: rich_progress.ProgressColumn
    counter = rich_progress.DownloadColumn() if unit == "bytes" else rich_progress.MofNCompleteColumn()
    columns = (
        rich_progress.TextColumn("  {task.description}", markup=False),
        rich_progress.BarColumn(),
        counter,
        rich_progress.TextColumn("{task.fields[facts]}", markup=False),
        rich_progress.TimeElapsedColumn(),
    )
    bars = rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bars:
        tasks: dict[str, rich_progress.TaskID] = {}
        quarters: dict[str, int] = {}

        def show(at: Progress) -> None:
            facts = _in_words(at)
            if at.what not in tasks:
                tasks[at.what] = bars.add_task(at.what, total=at.total, facts=facts)
            bars.update(tasks[at.what], completed=at.done, total=at.total, facts=facts)
            if console.is_terminal or not at.total:
                return
            quarter = int(4 * at.done // at.total)
            if quarter != quarters.setdefault(at.what, 0):
                quarters[at.what] = quarter
                line = f"  {at.what}: {100 * at.done / at.total:.0f} %"
                console.print(f"{line}, {facts}" if facts else line, highlight=False, soft_wrap=True)

        yield show


def _in_words(at: Progress) -> str:
    words = []
    for name, value in at.facts.items():
        if name == "seconds_left":
            words.append(f"{duration(float(value))} left")
        else:
            words.append(f"{name} {value:.4g}" if isinstance(value, (int, float)) else f"{name} {value}")
    return ", ".join(words)
