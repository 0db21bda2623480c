"""The codec's quantizer: one semantic codebook (VQ) and 36 acoustic scalars (FSQ)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SemanticCodebook(nn.Module):
    """Nearest row (Euclidean) of `embedding_sum / max(cluster_usage, 1e-5)`.

    The two buffers are the running sums of an exponential-moving-average codebook, as the release stores
    them.
    """

    cluster_usage: Tensor
    embedding_sum: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("embedding_sum", torch.zeros(size, dim))

    @property
    def embedding(self) -> Tensor:
        """The codebook's rows `[size, dim]`."""
        return self.embedding_sum / self.cluster_usage.clamp(min=1e-5)[:, None]

    def encode(self, latents: Tensor) -> Tensor:
        """Codes `[batch, frames]` of `latents` `[batch, dim, frames]`, distances in the latents' own
        dtype."""
        batch, dim, frames = latents.shape
        points = latents.transpose(1, 2).reshape(batch * frames, dim)
        # One flat list of points, not a batch of them: in bf16 the distances (and so the choice of code) must
        # come from the same operation that serving uses.
        distances = torch.cdist(points, self.embedding.to(latents.dtype), p=2)
        return distances.argmin(dim=-1).view(batch, frames)

    def decode(self, codes: Tensor) -> Tensor:
        """Rows `[batch, dim, frames]` of `codes` `[batch, frames]`."""
        usage = self.cluster_usage[codes].clamp(min=1e-5)[..., None]
        return (functional.embedding(codes, self.embedding_sum) / usage).transpose(1, 2)


class AcousticCodebook(nn.Module):
    """Finite scalar quantization: `round((tanh(x) + 1) / 2 * (levels - 1))`, half to even, each channel by
    itself."""

    def __init__(self, levels: int, dim: int) -> None:
        super().__init__()
        self.levels, self.dim = levels, dim

    def encode(self, latents: Tensor) -> Tensor:
        """Codes `[batch, dim, frames]` of `latents` of the same shape (before the tanh, applied here,
        once)."""
        return (((torch.tanh(latents) + 1) / 2) * (self.levels - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        """Values in [-1, 1], float32, of `codes` `[batch, dim, frames]`."""
        return codes.float() * 2 / (self.levels - 1) - 1


class Quantizer(nn.Module):
    """Latents <-> codes. A latent is `semantic_dim` channels for the VQ, then `acoustic_dim` for the FSQ."""

    def __init__(
        self, semantic_size: int, semantic_dim: int, acoustic_levels: int, acoustic_dim: int
    ) -> None:
        super().__init__()
        self.semantic_dim = semantic_dim
        self.semantic_codebook = SemanticCodebook(semantic_size, semantic_dim)
        self.acoustic_codebook = AcousticCodebook(acoustic_levels, acoustic_dim)

    def encode(self, latents: Tensor) -> Tensor:
        """Codes `[batch, 1 + acoustic_dim, frames]`, int64, of `latents` `[batch, latent_dim, frames]`."""
        semantic = self.semantic_codebook.encode(latents[:, : self.semantic_dim])
        acoustic = self.acoustic_codebook.encode(latents[:, self.semantic_dim :])
        return torch.cat((semantic.unsqueeze(1), acoustic), dim=1)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Latents `[batch, latent_dim, frames]` in `dtype` of `codes` `[batch, 1 + acoustic_dim, frames]`."""
        semantic = self.semantic_codebook.decode(codes[:, 0]).to(dtype)
        acoustic = self.acoustic_codebook.decode(codes[:, 1:]).to(dtype)
        return torch.cat((semantic, acoustic), dim=1)
