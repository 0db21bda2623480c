"""What streaming costs on the lab checkpoint, in processor time of one thread.

    python benchmarks/streaming.py codec
    python benchmarks/streaming.py schedule [--streams 32] [--seconds 20] [--requests 200]

- codec: decoding a stream chunk by chunk, with its state carried on and with the frames before each
  chunk decoded again (as before that). Both in one run, in turn; milliseconds a frame.
- schedule: the server's engine on a clock of its own, which counts the processor time it takes and jumps
  over the time in which it has nothing to do: a machine of one core that does nothing else. Players take
  chunks at once and play them in real time. First sound of single requests on an idle engine; then of
  `--streams` of so many `--seconds` each that join over 10 s, with the least that any player had in hand
  when its next chunk came; then memory over `--requests` more. Exits with 1 when a player runs dry, when
  first sound takes more than 3 times as long (95 of 100) as on an idle engine, or when memory grows by more
  than 5 % over the second half of the requests.

Prints Markdown. Processor time does not depend on what else the machine does, up to its caches.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import revox
from revox.checkpoint.load import load_model
from revox.demo import checkpoint_folder
from revox.model.codec import Codec
from revox.serving.engine import EngineThread
from revox.serving.metrics import Metrics
from revox.serving.settings import ServeSettings
from revox.synthesis.engine import Request
from revox.synthesis.prompt import make_prompt

TEXTS = (
    "Good evening, doctor. The train leaves at ten past seven, and the sandwich costs sixty four euros.",
    "I spent nineteen pounds and seventy five cents for the book. It is half past four on the second of May.",
    "The train leaves at ten past seven. It is a quarter past nine. Good morning, and good evening.",
)
FRAMES = 50
REPEATS = 2


def carried_on(codec: Codec, codes: Tensor, size: int) -> Tensor:
    """Each chunk continues the last one's state."""
    state = codec.empty_state(len(codes))
    return torch.cat([codec.decode(chunk, state) for chunk in codes.split(size, dim=-1)], dim=1)


def decoded_again(codec: Codec, codes: Tensor, size: int) -> Tensor:
    """Each chunk is decoded with the frames before it that the decoder sees."""
    pieces = []
    for start in range(0, codes.shape[-1], size):
        context = max(0, start - codec.left_context)
        piece = codec.decode_whole(codes[..., context : start + size])
        pieces.append(piece[:, (start - context) * codec.samples_per_frame :])
    return torch.cat(pieces, dim=1)


Decode = Callable[[Codec, Tensor, int], Tensor]


def milliseconds(decode: Decode, codec: Codec, codes: Tensor, size: int) -> float:
    """Processor time of a call."""
    began = time.process_time()
    decode(codec, codes, size)
    return 1000 * (time.process_time() - began)


@torch.inference_mode()
def codec_table(checkpoint: Path) -> str:
    """Milliseconds a frame by the size of the chunks."""
    codec = load_model(checkpoint, dtype=torch.float32).audio_tokenizer
    generator = torch.Generator().manual_seed(0)
    config = codec.config
    semantic = torch.randint(config.semantic_codebook_size, (1, 1, FRAMES), generator=generator)
    codes = torch.cat(
        (semantic, torch.randint(21, (1, config.acoustic_dim, FRAMES), generator=generator)), dim=1
    )
    whole = codec.decode_whole(codes)
    lines = [
        "| frames a chunk | decoded again | carried on | ratio | 8 streams, each | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size in (1, 2, 5, 10, 25):
        again, once, eight = [], [], []
        for _ in range(REPEATS):
            again.append(milliseconds(decoded_again, codec, codes, size))
            once.append(milliseconds(carried_on, codec, codes, size))
            eight.append(milliseconds(carried_on, codec, codes.expand(8, -1, -1), size))
        error = float((carried_on(codec, codes, size) - whole).abs().max() / whole.abs().max())
        a, b, c = min(again) / FRAMES, min(once) / FRAMES, min(eight) / FRAMES / 8
        lines.append(f"| {size} | {a:.2f} ms | {b:.2f} ms | {a / b:.1f} | {c:.2f} ms | {error:.0e} |")
    return "\n".join(lines)


class ProcessorClock:
    """Seconds of processor time of this process, and those that were skipped."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def __call__(self) -> float:
        return time.process_time() + self.skipped

    def skip_to(self, moment: float) -> None:
        """Nothing happens until then."""
        self.skipped += max(0.0, moment - self())


@dataclass
class Played:
    """What a player got: when it asked, and when each chunk of so many seconds came."""

    asked: float
    came: list[float]
    seconds: list[float]

    @property
    def first_sound(self) -> float:
        """Seconds from the request to its first sound."""
        return self.came[0] - self.asked

    @property
    def least_in_hand(self) -> float:
        """Seconds of sound left when a chunk came, at the least; negative when the player ran dry."""
        played = [came - self.came[0] for came in self.came[1:]]
        had = accumulate(self.seconds[:-1])
        return min((h - p for h, p in zip(had, played, strict=True)), default=float("inf"))


async def play(engine: EngineThread, request: Request, clock: ProcessorClock) -> Played:
    """Take a stream's chunks as they come."""
    played = Played(clock(), [], [])
    async for chunk in engine.submit(request, streaming=True):
        played.came.append(clock())
        played.seconds.append(chunk.frames / engine.model.config.codec.frame_rate)
    return played


async def simulate(
    engine: EngineThread, clock: ProcessorClock, requests: list[tuple[float, Request]]
) -> tuple[list[Played], int]:
    """Submit each request at its moment, run the engine, and play everything; and how many spoke at once."""
    start, tasks, most = clock(), [], 0
    todo = deque(requests)
    while todo or not all(task.done() for task in tasks):
        while todo and start + todo[0][0] <= clock():
            tasks.append(asyncio.ensure_future(play(engine, todo.popleft()[1], clock)))
            await asyncio.sleep(0)
        worked = engine._step()
        most = max(most, engine.active)
        for _ in range(3):  # chunks reach their players
            await asyncio.sleep(0)
        if not worked and todo:
            clock.skip_to(start + todo[0][0])
    return [task.result() for task in tasks], most


def percentile(values: list[float], share: float) -> float:
    """The value below which this share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def resident() -> float:
    """Resident memory of this process, MB."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def schedule_table(checkpoint: Path, streams: int, seconds: float, count: int) -> tuple[str, bool]:
    """First sound idle and under load, buffers, memory; and whether the goals are met."""
    tts = revox.load(checkpoint, dtype=torch.float32)
    voices, clock = tts.voices(), ProcessorClock()
    settings = ServeSettings(checkpoint=str(checkpoint), max_streams=streams, marking=False)

    def request(i: int, frames: int) -> Request:
        """As many frames as told, whatever the model would say."""
        prompt = make_prompt(
            tts.model, tts.prompter, TEXTS[i % len(TEXTS)], tts.voice(voices[i % len(voices)])
        )
        return Request(prompt.embeddings, i, frames, min_frames=frames, prefix=prompt.voice_positions)

    async def everything() -> tuple[list[Played], list[Played], int, list[float]]:
        engine = EngineThread(tts.model, settings, Metrics(), clock)
        engine._closing = engine._over = False
        for i in range(4):  # the pace is known, kernels are loaded
            await simulate(engine, clock, [(0.0, request(i, 25))])
        alone = []
        for i in range(20):
            alone += (await simulate(engine, clock, [(0.0, request(i, 25))]))[0]
        joining = [(10.0 * i / streams, request(100 + i, round(seconds * 12.5))) for i in range(streams)]
        together, most = await simulate(engine, clock, joining)
        memory = [resident()]
        for first in range(0, count, 20):
            await simulate(engine, clock, [(0.1 * i, request(first + i, 40)) for i in range(20)])
            memory.append(resident())
        return alone, together, most, memory

    alone, together, most, memory = asyncio.run(everything())
    idle = percentile([one.first_sound for one in alone], 0.95)
    loaded = [one.first_sound for one in together]
    least = min(one.least_in_hand for one in together)
    middle = len(memory) // 2
    growth = memory[-1] / memory[middle] - 1
    speech = sum(sum(one.seconds) for one in together)
    lines = [
        "| what | value |",
        "| --- | --- |",
        f"| first sound, idle: median, 95 of 100 | {median(one.first_sound for one in alone) * 1000:.0f} ms, "
        f"{idle * 1000:.0f} ms |",
        f"| first sound, {streams} streams of {seconds:g} s over 10 s: median, 95 of 100 | "
        f"{median(loaded) * 1000:.0f} ms, "
        f"{percentile(loaded, 0.95) * 1000:.0f} ms ({percentile(loaded, 0.95) / idle:.1f} times idle) |",
        f"| spoken at once, at most; speech in all | {most}; {speech:.0f} s |",
        f"| least in hand of any player when a chunk came | {least * 1000:.0f} ms |",
        f"| players that ran dry | {sum(one.least_in_hand < 0 for one in together)} of {streams} |",
        f"| frames in first chunks, idle and loaded | {_sizes(alone)}, {_sizes(together)} |",
        f"| memory after {20 * middle} requests and after {count} | {memory[middle]:.0f} MB, "
        f"{memory[-1]:.0f} MB ({growth:+.1%}) |",
    ]
    met = least >= 0 and percentile(loaded, 0.95) <= 3 * idle and growth <= 0.05
    return "\n".join(lines), met


def _sizes(played: list[Played]) -> str:
    sizes = [round(one.seconds[0] * 12.5) for one in played]
    return f"{min(sizes)} to {max(sizes)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["codec", "schedule"])
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: the lab checkpoint")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=200)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = asked.checkpoint or checkpoint_folder()
    if asked.what == "codec":
        print(codec_table(checkpoint))
        return 0
    table, met = schedule_table(checkpoint, asked.streams, asked.seconds, asked.requests)
    print(table)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
