"""Hidden state -> one frame of codes: a semantic head and a flow-matching transformer for the acoustic
codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import EMPTY_AUDIO_ID, END_AUDIO_ID, N_SPECIAL_CODES, AcousticConfig, VoxtralConfig
from .layers import RMSNorm, TransformerLayer
from .linear import Linear, products


class BidirectionalAttention(nn.Module):
    """Grouped-query attention without mask and without positions.

    `[batch, time, dim] -> [batch, queries, dim]`.
    """

    def __init__(self, config: AcousticConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Attend within `x` `[batch, time, dim]`, from its first `queries` positions (None: from all).

        In bf16 it is written out, so that it rounds where serving rounds.
        """
        repeats = self.n_heads // self.n_kv_heads
        asked = x[:, :queries].contiguous()  # else the product copies the weight for every item
        if queries is None:
            q, k, v = products(x, self.wq, self.wk, self.wv)
        else:
            q, (k, v) = self.wq(asked), products(x, self.wk, self.wv)
        if x.dtype == torch.float32:
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (q, k, v))
            out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=repeats > 1)
            return self.wo(out.transpose(1, 2).flatten(2))
        q = q.unflatten(-1, (self.n_heads, -1)) * (1.0 / self.head_dim**0.5)
        k = k.unflatten(-1, (self.n_kv_heads, -1)).repeat_interleave(repeats, dim=2)
        v = v.unflatten(-1, (self.n_kv_heads, -1)).repeat_interleave(repeats, dim=2)
        weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1)
        return self.wo((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


class AcousticTransformer(nn.Module):
    """Semantic logits and acoustic velocities from the backbone's normed hidden state `[batch,
    input_dim]`."""

    def __init__(self, config: VoxtralConfig) -> None:
        super().__init__()
        self.config = args = config.acoustic
        self.semantic_rows = config.codebook_rows[0]
        self.levels, self.acoustic_dim = config.codec.acoustic_codebook_size, config.codec.acoustic_dim
        self.input_projection = Linear(self.acoustic_dim, args.dim)
        self.time_projection = Linear(args.dim, args.dim)
        self.llm_projection = Linear(args.input_dim, args.dim)
        self.semantic_codebook_output = Linear(args.input_dim, config.semantic_output_rows)
        self.acoustic_codebook_output = Linear(args.dim, self.acoustic_dim)
        self.layers = nn.ModuleDict(
            {
                str(i): TransformerLayer(
                    BidirectionalAttention(args), args.dim, args.hidden_dim, args.norm_eps
                )
                for i in range(args.n_layers)
            }
        )
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self._projected_times: dict[tuple[object, ...], Tensor] = {}

    def semantic_logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[..., rows]` over semantic ids; `[EMPTY_AUDIO]` and the padding rows are -inf.

        The product is taken in the weights' dtype and cast afterwards, as serving does.
        """
        logits = self.semantic_codebook_output(hidden).float()
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill((ids == EMPTY_AUDIO_ID) | (ids >= self.semantic_rows), float("-inf"))

    def embed_time(self, times: Tensor) -> Tensor:
        """`[cos(t f), sin(t f)]`, f_i = 10000^(-i / (dim / 2)): `[n] -> [n, dim]`, in float32, cast to t's
        dtype."""
        half = self.config.dim // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=times.device).float() / half)
        angles = times.float()[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1).to(times.dtype)

    def velocity(self, x: Tensor, times: Tensor, hidden: Tensor) -> Tensor:
        """Velocity `[batch, 36]` at the point `x` `[batch, 36]` and `times` `[batch]`, given `hidden`
        `[batch, input_dim]`."""
        return self._velocity(x, self.time_projection(self.embed_time(times)), self.llm_projection(hidden))

    def _velocity(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        h = torch.stack((self.input_projection(x), time, condition), dim=1)
        *layers, last = self.layers.values()
        for layer in layers:
            h = layer(h)
        # Only the first position is read, so the last layer computes no other.
        return self.acoustic_codebook_output(self.norm(last(h, 1))[:, 0])

    def _project_times(self, times: Tensor) -> Tensor:
        """The projected embeddings of `times` `[n]`, `[n, dim]`; of frozen weights they are computed once."""
        weight = self.time_projection.weight
        # They may change, changes cannot be seen, or the function is traced.
        if torch.compiler.is_compiling() or weight.requires_grad or weight.is_inference():
            return self.time_projection(self.embed_time(times))
        of_these = (len(times), times.dtype, weight.data_ptr(), weight._version)
        if of_these not in self._projected_times:
            self._projected_times[of_these] = self.time_projection(self.embed_time(times))
        return self._projected_times[of_these]

    def flow(
        self, hidden: Tensor, noise: Tensor, cfg_alpha: float | Tensor = 1.2, steps: int | None = None
    ) -> Tensor:
        """Integrate the velocity from `noise` `[batch, 36]` to a point `[batch, 36]`, before clamping and
        rounding.

        Euler over linspace(0, 1, steps + 1); each step takes a v(x, t, h) + (1 - a) v(x, t, 0), both
        branches in one batch. Everything is in `hidden`'s dtype, `cfg_alpha` (a number or `[batch]`)
        included, as in serving.
        """
        batch, dtype, device = hidden.shape[0], hidden.dtype, hidden.device
        steps = steps or self.config.n_decoding_steps
        # Taken in the dtype itself: in bf16 6/7 comes out as 0.859, as in serving; cast from float32 it is
        # 0.855.
        times = torch.linspace(0, 1, steps + 1, dtype=dtype, device=device)
        # The time embedding is taken of the cast times, multiplied out in float32.
        projected = self._project_times(times)
        alpha = torch.as_tensor(cfg_alpha, device=device).to(dtype).expand(batch)[:, None]
        condition = self.llm_projection(torch.cat((hidden, torch.zeros_like(hidden))))
        x = noise.to(dtype)
        for i in range(steps):
            v = self._velocity(torch.cat((x, x)), projected[i].expand(2 * batch, -1), condition)
            x = x + (alpha * v[:batch] + (1 - alpha) * v[batch:]) * (times[i + 1] - times[i])
        return x

    def frame(
        self,
        hidden: Tensor,
        noise: Tensor,
        cfg_alpha: float | Tensor = 1.2,
        steps: int | None = None,
        may_end: Tensor | None = None,
    ) -> Tensor:
        """Ids `[batch, 37]` of one frame; an ended item (semantic id 1) carries acoustic ids 2.

        Items whose `may_end` `[batch]` is false take the most likely code that is not the end.
        """
        logits = self.semantic_logits(hidden)
        if may_end is not None:
            logits[..., END_AUDIO_ID].masked_fill_(~may_end, float("-inf"))
        semantic = logits.argmax(dim=-1)
        point = self.flow(hidden, noise, cfg_alpha, steps).clamp(-1, 1)
        levels = (((point + 1) / 2) * (self.levels - 1)).round().long()
        levels = levels.masked_fill((semantic == END_AUDIO_ID)[:, None], 0)
        return torch.cat((semantic[:, None], levels + N_SPECIAL_CODES), dim=1)
