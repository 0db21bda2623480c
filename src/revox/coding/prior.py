"""What codes look like when the model itself makes them, from its presets: where inversion starts and stays.

Many codes that the language model would never produce decode well; the presets' codes show those it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from revox.coding.objective import FLOOR
from revox.losses.stft import log_mel
from revox.model.codec import Codec

MEL_BANDS = 80
COLUMNS_PER_FRAME = 4
JOIN_COST = 0.5  # nats of log-mel distance that a break between two stretches of a preset must save
SWEEP_CODES = 512
SWEEP_FRAMES = 4


@dataclass(frozen=True)
class CodePrior:
    """Statistics of codes the model made.

    `acoustic_mean` and `acoustic_std` `[36]` are of levels as values in [-1, 1]; `semantic_log_frequency`
    `[size]` is the smoothed log frequency of each semantic code; `preset_codes` are the codes, each
    `[37, frames]`.
    """

    acoustic_mean: Tensor
    acoustic_std: Tensor
    semantic_log_frequency: Tensor
    preset_codes: tuple[Tensor, ...]

    @classmethod
    def from_codes(cls, codes: Sequence[Tensor], codec: Codec) -> CodePrior:
        """From the codes `[37, frames]` (from 0) of any number of presets. Raises ValueError without any."""
        if not codes:
            raise ValueError("a prior needs the codes of at least one preset")
        preset_codes = tuple(c.long().cpu() for c in codes)
        frames = torch.cat(preset_codes, dim=1)
        values = codec.quantizer.acoustic_codebook.decode(frames[1:])
        size = codec.config.semantic_codebook_size
        counts = torch.bincount(frames[0], minlength=size).float()
        # Half a count for every code: an unseen one is unlikely, not impossible.
        frequency = (counts + 0.5) / (counts.sum() + 0.5 * size)
        # A codebook that never moves in the presets may still move by a level.
        level = 2 / (codec.config.acoustic_codebook_size - 1)
        deviation = values.std(dim=1, correction=0).clamp_min(level)
        return cls(values.mean(dim=1), deviation, frequency.log(), preset_codes)

    def to(self, device: torch.device) -> CodePrior:
        """The same on another device (the codes stay where they are)."""
        return CodePrior(
            self.acoustic_mean.to(device),
            self.acoustic_std.to(device),
            self.semantic_log_frequency.to(device),
            self.preset_codes,
        )

    def cost(self, semantic: Tensor, acoustic: Tensor) -> Tensor:
        """How unlikely codes are: a scalar, nats a code.

        `semantic` are probabilities `[frames, size]`, `acoustic` values in [-1, 1] `[36, frames]`.
        """
        surprise = -(semantic @ self.semantic_log_frequency).mean()
        return self._acoustic_cost(acoustic) + surprise / acoustic.shape[0]

    def cost_of_codes(self, semantic: Tensor, acoustic: Tensor) -> Tensor:
        """The same, `[batch]`, of hard codes `[batch, frames]` and acoustic values `[batch, 36, frames]`."""
        surprise = -self.semantic_log_frequency[semantic].mean(dim=1)
        return self._acoustic_cost(acoustic) + surprise / acoustic.shape[1]

    def _acoustic_cost(self, values: Tensor) -> Tensor:
        # The Gaussian of each codebook, but for its constant.
        deviation = (values - self.acoustic_mean[:, None]) / self.acoustic_std[:, None]
        return 0.5 * deviation.square().mean(dim=(-2, -1))


@torch.no_grad()
def starting_codes(
    codec: Codec, target: Tensor, prior: CodePrior | None, generator: torch.Generator
) -> Tensor:
    """Codes `[37, frames]` whose decoded sound is near `target` `[samples]`, a whole number of frames.

    With a prior: the cheapest sequence of preset frames, where staying in a preset's own order is free and
    a jump costs JOIN_COST (unit selection, Hunt and Black 1996). Without: each frame on its own, from a
    sweep over the semantic codes with the acoustic levels in the middle.
    """
    if prior is None:
        units, features, follows = _sweep(codec, generator)
        join = 0.0
    else:
        units, features, follows = _preset_units(codec, prior)
        join = JOIN_COST
    wanted = _features(target[None], codec)[0]
    distance = torch.cdist(wanted, features, p=1) / features.shape[1]  # mean nats, [frames, units]
    return units[:, _cheapest_path(distance.cpu(), follows, join)].to(target.device)


def _cheapest_path(distance: Tensor, follows: Tensor, join: float) -> Tensor:
    """Viterbi over `distance` `[frames, units]`: the units' indices, `[frames]`.

    A step from a unit to the next is free where `follows` `[units]` marks the next; any other costs
    `join`.
    """
    cost = distance[0]
    back = []
    for row in distance[1:]:
        jump_cost, jump_from = cost.min(dim=0)
        stay = torch.roll(cost, 1).masked_fill(~follows, float("inf"))
        stays = stay <= jump_cost + join
        back.append(torch.where(stays, torch.arange(len(cost)) - 1, jump_from))
        cost = torch.where(stays, stay, jump_cost + join) + row
    path = [int(cost.argmin())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return torch.tensor(path[::-1])


def _preset_units(codec: Codec, prior: CodePrior) -> tuple[Tensor, Tensor, Tensor]:
    device = codec.output_proj.conv.weight.device
    features, follows = [], []
    for codes in prior.preset_codes:
        features.append(_features(codec.decode(codes[None].to(device)), codec)[0])
        follows.append(torch.arange(codes.shape[1]) > 0)
    return torch.cat(prior.preset_codes, dim=1), torch.cat(features), torch.cat(follows)


def _sweep(codec: Codec, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    config = codec.config
    semantic = torch.randperm(config.semantic_codebook_size, generator=generator)[:SWEEP_CODES]
    units = torch.full((config.n_codebooks, len(semantic)), config.acoustic_codebook_size // 2)
    units[0] = semantic
    device = codec.output_proj.conv.weight.device
    steady = units.T[:, :, None].expand(-1, -1, SWEEP_FRAMES).to(device)
    features = [_features(codec.decode(group), codec)[:, -1] for group in steady.split(64)]
    return units, torch.cat(features), torch.zeros(len(semantic), dtype=torch.bool)


def _features(waveform: Tensor, codec: Codec) -> Tensor:
    """Log-mel columns of each codec frame: `[batch, samples]` -> `[batch, frames, bands * columns]`."""
    rate, frame = codec.config.sampling_rate, codec.samples_per_frame
    hop = frame // COLUMNS_PER_FRAME
    n_fft = 1 << round(math.log2(rate * 1024 / 24000))
    bands = min(MEL_BANDS, n_fft // 8)
    mel = log_mel(waveform, rate, n_fft, hop, bands, floor=FLOOR * n_fft)
    frames = waveform.shape[-1] // frame
    mel = functional.pad(mel, (0, max(0, frames * COLUMNS_PER_FRAME - mel.shape[-1])))
    mel = mel[..., : frames * COLUMNS_PER_FRAME].unflatten(-1, (frames, COLUMNS_PER_FRAME))
    return mel.permute(0, 2, 1, 3).flatten(2)
