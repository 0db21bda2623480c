"""A picture of what was found: the pitch over time, who speaks when, and the chosen stretches."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from revox.find.candidates import Candidate
from revox.find.errors import FindError
from revox.find.find import Findings
from revox.speech.activity import HOP

_LANES = 6  # speakers with a lane of their own
_POINTS = 20_000  # of pitch that are drawn for a recording
_CHOSEN = "#2a9d3a"


def check_drawing() -> None:
    """Raise FindError when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FindError("the picture needs matplotlib; install it with `pip install 'revox[find]'`") from None


def draw_findings(findings: Findings, chosen: list[Candidate]) -> bytes:
    """The picture as PNG: for each recording its pitch, and below the speakers' turns; `chosen` is numbered.

    Needs matplotlib (`check_drawing`).
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = colormaps["tab10"](range(10))
    count = len(findings.tracks)
    lanes = min(_LANES, len(findings.speakers))
    figure = Figure(figsize=(12, count * (2.6 + 0.32 * lanes) + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [2.4, 0.5 + 0.32 * lanes] * count
    axes = np.atleast_1d(figure.subplots(2 * count, 1, height_ratios=ratios))
    for source in range(count):
        seconds = findings.tracks[source].seconds
        unit, name = (60.0, "minutes") if seconds > 300 else (1.0, "seconds")
        pitch, timeline = axes[2 * source], axes[2 * source + 1]
        _draw_pitch(pitch, findings, source, unit, colors)
        _draw_turns(timeline, findings, source, unit, colors)
        pitch.set_title(Path(findings.request.media[source]).name, loc="left", fontsize=10)
        for rank, one in enumerate(chosen, 1):
            if one.source != source:
                continue
            for axis in (pitch, timeline):
                axis.axvspan(one.start / unit, one.end / unit, color=_CHOSEN, alpha=0.18, linewidth=0)
            middle = (one.start + one.end) / 2 / unit
            pitch.text(middle, 0.97, str(rank), transform=pitch.get_xaxis_transform(), ha="center", va="top",
                       color=_CHOSEN, fontsize=11, fontweight="bold")  # fmt: skip
        for axis in (pitch, timeline):
            axis.set_xlim(0, seconds / unit)
        pitch.tick_params(labelbottom=False)
        timeline.set_xlabel(name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_pitch(axis: Any, findings: Findings, source: int, unit: float, colors: Any) -> None:
    f0 = findings.tracks[source].f0
    step = max(1, len(f0) // _POINTS)
    speaker = np.full(len(f0), -1)
    for turn in findings.turns:
        if turn.source == source:
            speaker[turn.first : turn.last] = turn.speaker
    times = np.arange(len(f0)) * HOP / unit
    for number in range(min(_LANES, len(findings.speakers))):
        shown = np.flatnonzero((speaker == number) & np.isfinite(f0))[::step]
        axis.plot(times[shown], f0[shown], ".", markersize=2, color=colors[number % len(colors)])
    if findings.request.pitch:
        axis.axhspan(*findings.request.pitch, color="gray", alpha=0.12, linewidth=0)
    axis.set_yscale("log")
    axis.set_ylim(55, 520)
    axis.set_yticks([60, 100, 160, 260, 400], labels=["60", "100", "160", "260", "400"])
    axis.minorticks_off()
    axis.set_ylabel("pitch, Hz")


def _draw_turns(axis: Any, findings: Findings, source: int, unit: float, colors: Any) -> None:
    lanes = min(_LANES, len(findings.speakers))
    labels = []
    for number in range(lanes):
        spans = [
            (turn.first * HOP / unit, (turn.last - turn.first) * HOP / unit)
            for turn in findings.turns
            if turn.source == source and turn.speaker == number
        ]
        axis.broken_barh(spans, (lanes - 1 - number + 0.15, 0.7), color=colors[number % len(colors)])
        labels.append(f"speaker {number + 1}" + (" (chosen)" if number == findings.chosen else ""))
    axis.set_ylim(0, lanes)
    axis.set_yticks([lanes - 0.5 - number for number in range(lanes)], labels=labels, fontsize=9)
