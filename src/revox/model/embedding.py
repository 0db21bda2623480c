"""What the backbone reads: text embeddings, and frames as the sum of one table row per codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import EMPTY_AUDIO_ID, END_AUDIO_ID, N_SPECIAL_CODES, VoxtralConfig


def voice_ids(codes: Tensor) -> Tensor:
    """Ids `[n_codebooks, frames + 1]` of a voice's codes `[n_codebooks, frames]`, the end frame appended."""
    end = torch.full_like(codes[:, :1], EMPTY_AUDIO_ID)
    end[0] = END_AUDIO_ID
    return torch.cat((codes + N_SPECIAL_CODES, end), dim=1)


class AudioCodebookEmbeddings(nn.Module):
    """One table for all codebooks; codebook k starts at row offset_k."""

    offsets: Tensor

    def __init__(self, config: VoxtralConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.audio_embedding_rows, config.backbone.dim)
        starts = torch.tensor((0, *config.codebook_rows[:-1]), device="cpu").cumsum(0)
        self.register_buffer("offsets", starts, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `[batch, frames, dim]` of `ids` `[batch, n_codebooks, frames]`: the float32 sum, rounded
        once."""
        rows = functional.embedding(ids + self.offsets[None, :, None], self.embeddings.weight)
        return rows.float().sum(dim=1).to(self.embeddings.weight.dtype)


class Embeddings(nn.Module):
    """The text table and the audio table of `mm_audio_embeddings`."""

    def __init__(self, config: VoxtralConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.backbone.vocab_size, config.backbone.dim)
        self.audio_codebook_embeddings = AudioCodebookEmbeddings(config)

    def frames(self, ids: Tensor) -> Tensor:
        """Rows `[batch, frames, dim]` of `ids` `[batch, n_codebooks, frames]` (codes + 2, or special ids)."""
        return self.audio_codebook_embeddings(ids)

    def voice_embedding(self, codes: Tensor) -> Tensor:
        """A voice's rows `[frames + 1, dim]` from its codes `[n_codebooks, frames]` (from 0), the end frame
        appended.

        The end frame has semantic id 1 and acoustic ids 0 (vllm-omni, `encode_waveforms`).
        """
        return self.frames(voice_ids(codes)[None])[0]
