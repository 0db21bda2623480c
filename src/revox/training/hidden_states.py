"""Hidden states of the encoder matched to the decoder's, at every rate of the codec.

The encoder mirrors the decoder: both have a transformer at 100, 50, 25 and 12.5 Hz. Of a pair the decoder's
hidden states are known, and they are a target much nearer to the encoder's first layers than its codes
(FitNets, arXiv 1412.6550):

    L_hidden = mean over rates of |W_r e_r - (d_r - mean) / deviation|^2

with e_r the encoder's hidden state after its transformer at the rate r, scaled to a root mean square of 1,
W_r a linear map that is learned with the encoder, and d_r the decoder's, standardized by channel over the
batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from revox.model.codec import Codec, CodecTransformer


class HiddenStates(nn.Module):
    """The maps W_r, from the highest rate to the lowest, and the losses."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        dim = codec.config.dim
        self.maps = nn.ModuleList(
            nn.Linear(dim, dim, bias=False) for _ in _transformers(codec.encoder_blocks)
        )

    def losses(self, encoder: list[Tensor], decoder: list[Tensor]) -> list[Tensor]:
        """A loss for each rate; of hidden states `[batch, positions, dim]`, the decoder's without a graph."""
        found = []
        for learned, given, wanted in zip(self.maps, encoder, decoder, strict=True):
            wanted = wanted.float()
            mean, deviation = wanted.mean(dim=(0, 1)), wanted.std(dim=(0, 1)).clamp_min(1e-5)
            mapped: Tensor = learned(functional.rms_norm(given.float(), given.shape[-1:]))
            found.append((mapped - (wanted - mean) / deviation).square().mean())
        return found


@contextlib.contextmanager
def captured(blocks: nn.ModuleList, *, lowest_first: bool = False) -> Iterator[list[Tensor]]:
    """The outputs of the transformers among `blocks` for what they are given within, the highest rate first;
    `lowest_first` says that `blocks` begin with the lowest (the decoder's)."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _given, made: found.append(made))
        for block in _transformers(blocks)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        if lowest_first:
            found.reverse()


def _transformers(blocks: nn.ModuleList) -> list[nn.Module]:
    return [block for block in blocks if isinstance(block, CodecTransformer)]
