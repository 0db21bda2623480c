"""How far may a score move when nothing has changed? The same clips, several seeds; and other clips.

    python benchmarks/measuring_noise.py CLIPS [--checkpoint FOLDER] [--encoder FILE] [--limit 20] [--seeds 3]

CLIPS is a folder as for `revox evaluate`. For every figure of the codec, cloning and acceptance tables: its
value, by how much it moves between seeds (largest less smallest), and the half width of its 95 % interval
over clips. A difference between two methods on the same clips means something when it is larger than the
first; a difference between two sets of clips when it is larger than the second. Also told: whether the scorer
puts the recording, the decoded recording, a wrong speaker and noise in this order.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path

import torch

from revox.demo import checkpoint_folder
from revox.evaluation.clips import find_clips
from revox.evaluation.evaluate import evaluate
from revox.evaluation.measured import NOISE, RECORDING, WRONG_SPEAKER
from revox.evaluation.subject import Setup
from revox.evaluation.tables import Table

ORDER = (RECORDING, "decoded", WRONG_SPEAKER, NOISE)


def lines(table: Table) -> list[dict]:
    found = []
    for row in table.rows:
        for column in table.columns:
            cell = row.cells.get(column.key)
            if cell is not None and (cell.seed_range is not None or cell.clips > 1):
                found.append(
                    {
                        "table": table.title,
                        "row": row.name,
                        "figure": column.title,
                        "value": cell.value,
                        "between_seeds": cell.seed_range,
                        "half_interval_over_clips": (cell.high - cell.low) / 2,
                        "clips": cell.clips,
                    }
                )
    return found


def order(table: Table) -> dict[str, bool]:
    """Whether each figure puts the recording, decoded, wrong speaker and noise in this order."""
    found = {}
    for key, sign in (("mel", 1), ("estoi", -1), ("similarity", -1)):
        cells = [table.cell(name, key) for name in ORDER]
        if all(cells):
            values = [sign * cell.value for cell in cells if cell]
            found[key] = values == sorted(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--encoder", type=Path, default=Path("lab/reference-encoder/encoder.safetensors"))
    parser.add_argument("--work", type=Path, default=Path("measuring-noise"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=["codec", "cloning", "acceptance"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clips = find_clips(arguments.clips, limit=arguments.limit)
    setup = Setup(
        arguments.checkpoint or checkpoint_folder(), arguments.work, encoder=arguments.encoder,
        seeds=arguments.seeds, seconds=arguments.seconds,
    )  # fmt: skip
    report: dict = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} CPU",
        "seeds": arguments.seeds,
        "clips": len(clips),
        "order": {},
        "noise": [],
    }
    for kind in arguments.kinds:
        measured = evaluate(kind, setup, clips, arguments.jobs)
        for table in measured.tables:
            report["noise"] += lines(table)
            if table.title.startswith("Codec"):
                report["order"][table.title] = order(table)
    print(
        "| row | figure | value | between seeds | half interval over clips |\n| --- | --- | --- | --- | --- |"
    )
    for one in report["noise"]:
        seeds = "no chance in it" if one["between_seeds"] is None else f"{one['between_seeds']:.3f}"
        print(
            f"| {one['row']} | {one['figure']} | {one['value']:.3f} | {seeds} "
            f"| {one['half_interval_over_clips']:.3f} |"
        )
    print("in order:", report["order"])
    path = arguments.out / f"{report['date']}-measuring-noise.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
