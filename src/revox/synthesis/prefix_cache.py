"""Beginnings of prompts that many requests share, read once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

PREFIX_BYTES = 256 << 20
"""At the release's size in bf16 a voice of 150 frames takes 16 MB."""


class PrefixCache:
    """Keys and values of prefixes, by their content.

    Beyond `limit` bytes the least recently used are dropped. A prefix is what `KVCache.read` gives,
    `[2, layers, length, kv_heads, head_dim]`.
    """

    def __init__(self, limit: int = PREFIX_BYTES) -> None:
        self.limit = limit
        self._prefixes: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._prefixes

    @property
    def nbytes(self) -> int:
        """Memory that the prefixes take, in bytes."""
        return sum(prefix.nbytes for prefix in self._prefixes.values())

    def get(self, key: bytes) -> Tensor | None:
        """The prefix of that key, which counts as used now."""
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
        return self._prefixes.get(key)

    def put(self, key: bytes, prefix: Tensor) -> None:
        """Remember a prefix, unless it is larger than the limit by itself."""
        if prefix.nbytes > self.limit:
            return
        self._prefixes[key] = prefix
        self._prefixes.move_to_end(key)
        while self.nbytes > self.limit:
            self._prefixes.popitem(last=False)


def prefix_key(embeddings: Tensor) -> bytes:
    """What `embeddings` `[length, dim]` are known by: a digest of their bytes.

    So a voice that is replaced under its name is another prefix.
    """
    data = embeddings.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).digest()
