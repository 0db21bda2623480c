"""Curves of a lab build: losses over steps, from its logs.

python benchmarks/lab_curves.py benchmarks/results/2026-11-21-lab-build-3
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
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    figure, axes = plt.subplots(2, 5, figsize=(18.5, 6.5), constrained_layout=True)
    for axis, (stage, keys, title) in zip(axes.T.flat, PANELS, strict=True):
        rows = [json.loads(line) for line in (folder / f"{stage}-log.jsonl").read_text().splitlines()]
        for key in keys:
            points = [(row["seconds"] / 60, row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else None, label=key)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("minutes of training")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=80)
    print(folder / "curves.png")


if __name__ == "__main__":
    main()
