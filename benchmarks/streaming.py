"""What streaming costs on the lab checkpoint, in processor time of one thread.

    python benchmarks/streaming.py codec

- codec: decoding a stream chunk by chunk, with its state carried on and with the frames before each
  chunk decoded again (as before that). Both in one run, in turn; milliseconds a frame.

Prints Markdown. Processor time does not depend on what else the machine does, up to its caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from revox.checkpoint.load import load_model
from revox.demo import checkpoint_folder
from revox.model.codec import Codec

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["codec"])
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: the lab checkpoint")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(codec_table(asked.checkpoint or checkpoint_folder()))


if __name__ == "__main__":
    main()
