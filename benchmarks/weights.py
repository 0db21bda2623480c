"""What do the formats of the weights cost on this processor: memory, loading, a prompt, a frame?

    python benchmarks/weights.py CHECKPOINT [--weights bf16,int8,int4] [--positions 130] [--frames 5]

Each format runs in a process of its own. Times are processor time with one thread, so that a busy machine
changes them little, and wall-clock time beside it. `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` holds
torch's bf16 and float32 to AVX2 (FBGEMM's int8 not). Random weights do: nothing depends on what is said.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--weights", default="bf16,int8,int4")
    parser.add_argument("--positions", type=int, default=130)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    args = parser.parse_args()
    formats, rows = args.weights.split(","), []
    for weights in formats:
        if len(formats) == 1:
            rows.append(measure(args.checkpoint, weights, args.positions, args.frames, args.threads))
        else:
            command = [sys.executable, __file__, args.checkpoint, "--weights", weights]
            for name in ("positions", "frames", "threads"):
                command += [f"--{name}", str(getattr(args, name))]
            done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
            rows += json.loads(done.stdout)
            print(rows[-1], file=sys.stderr)
    text = json.dumps(rows, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def measure(checkpoint: Path, weights: str, positions: int, frames: int, threads: int) -> dict:
    import torch

    import revox
    from revox.synthesis.engine import Engine, Request

    torch.set_num_threads(threads)
    row: dict = {"weights": weights, "positions": positions, "threads": threads}
    clock = Clock()
    tts = revox.load(checkpoint, device="cpu", weights=weights, lazy=True)
    model = tts.model
    row["load"] = clock.lap()
    prompt = 0.1 * torch.randn(positions, model.config.backbone.dim, dtype=model.dtype)
    engine = Engine(model)
    clock.lap()
    [one] = engine.join([Request(prompt, max_frames=frames + 1)])
    row["prompt"] = clock.lap()
    engine.step()
    row["first frame"] = clock.lap()
    taken = []
    while not one.done and len(taken) < frames:
        engine.step()
        taken.append(clock.lap())
    row["frame"] = min(taken, key=lambda lap: lap["processor"])
    row["GB"] = memory()
    row["bandwidth GB/s"] = bandwidth()
    return row


class Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> dict[str, float]:
        now = (time.process_time(), time.perf_counter())
        before, self.now = getattr(self, "now", now), now
        return {"processor": round(now[0] - before[0], 3), "wall": round(now[1] - before[1], 3)}


def memory() -> dict[str, float]:
    """Resident memory in GB: its peak, and what is anonymous and mapped from files now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "anonymous": "RssAnon", "mapped": "RssFile"}
    return {name: round(int(fields[field].split()[0]) * 1024 / 1e9, 2) for name, field in names.items()}


def bandwidth() -> float:
    """GB/s at which one thread reads memory: the best of three sums over 512 MB."""
    import torch

    data, best = torch.ones(1 << 26, dtype=torch.int64), 0.0
    for _ in range(3):
        start = time.process_time()
        data.sum()
        best = max(best, data.nbytes / (time.process_time() - start) / 1e9)
    return round(best, 1)


if __name__ == "__main__":
    main()
