"""The workshop of the small checkpoint: its speech, training and recovery experiment. Not in the wheel."""

from __future__ import annotations

from lab.errors import LabError

__all__ = ["LabError"]
