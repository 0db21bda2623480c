"""What a step of inversion costs at the release's size, on random weights, on the device at hand.

    python benchmarks/inversion_full_size.py [--seconds 3 10 30] [--steps 3] [--device cuda]

Each length in a process of its own, so that the peak of memory is its own. On a CPU seconds are of the
processor (one thread); on CUDA of the clock, after a warm-up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from revox.checkpoint.params import Params
from revox.checkpoint.release import release_params
from revox.coding.invert import InversionConfig, invert
from revox.model.codec import Codec
from revox.training.initial import initialize


def measure(seconds: float, steps: int, device: str) -> dict[str, float]:
    """Time and floating-point operations of a step, time of a round of local search, peak memory."""
    torch.set_num_threads(1)
    config = Params.model_validate(release_params()).voxtral_config().codec
    codec = Codec(config, with_encoder=False)
    initialize(codec, 0)
    codec = codec.to(device).eval().requires_grad_(False)
    frames = int(seconds * config.frame_rate)
    noise = torch.randn(frames * config.samples_per_frame, generator=torch.Generator().manual_seed(0))
    target = (0.05 * noise).to(device)
    cuda = device.startswith("cuda")

    def spent(n: int, rounds: int) -> float:
        began = time.perf_counter() if cuda else time.process_time()
        invert(codec, target, config=InversionConfig(steps=n, local_search_rounds=rounds), seed=0)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() if cuda else time.process_time()) - began

    spent(1, 0)
    short, long, searched = spent(1, 0), spent(1 + steps, 0), spent(1, 1)
    operations = []
    for n in (1, 2):
        with FlopCounterMode(display=False) as counted:
            spent(n, 0)
        operations.append(counted.get_total_flops())
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else _peak_gb()
    return {
        "clip_seconds": frames / config.frame_rate,
        "seconds_a_step": (long - short) / steps,
        "seconds_a_local_search_round": searched - short,
        "gigaflops_a_step": (operations[1] - operations[0]) / 1e9,
        "peak_gb": memory,
    }


def _peak_gb() -> float:
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, nargs="+", default=[3.0, 10.0, 30.0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", action="store_true", help="measure one length and print it")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.seconds[0], arguments.steps, arguments.device)))
        return
    rows = []
    for seconds in arguments.seconds:
        command = [sys.executable, __file__, "--one", "--seconds", str(seconds),
                   "--steps", str(arguments.steps), "--device", arguments.device]  # fmt: skip
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(said.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    on = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{platform.machine()} CPU"
    report = {
        "date": datetime.date.today().isoformat(), "machine": on, "torch": torch.__version__,
        "threads": 1, "weights": "random, the release's sizes", "rows": rows,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{report['date']}-inversion-full-size.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
