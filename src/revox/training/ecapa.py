"""ECAPA-TDNN (arXiv 2005.07143) with SpeechBrain's parameter names, so that its published file loads.

The network and front end of `speechbrain/spkrec-ecapa-voxceleb`, whose `embedding_model.ckpt` is a plain
state dict: 80 mel bands, 1024 channels, embeddings of 192. Everything is differentiable to the waveform. A
clip in a batch gives exactly what it gives alone (SpeechBrain's own does so for batches of one length
only): reflections start at each clip's own end, and nothing is averaged over padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revox.losses.stft import hz_to_mel, power, stft

_HOP, _WINDOW, _RATE = 160, 400, 16000


class Frames:
    """Which frames of a padded batch are real: `counts` `[batch]` of `longest`."""

    def __init__(self, counts: Tensor, longest: int) -> None:
        self.counts, self.longest = counts, longest
        place = torch.arange(longest, device=counts.device)
        self.mask = (place < counts[:, None])[:, None]  # [batch, 1, frames]
        self._reflected: dict[int, Tensor] = {}

    def reflect(self, x: Tensor, pad: int) -> Tensor:
        """`x` `[batch, channels, frames]` with `pad` more frames on both sides, mirrored at each own end."""
        if pad not in self._reflected:
            place = torch.arange(-pad, self.longest + pad, device=x.device).abs()
            last = self.counts[:, None] - 1
            mirrored = torch.where(place > last, 2 * last - place, place)
            self._reflected[pad] = mirrored.clamp(0, self.longest - 1)[:, None]
        index = self._reflected[pad]
        return x.gather(2, index.expand(-1, x.shape[1], -1))

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` `[batch, channels, frames]` over real frames: `[batch, channels, 1]`."""
        return (x * self.mask).sum(2, keepdim=True) / self.counts[:, None, None]


class _Conv(nn.Module):
    """SpeechBrain's "same" convolution, mirrored at the ends; `conv.weight` as it names it."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation)
        self.pad = dilation * (kernel - 1) // 2

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        return self.conv(frames.reflect(x, self.pad) if self.pad else x)


class _Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class _Tdnn(nn.Module):
    """Convolution, ReLU, batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = _Conv(inputs, outputs, kernel, dilation)
        self.norm = _Norm(outputs)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        return self.norm(F.relu(self.conv(x, frames)))


class _Res2Net(nn.Module):
    """Groups of channels, each convolved with the result of the one before (section 3.2)."""

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.blocks = nn.ModuleList(_Tdnn(width, width, kernel, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        first, *rest = x.chunk(len(self.blocks) + 1, dim=1)
        out, last = [first], None
        for block, part in zip(self.blocks, rest, strict=True):
            last = block(part if last is None else part + last, frames)
            out.append(last)
        return torch.cat(out, dim=1)


class _SqueezeExcitation(nn.Module):
    """Channels weighed by what the whole clip holds (section 3.2)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Conv(channels, squeezed), _Conv(squeezed, channels)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        weight = self.conv2(F.relu(self.conv1(frames.mean(x), frames)), frames)
        return torch.sigmoid(weight) * x


class _Block(nn.Module):
    def __init__(self, channels: int, scale: int, squeezed: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.tdnn1, self.tdnn2 = _Tdnn(channels, channels), _Tdnn(channels, channels)
        self.res2net_block = _Res2Net(channels, scale, kernel, dilation)
        self.se_block = _SqueezeExcitation(channels, squeezed)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        inner = self.tdnn2(self.res2net_block(self.tdnn1(x, frames), frames), frames)
        return x + self.se_block(inner, frames)


class _AttentivePooling(nn.Module):
    """Mean and deviation over time, weighed by attention for each channel, with global context (3.1)."""

    def __init__(self, channels: int, attention: int) -> None:
        super().__init__()
        self.tdnn, self.conv = _Tdnn(3 * channels, attention), _Conv(attention, channels)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        mean, deviation = _moments(x, frames.mask / frames.counts[:, None, None])
        context = torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], dim=1)
        scores = self.conv(torch.tanh(self.tdnn(context, frames)), frames)
        weights = scores.masked_fill(~frames.mask, -math.inf).softmax(dim=2)
        return torch.cat(_moments(x, weights), dim=1)


def _moments(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = (weights * x).sum(2, keepdim=True)
    return mean, (weights * (x - mean).square()).sum(2, keepdim=True).clamp(min=1e-12).sqrt()


@dataclass(frozen=True)
class EcapaSizes:
    """Sizes of a network; the defaults are those of `speechbrain/spkrec-ecapa-voxceleb`."""

    mels: int = 80
    channels: int = 1024
    aggregated: int = 3072
    kernels: tuple[int, ...] = (5, 3, 3, 3)
    dilations: tuple[int, ...] = (1, 2, 3, 4)
    attention: int = 128
    squeezed: int = 128
    scale: int = 8
    dim: int = 192


class EcapaTdnn(nn.Module):
    """Speaker embeddings of waveforms at 16 kHz."""

    rate = _RATE

    def __init__(self, sizes: EcapaSizes | None = None) -> None:
        super().__init__()
        sizes = sizes or EcapaSizes()
        channels, aggregated = sizes.channels, sizes.aggregated
        self.mels = sizes.mels
        self.blocks = nn.ModuleList([_Tdnn(sizes.mels, channels, sizes.kernels[0], sizes.dilations[0])])
        for kernel, dilation in zip(sizes.kernels[1:], sizes.dilations[1:], strict=True):
            self.blocks.append(_Block(channels, sizes.scale, sizes.squeezed, kernel, dilation))
        self.mfa = _Tdnn(channels * (len(sizes.kernels) - 1), aggregated)
        self.asp = _AttentivePooling(aggregated, sizes.attention)
        self.asp_bn = _Norm(2 * aggregated)
        self.fc = _Conv(2 * aggregated, sizes.dim)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> EcapaTdnn:
        """The network of a SpeechBrain state dict, its sizes read from the tensors' shapes.

        Dilations, which no tensor shows, are the paper's 1, 2, 3, 4. Raises KeyError or RuntimeError for
        another network's.
        """
        first, aggregated = state["blocks.0.conv.conv.weight"], state["mfa.conv.conv.weight"]
        blocks = aggregated.shape[1] // first.shape[0]
        inner = "blocks.1.res2net_block.blocks.0.conv.conv.weight"
        sizes = EcapaSizes(
            mels=first.shape[1],
            channels=first.shape[0],
            aggregated=aggregated.shape[0],
            kernels=(first.shape[2], *[state[inner].shape[2]] * blocks),
            dilations=tuple(range(1, blocks + 2)),
            attention=state["asp.conv.conv.weight"].shape[1],
            squeezed=state["blocks.1.se_block.conv1.conv.weight"].shape[0],
            scale=first.shape[0] // state[inner].shape[0],
            dim=state["fc.conv.weight"].shape[0],
        )
        network = cls(sizes)
        network.load_state_dict(state)
        return network

    def forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings `[batch, dim]` of `waveforms` `[batch, samples]` at 16 kHz, `lengths` `[batch]` each.

        What lies beyond a clip's length must be zero; a clip has 800 samples (50 ms) or more.
        """
        frames = Frames(lengths // _HOP + 1, waveforms.shape[1] // _HOP + 1)
        return self.embed(fbank(waveforms, self.mels, frames), frames)

    def embed(self, features: Tensor, frames: Frames) -> Tensor:
        """Embeddings `[batch, dim]` of log-mel features `[batch, mels, frames]`."""
        x = features - frames.mean(features)  # what a microphone adds, it adds to all frames
        first, *blocks = self.blocks
        x = first(x, frames)
        found = []
        for block in blocks:
            x = block(x, frames)
            found.append(x)
        x = self.mfa(torch.cat(found, dim=1), frames)
        x = self.asp_bn(self.asp(x, frames))
        return self.fc(x, frames).squeeze(2)


def fbank(waveforms: Tensor, mels: int, frames: Frames) -> Tensor:
    """SpeechBrain's log-mel features in dB, `[batch, mels, frames]`, of `[batch, samples]` at 16 kHz.

    (`speechbrain.lobes.features.Fbank`): Hamming windows of 25 ms every 10 ms, silence beyond the ends,
    power, triangles on the HTK mel scale, nothing lower than 80 dB under a clip's own highest value.
    """
    powers = power(stft(waveforms, _WINDOW, _HOP, window="hamming", pad_mode="constant"))
    decibels = 10 * (_triangles(mels).to(powers) @ powers).clamp(min=1e-10).log10()
    highest = decibels.masked_fill(~frames.mask, -math.inf).amax(dim=(1, 2), keepdim=True)
    return decibels.maximum(highest - 80)


@lru_cache(maxsize=4)
def _triangles(mels: int) -> Tensor:
    """`[mels, bins]`: height 1, both slopes as wide as the step from the lower neighbor (SpeechBrain)."""
    with torch.inference_mode(False):
        highest = float(hz_to_mel(_RATE / 2, htk=True))
        hz = 700 * (10 ** (torch.linspace(0, highest, mels + 2) / 2595) - 1)  # in float32, as SpeechBrain
        center, step = hz[1:-1, None], (hz[1:-1] - hz[:-2])[:, None]
        bins = torch.linspace(0, _RATE / 2, _WINDOW // 2 + 1)
        return (1 - ((bins - center) / step).abs()).clamp(min=0)
