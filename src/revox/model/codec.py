"""The codec: waveform <-> latents <-> codes, causal, 37 codes a frame (Voxtral TTS paper, section on the
codec)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import CodecConfig
from .decoder_state import DecoderState
from .layers import CausalConv1d, CausalConvTranspose1d, RMSNorm, TransformerLayer, alibi_slopes
from .linear import Linear
from .quantizer import Quantizer

PIECE = 100
"""Frames decoded at a time. The attention has a mask of patches squared: the longest speech, 2048 frames,
would take 9 GB in one piece."""


class CodecAttention(nn.Module):
    """Causal self-attention over a sliding window, with ALiBi and RMSNorm on whole q and k before the heads.

    A query sees itself and `window` positions back. `[batch, time, dim] -> [batch, time, dim]`.
    """

    slopes: Tensor

    def __init__(self, config: CodecConfig, window: int) -> None:
        super().__init__()
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.n_heads, self.n_kv_heads, self.window = config.n_heads, config.n_kv_heads, window
        self.wq = Linear(config.dim, q_dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(q_dim, config.dim)
        self.q_norm = RMSNorm(q_dim, eps=config.qk_norm_eps)
        self.k_norm = RMSNorm(kv_dim, eps=config.qk_norm_eps)
        self.register_buffer("slopes", alibi_slopes(config.n_heads), persistent=False)

    def empty_past(self, streams: int) -> Tensor:
        """What a `DecoderState` keeps for this module: keys and values of the window, `[streams, 2, kv_heads,
        window, head_dim]`."""
        head_dim = self.wk.out_features // self.n_kv_heads
        return self.wk.weight.new_zeros(streams, 2, self.n_kv_heads, self.window, head_dim)

    def forward(self, x: Tensor, state: DecoderState | None = None) -> Tensor:
        """Attend within `x` `[batch, time, dim]`, and to what came before it in `state`'s streams."""
        q = self.q_norm(self.wq(x)).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k = self.k_norm(self.wk(x)).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        bias = self._bias(x.shape[1], 0 if state is None else self.window, q.dtype, x.device)
        if state is not None:
            both = torch.cat((state.past[self], torch.stack((k, v), dim=1)), dim=3)
            state.past[self] = both[:, :, :, -self.window :]
            k, v = both.unbind(1)
            age = torch.arange(self.window, -x.shape[1], -1, device=x.device)
            missing = age > state.positions(x.shape[1])[:, None]
            bias = bias.masked_fill(missing[:, None, None], float("-inf"))
        grouped = self.n_heads != self.n_kv_heads
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)
        return self.wo(out.transpose(1, 2).flatten(2))

    def _bias(self, time: int, before: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`[1, heads, time, before + time]`, to be added to the products of queries and keys."""
        positions = torch.arange(-before, time, device=device)
        ahead = positions[None, :] - positions[before:, None]
        # The product is taken in the activations' dtype, as serving does without flash-attention.
        bias = self.slopes.to(dtype)[:, None, None] * ahead.to(dtype)
        hidden = (ahead > 0) | (ahead < -self.window)
        return bias.masked_fill(hidden, float("-inf"))[None]


class CodecLayer(TransformerLayer):
    """Layer with a per-channel LayerScale on both branches."""

    def __init__(self, config: CodecConfig, window: int) -> None:
        super().__init__(CodecAttention(config, window), config.dim, config.hidden_dim, config.norm_eps)
        self.attention_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale_init))
        self.ffn_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale_init))

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Apply to `x` `[batch, time, dim]`; the attention is given the `context`."""
        h = x + self.attention_scale * self.attention(self.attention_norm(x), *context)
        return h + self.ffn_scale * self.feed_forward(self.ffn_norm(h))


class CodecTransformer(nn.Module):
    """A stack of layers without a final norm. `[batch, time, dim] -> [batch, time, dim]`."""

    def __init__(self, config: CodecConfig, n_layers: int, window: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): CodecLayer(config, window) for i in range(n_layers)})

    def forward(self, x: Tensor, state: DecoderState | None = None) -> Tensor:
        """Apply to `x` `[batch, time, dim]`, which continues `state`'s streams where there is one."""
        for layer in self.layers.values():
            x = layer(x, state)
        return x


class Codec(nn.Module):
    """Encoder, quantizer and decoder; the release carries the last two only.

    Built `with_encoder=False` it has no parameter for the encoder, and encoding raises RuntimeError.
    """

    def __init__(self, config: CodecConfig, with_encoder: bool) -> None:
        super().__init__()
        self.config = config
        self.has_encoder = with_encoder
        window = config.attn_sliding_window_size
        halving = config.half_attn_window_upon_downsampling
        if with_encoder:
            self.input_proj = CausalConv1d(
                config.pretransform_patch_size, config.dim, config.patch_proj_kernel_size, 1, "reflect",
                config.conv_weight_norm,
            )  # fmt: skip
        encoder_blocks: list[nn.Module] = []
        last = len(config.encoder_transformer_lengths) - 1
        for i, n_layers in enumerate(config.encoder_transformer_lengths):
            encoder_blocks.append(CodecTransformer(config, n_layers, window))
            kernel, stride = config.encoder_convs_kernels[i], config.encoder_convs_strides[i]
            if i == last or (kernel, stride) != (1, 1):
                out = config.latent_dim if i == last else config.dim
                encoder_blocks.append(CausalConv1d(config.dim, out, kernel, stride, "replicate"))
                if halving and stride > 1:
                    window //= 2
        if with_encoder:
            self.encoder_blocks = nn.ModuleList(encoder_blocks)

        kernel, stride = config.decoder_convs_kernels[0], config.decoder_convs_strides[0]
        decoder_blocks: list[nn.Module] = [
            CausalConv1d(config.latent_dim, config.dim, kernel, stride, "replicate")
        ]
        for i, n_layers in enumerate(config.decoder_transformer_lengths):
            decoder_blocks.append(CodecTransformer(config, n_layers, window))
            if i + 1 < len(config.decoder_transformer_lengths):
                kernel, stride = config.decoder_convs_kernels[i + 1], config.decoder_convs_strides[i + 1]
                if (kernel, stride) != (1, 1):
                    decoder_blocks.append(CausalConvTranspose1d(config.dim, config.dim, kernel, stride))
                    if halving and stride > 1:
                        window *= 2
        self.decoder_blocks = nn.ModuleList(decoder_blocks)
        self.output_proj = CausalConv1d(
            config.dim, config.pretransform_patch_size, config.patch_proj_kernel_size, 1, "reflect",
            config.conv_weight_norm,
        )  # fmt: skip
        self.quantizer = Quantizer(
            config.semantic_codebook_size,
            config.semantic_dim,
            config.acoustic_codebook_size,
            config.acoustic_dim,
        )
        self.left_context = _left_context(self)
        """Frames before its own that a frame of audio depends on: 21 for the release (serving takes 25)."""

    @property
    def samples_per_frame(self) -> int:
        """Samples of audio that one frame of codes stands for."""
        return self.config.samples_per_frame

    def encode_latents(self, waveform: Tensor) -> Tensor:
        """Latents `[batch, latent_dim, frames]` of `waveform` `[batch, samples]`, the last frame completed.

        Raises RuntimeError without an encoder.
        """
        if not self.has_encoder:
            raise RuntimeError("this codec was built without its encoder")
        patch = self.config.pretransform_patch_size
        waveform = functional.pad(waveform, (0, -waveform.shape[-1] % patch))
        x = self.input_proj(waveform.unflatten(-1, (-1, patch)).transpose(1, 2)).transpose(1, 2)
        # Laid out in memory as serving does: matrix products add up in another order otherwise, and in bf16
        # 3 % of the codes change at the release's sizes.
        return _through(self.encoder_blocks, x.contiguous()).transpose(1, 2)

    def encode(self, waveform: Tensor) -> Tensor:
        """Codes `[batch, n_codebooks, frames]`, int64, from 0, of `waveform` `[batch, samples]`."""
        return self.quantizer.encode(self.encode_latents(waveform))

    def encode_as_served(self, waveform: Tensor) -> Tensor:
        """Codes of one clip `[1, samples]` with the numerics of serving.

        The encoder runs under bf16 autocast, the quantizer outside of it on the bf16 latents (vllm-omni's
        `_tokenize_audio`). The weights should be bf16 as well.
        """
        with torch.autocast(waveform.device.type, dtype=torch.bfloat16):
            latents = self.encode_latents(waveform)
        return self.quantizer.encode(latents)

    def decode_latents(self, latents: Tensor, state: DecoderState | None = None) -> Tensor:
        """Waveform `[batch, frames * samples_per_frame]` of `latents` `[batch, latent_dim, frames]`; never
        clipped.

        All in one piece, in memory that grows with the frames squared: for losses on short pieces. With a
        `state` the latents continue its streams.
        """
        x = _through(self.decoder_blocks, latents.transpose(1, 2), state)
        patches = self.output_proj(x.transpose(1, 2), state)
        return patches.transpose(1, 2).flatten(1)

    def decode_whole(self, codes: Tensor) -> Tensor:
        """What `decode` gives of all `codes`, in one piece: what parity tests compare."""
        return self.decode_latents(self.quantizer.decode(codes, self._dtype))

    def empty_state(self, streams: int = 1) -> DecoderState:
        """The state of so many streams before their first frames."""
        looking_back = (CausalConv1d, CausalConvTranspose1d, CodecAttention)
        modules = [*self.decoder_blocks.modules(), self.output_proj]
        past: dict[nn.Module, Tensor] = {
            module: module.empty_past(streams) for module in modules if isinstance(module, looking_back)
        }
        frames = torch.zeros(streams, dtype=torch.long, device=next(self.output_proj.parameters()).device)
        return DecoderState(frames, past)

    def decode(self, codes: Tensor, state: DecoderState | None = None) -> Tensor:
        """Waveform `[batch, samples]` of `codes` `[batch, n_codebooks, frames]` (from 0), in the weights'
        dtype; never clipped.

        With a `state` the codes continue its streams, and the state moves on: in chunks of any sizes this
        gives what all at once gives, up to rounding, and no frame is decoded twice. Memory is bounded: long
        codes are decoded in such chunks.
        """
        state = state or self.empty_state(codes.shape[0])
        pieces = [codes.new_zeros((codes.shape[0], 0), dtype=self._dtype)]
        for piece in codes.split(PIECE, dim=-1) if codes.shape[-1] else ():
            state.chunk = piece.shape[-1]
            pieces.append(self.decode_latents(self.quantizer.decode(piece, self._dtype), state))
            state.frames = state.frames + state.chunk
        return torch.cat(pieces, dim=1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.output_proj.parameters()).dtype


def _through(blocks: nn.ModuleList, x: Tensor, state: DecoderState | None = None) -> Tensor:
    """`x` `[batch, time, dim]` through transformers and convolutions, which want time last."""
    for block in blocks:
        if isinstance(block, CodecTransformer):
            x = block(x, state)
        else:
            x = block(x.transpose(1, 2), state).transpose(1, 2)
    return x


def _left_context(codec: Codec) -> int:
    """Goes back from a frame's first sample through the decoder: a convolution of kernel k sees k - 1
    positions back; a layer of attention its window; a transposed convolution of kernel k and stride s makes
    position t from positions ceil((t - k + 1) / s) and later."""
    far = 1000  # any frame far from the start
    position = far * codec.config.patches_per_frame - (codec.output_proj.kernel - 1)
    for block in reversed(codec.decoder_blocks):
        if isinstance(block, CodecTransformer):
            windows = [cast(CodecAttention, layer.attention).window for layer in block.layers.values()]
            position -= sum(windows)
        elif isinstance(block, CausalConv1d):
            position -= block.kernel - 1
        else:
            conv = cast(nn.ConvTranspose1d, block.conv)
            position = -((conv.kernel_size[0] - 1 - position) // conv.stride[0])
    return far - position
