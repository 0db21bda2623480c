"""The language model: a Mistral decoder (RMSNorm, grouped-query attention, RoPE on interleaved pairs,
SwiGLU)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import BackboneConfig
from .layers import FeedForward, rotate_interleaved


class KVCache:
    """Keys and values of every layer for a batch, of fixed capacity, each item at its own length.

    Item b holds `lengths[b]` positions. `keys` and `values` are `[layers, batch, capacity, kv_heads,
    head_dim]`.
    """

    def __init__(
        self,
        config: BackboneConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.keys.shape[2]

    def store(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write `k`, `v` `[batch, time, kv_heads, head_dim]` at `positions` `[batch, time]`; give all of the
        layer's."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[layer][rows, positions] = k.to(self.keys.dtype)
        self.values[layer][rows, positions] = v.to(self.values.dtype)
        return self.keys[layer], self.values[layer]

    def select(self, items: Tensor) -> KVCache:
        """The cache of some items only, in the given order (for a batch that items leave)."""
        other = object.__new__(KVCache)
        other.keys, other.values = self.keys[:, items], self.values[:, items]
        other.lengths = self.lengths[items]
        return other


class BackboneAttention(nn.Module):
    """Grouped-query attention with rotary positions. `[batch, time, dim] -> [batch, time, dim]`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        positions: Tensor,
    ) -> Tensor:
        """Attend; `mask` `[batch, 1, time, keys]` is True where a key may be seen (None: causal)."""
        q = rotate_interleaved(self.wq(x).unflatten(-1, (self.n_heads, -1)), angles)
        k = rotate_interleaved(self.wk(x).unflatten(-1, (self.n_kv_heads, -1)), angles)
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, -1))
        if cache is not None:
            k, v = cache.store(layer, positions, k, v)
            if mask is not None:
                k, v = k[:, : mask.shape[-1]].to(q.dtype), v[:, : mask.shape[-1]].to(q.dtype)
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )  # fmt: skip
        return self.wo(out.transpose(1, 2).flatten(2))


class BackboneLayer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.attention = BackboneAttention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        positions: Tensor,
    ) -> Tensor:
        """Apply to `x` `[batch, time, dim]`."""
        h = x + self.attention(self.attention_norm(x), angles, mask, cache, layer, positions)
        return h + self.feed_forward(self.ffn_norm(h))


class Backbone(nn.Module):
    """All layers and the final norm; input embeddings and output heads are elsewhere."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([BackboneLayer(config) for _ in range(config.n_layers)])
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, embeddings: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Normed hidden states `[batch, time, dim]` of `embeddings` `[batch, time, dim]`.

        Without a cache: causal over the given positions. With one: the embeddings continue each item's past
        and are appended to the cache. `lengths` `[batch]` says how many of the `time` positions are an
        item's own
        (the rest, on the right, is padding: not remembered, and its output means nothing).
        Raises ValueError when the cache has no room.
        """
        batch, time, _ = embeddings.shape
        steps = torch.arange(time, device=embeddings.device)
        mask = None
        if cache is None:
            positions = steps.expand(batch, time)
        else:
            positions = cache.lengths[:, None] + steps
            reach = int(positions[:, -1].max()) + 1
            if reach > cache.capacity:
                raise ValueError(f"the cache holds {cache.capacity} positions, {reach} are needed")
            # Padding may be written past an item's end: it is overwritten before any later query sees it.
            mask = torch.arange(reach, device=embeddings.device) <= positions[:, None, :, None]
        half = self.config.head_dim // 2
        inverse = self.config.rope_theta ** (-torch.arange(half, device=embeddings.device).float() / half)
        angles = positions.float()[..., None] * inverse
        x = embeddings
        for i, layer in enumerate(self.layers):
            x = layer(x, angles, mask, cache, i, positions)
        if cache is not None:
            cache.lengths = cache.lengths + (time if lengths is None else lengths.to(cache.lengths))
        return self.norm(x)
