"""What does injecting cost? Against `cp` and fsync of the same weights, in the same run.

    python benchmarks/injecting.py FOLDER [--rounds 2] [--out benchmarks/results]

FOLDER is filled with random weights at the release's sizes (8.0 GB; `python -m lab fullsize`) if they are not
there; as much again must be free beside it. Each round copies the weights with `cp` and syncs the copy,
injects a float32 encoder in place, and takes it out again. Before each, the weights are dropped from the page
cache. Injecting runs in a process of its own, whose largest resident size is told.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

from lab.fullsize import write_fullsize
from revox.checkpoint.encoder_file import decoder_sha256, encoder_specs
from revox.checkpoint.params import read_params
from revox.checkpoint.release import expected_tensors
from revox.checkpoint.tensors import WEIGHTS, write_safetensors_stream

CHILD = """
import json, sys, time
from pathlib import Path
from revox.checkpoint.inject import eject, inject
began = time.monotonic()
folder, encoder = Path(sys.argv[1]), sys.argv[2]
started = {"checking": time.process_time()}
def progress(stage, done, of):
    started.setdefault(stage, time.process_time())
if encoder != "-":
    report = inject(folder, encoder, None, progress=progress)
else:
    report = eject(folder, None, progress=progress)
at = [started["checking"], started["writing"], started["verifying"], time.process_time()]
cpu = dict(zip(("checking", "writing", "verifying"), (later - one for one, later in zip(at, at[1:]))))
print(json.dumps({"seconds": report.seconds, "cpu": cpu, "all": time.monotonic() - began,
                  "bytes": report.written, "verified": report.verified,
                  "byte_for_byte": report.byte_for_byte}))
"""


def drop_from_cache(path: Path) -> None:
    with open(path, "rb") as file, contextlib.suppress(OSError, AttributeError):
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_encoder(folder: Path, path: Path) -> None:
    generator = np.random.default_rng(0)
    specs = encoder_specs(expected_tensors(read_params(folder).voxtral_config()))
    write_safetensors_stream(
        path,
        [
            (
                name,
                spec.shape,
                "F32",
                lambda n=spec.parameters: generator.standard_normal(n, dtype=np.float32),
            )
            for name, spec in specs.items()
        ],
        metadata={"revox": json.dumps({"revox_run": "random", "decoder_sha256": decoder_sha256(folder)})},
    )


def processor() -> float:
    """Seconds of the processor spent so far, here and in processes that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def copied(weights: Path, to: Path) -> dict[str, float]:
    drop_from_cache(weights)
    began, busy = time.monotonic(), processor()
    subprocess.run(["cp", str(weights), str(to)], check=True)
    with open(to, "rb") as file:
        os.fsync(file.fileno())
    taken = {"seconds": time.monotonic() - began, "cpu": processor() - busy}
    to.unlink()
    return taken


def in_a_process(folder: Path, encoder: str) -> dict:
    drop_from_cache(folder / WEIGHTS)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), encoder], stdout=subprocess.PIPE, text=True
    ) as process:
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the process ended with {process.returncode}")
    # Linux counts ru_maxrss in kB, macOS in bytes.
    return json.loads(output) | {"peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    folder, weights = arguments.folder, arguments.folder / WEIGHTS
    if not weights.exists():
        write_fullsize(folder)
    encoder = folder.with_name(f"{folder.name}-encoder.safetensors")
    write_encoder(folder, encoder)
    size = weights.stat().st_size
    rounds = []
    for _ in range(arguments.rounds):
        copy = copied(weights, folder.with_name(f"{folder.name}-copy.safetensors"))
        injected = in_a_process(folder, str(encoder))
        ejected = in_a_process(folder, "-")
        rounds.append({"cp": copy, "inject": injected, "eject": ejected})
        print(json.dumps(rounds[-1]), flush=True)
    encoder.unlink()

    lines = [
        f"{size / 1e9:.2f} GB of weights, {rounds[0]['inject']['bytes'] / 1e9:.2f} GB with the encoder; "
        f"{arguments.rounds} rounds on {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} (median, and each round)",
        "",
        "| | seconds | times `cp` + fsync of the same round | processor's seconds |",
        "| --- | --- | --- | --- |",
    ]

    def row(name: str, values: list[float], busy: list[float]) -> None:
        ratios = [value / found["cp"]["seconds"] for value, found in zip(values, rounds, strict=True)]
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(
            f"| {name} | {median(values):.1f} ({each}) | {median(ratios):.2f} "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {median(busy):.1f} |"
        )

    row("`cp` and fsync", [r["cp"]["seconds"] for r in rounds], [r["cp"]["cpu"] for r in rounds])
    for what in ("inject", "eject"):
        for stages in (("checking",), ("writing",), ("checking", "writing"), ("verifying",)):
            row(
                f"{what}: {' and '.join(stages)}",
                [sum(r[what]["seconds"][stage] for stage in stages) for r in rounds],
                [sum(r[what]["cpu"][stage] for stage in stages) for r in rounds],
            )
    peak = max(found[what]["peak"] for found in rounds for what in ("inject", "eject"))
    proven = all(found["eject"]["byte_for_byte"] for found in rounds)
    lines += [
        "",
        f"Largest resident size: {peak / 1e6:.0f} MB. Taken out again, the weights were proven to be the "
        f"original's in {'every' if proven else 'NOT every'} round.",
    ]
    print("\n".join(lines))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.date.today().isoformat()}-injecting"
    (arguments.out / f"{name}.json").write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":
    main()
