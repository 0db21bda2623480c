"""The language model: a Mistral decoder (RMSNorm, grouped-query attention, RoPE on interleaved pairs,
SwiGLU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import BackboneConfig
from .layers import RMSNorm, TransformerLayer, rotate_interleaved, rotation
from .linear import Linear, products

BLOCK = 256
"""Positions by which a cache grows."""


@dataclass(eq=False)
class KVCache:
    """Keys and values of every layer, in slots that are each filled to their own length.

    `keys` and `values` are `[layers, slots, capacity, kv_heads, head_dim]`; slot s holds `lengths[s]`
    positions. `lengths` `[slots]` is on the CPU, so that no step waits for the device to learn how far it
    reaches.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @classmethod
    def empty(
        cls,
        config: BackboneConfig,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """A cache of `slots` slots with room for `capacity` positions each; both may be 0 and grow later."""
        shape = (config.n_layers, slots, capacity, config.n_kv_heads, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, torch.zeros(slots, dtype=torch.long, device="cpu"))

    @property
    def slots(self) -> int:
        """Sequences there is room for."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Positions there is room for in each slot."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory that the cache takes, in bytes."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def position_bytes(self) -> int:
        """Memory that one position of a slot takes, in bytes."""
        layers, _, _, heads, head_dim = self.keys.shape
        return 2 * layers * heads * head_dim * self.keys.element_size()

    def reserve(self, slots: int, positions: int) -> None:
        """Make room for at least so many slots and positions, in whole blocks; the contents stay."""
        if slots <= self.slots and positions <= self.capacity:
            return
        slots, positions = max(slots, self.slots), max(self.capacity, -(-positions // BLOCK) * BLOCK)
        # Both are made before either is replaced: there may be no memory for the second.
        self.keys, self.values = (_grown(part, slots, positions) for part in (self.keys, self.values))
        self.lengths = functional.pad(self.lengths, (0, slots - len(self.lengths)))

    def window(self, first: int, stop: int) -> KVCache:
        """Slots `first` to `stop` as a cache over the same memory, with lengths of its own.

        What is appended to it counts for this cache once its lengths are copied back, so that a forward pass
        that fails can be repeated.
        """
        return KVCache(self.keys[:, first:stop], self.values[:, first:stop], self.lengths[first:stop].clone())

    def append(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write `k`, `v` `[slots, time, kv_heads, head_dim]` at `positions` `[slots, time]` of a layer.

        Returns all keys and values of the layer, `[slots, capacity, kv_heads, head_dim]`.
        """
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[layer][rows, positions] = k.to(self.keys.dtype)
        self.values[layer][rows, positions] = v.to(self.values.dtype)
        return self.keys[layer], self.values[layer]

    def read(self, slot: int, length: int) -> Tensor:
        """A copy of the first `length` positions of a slot, `[2, layers, length, kv_heads, head_dim]`."""
        return torch.stack((self.keys[:, slot, :length], self.values[:, slot, :length]))

    def write(self, slot: int, positions: Tensor) -> None:
        """Make what `read` gave the first positions of a slot."""
        length = positions.shape[2]
        self.keys[:, slot, :length], self.values[:, slot, :length] = positions
        self.lengths[slot] = length

    def copy(self, source: int, target: int) -> None:
        """Overwrite slot `target` with slot `source`."""
        length = int(self.lengths[source])
        for part in (self.keys, self.values):
            part[:, target, :length] = part[:, source, :length]
        self.lengths[target] = length

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots."""
        length = int(self.lengths[[a, b]].max())
        # Both are cloned before either is written: there may be no memory for the second.
        clones = [part[:, a, :length].clone() for part in (self.keys, self.values)]
        for part, clone in zip((self.keys, self.values), clones, strict=True):
            part[:, a, :length] = part[:, b, :length]
            part[:, b, :length] = clone
        self.lengths[[a, b]] = self.lengths[[b, a]]


def _grown(part: Tensor, slots: int, positions: int) -> Tensor:
    layers, old_slots, old_positions, *rest = part.shape
    grown = part.new_zeros((layers, slots, positions, *rest))
    grown[:, :old_slots, :old_positions] = part
    return grown


class BackboneAttention(nn.Module):
    """Grouped-query attention with rotary positions. `[batch, time, dim] -> [batch, time, dim]`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        positions: Tensor,
    ) -> Tensor:
        """Attend; `mask` `[batch, 1, time, keys]` is True where a key may be seen (None: causal)."""
        q, k, v = products(x, self.wq, self.wk, self.wv)
        q = rotate_interleaved(q.unflatten(-1, (self.n_heads, -1)), turn)
        k = rotate_interleaved(k.unflatten(-1, (self.n_kv_heads, -1)), turn)
        v = v.unflatten(-1, (self.n_kv_heads, -1))
        if cache is not None:
            k, v = cache.append(layer, positions, k, v)
            if mask is not None:
                k, v = k[:, : mask.shape[-1]].to(q.dtype), v[:, : mask.shape[-1]].to(q.dtype)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if q.shape[1] == 1 and mask is not None:
            # The heads that share keys are queries at one position: two to ten times as fast on a processor.
            q = q.unflatten(2, (self.n_kv_heads, -1)).squeeze(1)
            out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return self.wo(out.flatten(1).unsqueeze(1))
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )  # fmt: skip
        return self.wo(out.transpose(1, 2).flatten(2))


class Backbone(nn.Module):
    """All layers and the final norm; input embeddings and output heads are elsewhere."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            TransformerLayer(BackboneAttention(config), config.dim, config.hidden_dim, config.norm_eps)
            for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, embeddings: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Normed hidden states `[batch, time, dim]` of `embeddings` `[batch, time, dim]`.

        Without a cache: causal over the given positions. With one: the embeddings continue each slot's past
        and are appended to the cache. `lengths` `[batch]` says how many of the `time` positions belong to
        each slot; the others, on its right, are padding: they are not remembered, and their output means
        nothing.
        Raises ValueError when the cache has no room.
        """
        batch, time, _ = embeddings.shape
        steps = torch.arange(time, device=embeddings.device if cache is None else "cpu")
        mask = None
        if cache is None:
            positions = steps.expand(batch, time)
        else:
            positions = cache.lengths[:, None] + steps
            needed = int(positions.max()) + 1
            if needed > cache.capacity:
                raise ValueError(f"the cache holds {cache.capacity} positions, {needed} are needed")
            positions = positions.to(embeddings.device)
            # Padding may be written past a slot's end: it is overwritten before any later query sees it.
            mask = torch.arange(needed, device=embeddings.device) <= positions[:, None, :, None]
        turn = self._turn(positions)
        x = embeddings
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, mask, cache, i, positions)
        if cache is not None:
            cache.lengths = cache.lengths + (time if lengths is None else lengths.to(cache.lengths))
        return self.norm(x)

    def step(self, embeddings: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """`forward` for one more position `[slots, dim]` of each slot: hidden states `[slots, dim]`.

        Its shapes do not depend on how far the slots reach and no value goes to the host, so that it can be
        one graph: `positions` `[slots]` are on the device, and all of `keys` and `values` `[layers, slots,
        capacity, kv_heads, head_dim]` is looked at. They are written at `positions`.
        """
        cache, places = KVCache(keys, values, positions), positions[:, None]
        mask = (torch.arange(keys.shape[2], device=keys.device) <= places)[:, None, None]
        turn = self._turn(places)
        x = embeddings[:, None]
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, mask, cache, i, places)
        return self.norm(x)[:, 0]

    def _turn(self, positions: Tensor) -> Tensor:
        half = self.config.head_dim // 2
        inverse = self.config.rope_theta ** (-torch.arange(half, device=positions.device).float() / half)
        return rotation(positions.float()[..., None] * inverse)
