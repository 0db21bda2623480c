"""Curves of a lab build: losses over steps, from its logs.

python benchmarks/lab_curves.py benchmarks/results/2026-11-21-lab-build
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("codec-log.jsonl", "mel", "mel, training crops (log10)"),
    ("codec-log.jsonl", "synthetic_valid_mel", "mel, validation, synthetic"),
    ("codec-log.jsonl", "human_valid_mel", "mel, validation, human"),
    ("codec-log.jsonl", "synthetic_saturated", "share of levels 0 and 20"),
    ("language-log.jsonl", "semantic", "semantic cross-entropy, training"),
    ("language-log.jsonl", "valid_semantic", "semantic cross-entropy, validation"),
    ("language-log.jsonl", "flow", "velocity error, training"),
    ("language-log.jsonl", "valid_flow", "velocity error, validation"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), constrained_layout=True)
    for axis, (file, key, title) in zip(axes.flat, PANELS, strict=True):
        rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=80)
    print(folder / "curves.png")


if __name__ == "__main__":
    main()
