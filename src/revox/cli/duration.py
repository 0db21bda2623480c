"""Times as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`seconds` as hours and minutes, or minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
