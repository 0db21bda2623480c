"""Curves of a lab build: losses over steps, from the logs of the stages that have run.

python benchmarks/lab_curves.py RUN curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("teacher", ("mel", "synthetic_mel", "human_mel"), "teacher: spectra (deviations)"),
    (
        "teacher",
        ("synthetic_foreseen_mel", "human_foreseen_mel"),
        "teacher: spectra from foreseen acoustic values",
    ),
    (
        "encoder",
        ("acoustic", "synthetic_acoustic", "human_acoustic"),
        "encoder: acoustic error (levels of 20)",
    ),
    ("encoder", ("agreement", "synthetic_agreement"), "encoder: semantic codes equal to the teacher's"),
    ("decoder", ("mel", "feature"), "decoder: mel (log10) and feature matching, training crops"),
    ("decoder", ("synthetic_mel", "human_mel"), "decoder: mel, validation"),
    ("finish", ("mel", "feature"), "finish: mel (log10) and feature matching, training crops"),
    ("finish", ("synthetic_mel", "human_mel"), "finish: mel, validation"),
    ("language", ("semantic", "valid_semantic"), "language: semantic codes (nats a frame)"),
    ("language", ("flow", "valid_flow"), "language: velocity error"),
    ("language", ("expected", "valid_expected"), "language: expected acoustic values, squared error"),
    ("tune", ("mel", "phonetic"), "tune: mel (log10) and a recognizer's states, training crops"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the build's folder")
    parser.add_argument("out", type=Path, help="the picture")
    given = parser.parse_args()
    logs = {stage: given.run / stage / f"{stage}-log.jsonl" for stage, _, _ in PANELS}
    panels = [panel for panel in PANELS if logs[panel[0]].is_file()]
    if not panels:
        parser.error(f"{given.run} holds no log of a stage")
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(18.5, 6.5), constrained_layout=True)
    for axis, (stage, keys, title) in zip(axes.T.flat, panels, strict=False):
        rows = [json.loads(line) for line in logs[stage].read_text().splitlines()]
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else None, label=key)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("steps")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(given.out, dpi=80)


if __name__ == "__main__":
    main()
