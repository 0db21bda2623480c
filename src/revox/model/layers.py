"""Building blocks shared by the codec, the backbone and the acoustic transformer."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from .decoder_state import DecoderState
from .linear import Frozen, Linear, is_inference, products

FEW_POSITIONS = 16
"""Of a batch, up to which a convolution is a product; measured at widths of 256 and 1024."""


class RMSNorm(nn.RMSNorm):
    """torch's, of an input of another type than the weight too, as under autocast: in the wider of the two.

    torch computes that in the same way, one operation after another, and warns.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `x` `[..., dim]`; the result has its type."""
        weight = self.weight
        if is_inference(x, weight):  # torch takes some more operations
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1])
            return (x * scale.add_(self.eps).rsqrt_()).mul_(weight)
        if x.dtype == weight.dtype:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, weight.dtype)
        normed = functional.rms_norm(x.to(wide), self.normalized_shape, weight.to(wide), self.eps)
        return normed.type_as(x)


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`, no biases. `[..., dim] -> [..., dim]`."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden_dim)
        self.w2 = Linear(hidden_dim, dim)
        self.w3 = Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `x` `[..., dim]`."""
        if torch.is_grad_enabled():
            return self.w2(functional.silu(self.w1(x)) * self.w3(x))
        gate, up = products(x, self.w1, self.w3)
        return self.w2(functional.silu(gate, inplace=True).mul_(up))  # large for a prompt


class TransformerLayer(nn.Module):
    """Pre-norm layer: `h = x + attention(norm(x))`, then `h + feed_forward(norm(h))`."""

    def __init__(self, attention: nn.Module, dim: int, hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.ffn_norm = RMSNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Apply to `x` `[batch, time, dim]`; the attention is given the `context`.

        Where the attention gives its first positions only, so does the layer.
        """
        attended = self.attention(self.attention_norm(x), *context)
        h = x[:, : attended.shape[1]] + attended
        return h + self.feed_forward(self.ffn_norm(h))


def alibi_slopes(n_heads: int) -> Tensor:
    """Slopes 2^(-8i/n), i = 0..n-1, float32 `[n_heads]`.

    A head count that is no power of two takes the slopes of the next lower power and every second one of
    the next higher, as in the ALiBi paper (arXiv 2108.12409) and vllm-omni's voxtral_tts_audio_tokenizer.py.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(n)]

    lower = 2 ** math.floor(math.log2(n_heads))
    slopes = geometric(n_heads) if lower == n_heads else geometric(lower)
    slopes = slopes + geometric(2 * lower)[::2][: n_heads - lower]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


class CausalConv1d(nn.Module):
    """Causal convolution without bias, under weight norm. `[batch, in, time] -> [batch, out,
    ceil(time/stride)]`.

    Padded by `kernel - stride` on the left and by as much on the right as completes the last frame.
    Mode "reflect" on an input no longer than the padding appends zeros on the right first and cuts them
    after.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        pad_mode: str,
        normed: bool = True,
    ) -> None:
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel, stride=stride, bias=False)
        self.conv = weight_norm(conv) if normed else conv
        self.kernel, self.stride, self.pad_mode = kernel, stride, pad_mode
        self._weight = Frozen()

    def empty_past(self, streams: int) -> Tensor:
        """What a `DecoderState` keeps for this module: the last inputs, `[streams, in, kernel - stride]`."""
        return next(self.parameters()).new_zeros(streams, self.conv.in_channels, self.kernel - self.stride)

    def forward(self, x: Tensor, state: DecoderState | None = None) -> Tensor:
        """Convolve `x` `[batch, in, time]`, which continues `state`'s streams where there is one."""
        left = self.kernel - self.stride
        right = -x.shape[-1] % self.stride
        if state is None:
            return self._convolve(_pad(x, left, right, self.pad_mode))
        return self._convolve(state.prepend(self, x, _pad(x, left, 0, self.pad_mode)[..., :left]))

    def _convolve(self, x: Tensor) -> Tensor:
        if not is_inference(x, next(self.conv.parameters())):
            return cast(Tensor, self.conv(x))
        weight = self._weight.of(self.conv.parameters(), lambda: cast(Tensor, self.conv.weight))
        if len(x) * (x.shape[-1] // self.stride) > FEW_POSITIONS:
            return functional.conv1d(x, weight, stride=self.stride)
        # torch's own kernels take several times as long, and oneDNN lays the weight out for every call.
        windows = x.unfold(-1, self.kernel, self.stride).transpose(1, 2).flatten(2)
        return functional.linear(windows, weight.flatten(1)).transpose(1, 2)


def _pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    if left == 0 and right == 0:
        return x
    if mode != "reflect":
        return functional.pad(x, (left, right), mode)
    missing = max(0, max(left, right) - x.shape[-1] + 1)
    padded = functional.pad(functional.pad(x, (0, missing)), (left, right), "reflect")
    return padded[..., : padded.shape[-1] - missing]


class CausalConvTranspose1d(nn.Module):
    """Transposed convolution without bias, under weight norm; the `kernel - stride` extra samples go from
    the right.

    `[batch, in, time] -> [batch, out, time * stride]`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = weight_norm(
            nn.ConvTranspose1d(in_channels, out_channels, kernel, stride=stride, bias=False)
        )
        self.kernel, self.stride, self.extra = kernel, stride, kernel - stride
        self._weight, self._taps = Frozen(), Frozen()

    def empty_past(self, streams: int) -> Tensor:
        """What a `DecoderState` keeps for this module: samples that lack later inputs, `[streams, out,
        kernel - stride]`."""
        return next(self.parameters()).new_zeros(streams, self.conv.out_channels, self.extra)

    def forward(self, x: Tensor, state: DecoderState | None = None) -> Tensor:
        """Convolve `x` `[batch, in, time]`, which continues `state`'s streams where there is one."""
        out = self._convolve(x)
        time = out.shape[-1] - self.extra
        if state is None:
            return out[..., :time]
        out = out + functional.pad(state.past[self], (0, time))
        state.past[self] = out[..., time:]
        return out[..., :time]

    def _convolve(self, x: Tensor) -> Tensor:
        if not is_inference(x, next(self.conv.parameters())):
            return cast(Tensor, self.conv(x))
        conv = self.conv
        batch, _, time = x.shape
        if batch * time > FEW_POSITIONS or self.kernel % self.stride:
            weight = self._weight.of(conv.parameters(), lambda: cast(Tensor, conv.weight))
            return functional.conv_transpose1d(x, weight, stride=self.stride)
        # What an input adds to each of the `kernel` outputs that it reaches.
        parts = self._taps.of(
            conv.parameters(),
            lambda: cast(Tensor, conv.weight).permute(2, 1, 0).flatten(0, 1).contiguous(),
        )
        taps = functional.linear(x.transpose(1, 2), parts).unflatten(-1, (self.kernel, -1))
        out = taps.new_zeros(batch, time * self.stride + self.extra, taps.shape[-1])
        for first in range(0, self.kernel, self.stride):
            end = first + time * self.stride
            out[:, first:end] += taps[:, :, first : first + self.stride].flatten(1, 2)
        return out.transpose(1, 2)


def rotation(angles: Tensor) -> Tensor:
    """What `rotate_interleaved` takes for pairs turned by `angles` `[..., head_dim / 2]`, in radians:
    cosines and signed sines, `[2, ..., head_dim]`."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1))).flatten(-2)


def rotate_interleaved(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs (2i, 2i+1), the layout of Mistral's files.

    `x` is `[batch, time, heads, head_dim]`, `rotation` is float32 `[2, batch, time, head_dim]`.
    """
    cos, sin = rotation.unsqueeze(-2).unbind()
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)
