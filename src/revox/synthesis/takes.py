"""Is a take what its text asks for? Faults that show in its length, its levels and its codes.

The words themselves are not recognized: a take that says something else in the right time passes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import numpy as np

from revox.model.config import CodecConfig
from revox.synthesis.split import expected_seconds

MAY_END, SHORTEST, LONGEST = 0.25, 0.4, 2.5
"""Shares of a text's expected seconds: from where on a take may end at all, when it is not too short, and
where it is stopped. Moods, languages and voices differ by less: read speech has 10 to 20 characters a second.
"""
SPARE_SECONDS = 2.0
"""More than `LONGEST` allows: short texts have silence around them."""
SILENCE_SECONDS = 1.5
_SILENT = 10 ** (-50 / 20)
_SILENT_SHARE = 10 ** (-35 / 20)
"""A frame is silent below -50 dBFS, or 35 dB below the take's loud frames."""
_LOOP_SECONDS = 2.0
_LONGEST_PERIOD = 6.0
_EQUAL_SHARE = 0.7
"""Of the semantic codes that are those of a period before, over at least two periods and two seconds."""
REPEATED = re.compile(r"(\b\w.{0,80}?)(?:\W+\1\b){2}", re.IGNORECASE | re.DOTALL)
"""Texts that say something three times: their speech may sound like a loop."""


class TakeFault(str, Enum):
    """What is wrong with a take; the value is its name in the API."""

    ENDED_EARLY = "ended_early"
    NEVER_ENDED = "never_ended"
    SILENCE = "silence"
    LOOP = "loop"


@dataclass(frozen=True)
class TakeWarning:
    """A piece of the text that no take said well: its number from 1, its text, and what is wrong."""

    piece: int
    text: str
    fault: TakeFault
    message: str

    def __str__(self) -> str:
        start = self.text if len(self.text) <= 40 else self.text[:39] + "…"
        return f"piece {self.piece} ({start!r}) {self.message}"


class TakeCheck:
    """Watches one take while it is made.

    `fault` is what was found, None so far; `message` says it to the user. `min_frames` and `max_frames` are
    what the text implies for the engine.
    """

    def __init__(self, text: str, codec: CodecConfig) -> None:
        self.expected = expected_seconds(text)
        self._rate, self._frame_samples = codec.frame_rate, codec.samples_per_frame
        self._loops = REPEATED.search(text) is None  # "ten, ten, ten" may sound like a loop
        self._semantic = np.zeros(0, np.int64)
        self._levels = np.zeros(0, np.float32)
        self.fault: TakeFault | None = None
        self.message = ""

    @property
    def min_frames(self) -> int:
        """Frames before which the model may not end."""
        return max(1, int(MAY_END * self.expected * self._rate))

    @property
    def max_frames(self) -> int:
        """Frames at which a take is stopped."""
        return int((LONGEST * self.expected + SPARE_SECONDS) * self._rate)

    @property
    def seconds(self) -> float:
        """What the take has spoken so far."""
        return len(self._semantic) / self._rate

    def push(self, semantic: np.ndarray, samples: np.ndarray) -> None:
        """Take note of frames: their semantic codes `[n]` and samples `[n * samples_per_frame]`."""
        self._semantic = np.concatenate((self._semantic, semantic))
        levels = np.sqrt(np.mean(samples.reshape(-1, self._frame_samples) ** 2, axis=1))
        self._levels = np.concatenate((self._levels, levels))
        self._listen()

    def finish(self, ended: bool) -> None:
        """The take is over; `ended` by the model itself, and not by a limit."""
        if not ended:
            self._found(TakeFault.NEVER_ENDED, f"did not end within {self.seconds:.1f} s")
        elif self.seconds < SHORTEST * self.expected:
            self._found(TakeFault.ENDED_EARLY, f"ended after {self.seconds:.1f} s")
        elif len(self._levels) and self._levels.max() < _SILENT:
            self._found(TakeFault.SILENCE, "is silent")

    def _found(self, fault: TakeFault, what: str) -> None:
        if self.fault is None:
            self.fault = fault
            self.message = f"{what}; its text takes about {self.expected:.1f} s"

    def _listen(self) -> None:
        silent = self._levels < max(_SILENT, _SILENT_SHARE * float(np.percentile(self._levels, 95)))
        seconds = _longest_run(silent) / self._rate
        if seconds >= SILENCE_SECONDS:
            self._found(TakeFault.SILENCE, f"has {seconds:.1f} s of silence in it")
        seconds = self._looping(silent) / self._rate
        if seconds:
            self._found(TakeFault.LOOP, f"repeats itself for {seconds:.1f} s")

    def _looping(self, silent: np.ndarray) -> int:
        """Frames that repeat what was a period before them; 0 without a loop."""
        codes = self._semantic
        if not self._loops:
            return 0
        for period in range(1, int(_LONGEST_PERIOD * self._rate) + 1):
            window = max(2 * period, int(_LOOP_SECONDS * self._rate))
            if len(codes) < window + period:
                break
            # Silence has one code in some models, and pauses are not loops: frames with sound count.
            sounding = ~silent[period:]
            equal = sounding & (codes[period:] == codes[:-period])
            sounds = np.convolve(sounding, np.ones(window), "valid")
            repeats = np.convolve(equal, np.ones(window), "valid")
            if ((sounds >= window / 2) & (repeats >= _EQUAL_SHARE * sounds)).any():
                return window
        return 0


def _longest_run(flags: np.ndarray) -> int:
    changes = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return int((changes[1::2] - changes[::2]).max(initial=0))
