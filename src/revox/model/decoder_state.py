"""What the codec's decoder carries from one chunk of frames to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class DecoderState:
    """The decoder's memory of the frames it has decoded, for a batch of streams at any positions.

    `frames` `[streams]` counts them, on the decoder's device. `past` has a tensor `[streams, ...]` for each
    module that looks back: the last inputs of a causal convolution, the unfinished end of a transposed one,
    the keys and values of a sliding window. Shapes do not depend on the position, so any streams can share a
    batch. Tensors are replaced, never written to: a copy made by `stack` is independent of its sources.
    """

    frames: Tensor
    past: dict[nn.Module, Tensor] = field(default_factory=dict)
    chunk: int = 0
    """Frames in the chunk that is being decoded."""

    @classmethod
    def stack(cls, states: Sequence[DecoderState]) -> DecoderState:
        """Several states as the batch of one."""
        past = {module: torch.cat([state.past[module] for state in states]) for module in states[0].past}
        return cls(torch.cat([state.frames for state in states]), past)

    def split(self) -> list[DecoderState]:
        """The state of each stream, in memory of its own."""
        return [
            DecoderState(
                self.frames[i : i + 1].clone(),
                {module: tensor[i : i + 1].clone() for module, tensor in self.past.items()},
            )
            for i in range(len(self.frames))
        ]

    @property
    def nbytes(self) -> int:
        """Memory that the state takes, in bytes."""
        return sum(tensor.nbytes for tensor in self.past.values())

    def positions(self, time: int) -> Tensor:
        """Positions `[streams]` before the present chunk, at the rate where the chunk has `time` of them."""
        return self.frames * (time // self.chunk)

    def prepend(self, module: nn.Module, x: Tensor, start: Tensor) -> Tensor:
        """`x` `[streams, channels, time]` after `module`'s last inputs; streams that begin have `start`.

        As many inputs as `start` `[streams, channels, left]` has are saved for the next chunk.
        """
        begins = (self.frames == 0)[:, None, None]
        x = torch.cat((torch.where(begins, start, self.past[module]), x), dim=-1)
        self.past[module] = x[..., x.shape[-1] - start.shape[-1] :]
        return x
