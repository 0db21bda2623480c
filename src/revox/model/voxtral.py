"""The whole model: embeddings, backbone, acoustic transformer and codec, under the names of the release's
file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .acoustic import AcousticTransformer
from .backbone import Backbone, KVCache
from .codec import Codec
from .config import END_AUDIO_ID, VoxtralConfig
from .embedding import Embeddings


def parameter_name(tensor: str) -> str:
    """The name in `Voxtral.state_dict()` of a tensor of consolidated.safetensors."""
    return f"backbone.{tensor}" if tensor.startswith(("layers.", "norm.")) else tensor


def tensor_name(parameter: str) -> str:
    """The name in consolidated.safetensors of an entry of `Voxtral.state_dict()`."""
    return parameter.removeprefix("backbone.")


class Voxtral(nn.Module):
    """Text and a voice's rows in, frames of codes and audio out."""

    def __init__(self, config: VoxtralConfig, with_encoder: bool) -> None:
        super().__init__()
        self.config = config
        self.mm_audio_embeddings = Embeddings(config)
        self.backbone = Backbone(config.backbone)
        self.acoustic_transformer = AcousticTransformer(config)
        self.audio_tokenizer = Codec(config.codec, with_encoder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type, and so the arithmetic's."""
        return self.backbone.norm.weight.dtype

    def embed_prompt(self, tokens: Tensor, audio_token: int, rows: Tensor) -> Tensor:
        """Embeddings `[time, dim]` of prompt `tokens` `[time]`, the `audio_token` positions replaced by
        `rows` `[N, dim]`.

        Raises ValueError when the prompt has another number of audio positions than there are rows.
        """
        embedded = self.mm_audio_embeddings.tok_embeddings(tokens)
        places = tokens == audio_token
        if int(places.sum()) != rows.shape[0]:
            raise ValueError(
                f"the prompt has {int(places.sum())} audio positions, the voice {rows.shape[0]} rows"
            )
        return embedded.masked_scatter(places[:, None], rows.to(embedded))

    def prefill(self, prompts: list[Tensor], new_frames: int) -> tuple[Tensor, KVCache]:
        """Read prompts (each `[time, dim]`), leaving room for `new_frames` more positions.

        Gives the hidden state at each one's last position, `[batch, dim]`, from which the first frame is
        read, and the cache.
        """
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        cache = KVCache(
            self.config.backbone, len(prompts), padded.shape[1] + new_frames, padded.dtype, padded.device
        )
        hidden = self.backbone(padded, cache, lengths)
        return hidden[torch.arange(len(prompts), device=self.device), lengths - 1], cache

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Feed the frames just spoken, ids `[batch, 37]`; the next hidden state `[batch, dim]`."""
        return self.backbone(self.mm_audio_embeddings.frames(ids[:, :, None]), cache)[:, 0]

    @torch.inference_mode()
    def speak(
        self,
        prompt: Tensor,
        noise: Tensor,
        cfg_alpha: float = 1.2,
        steps: int | None = None,
    ) -> Tensor:
        """The frame loop for one prompt `[time, dim]`: codes `[37, frames]` from 0, without the end frame.

        `noise` `[max_frames, 36]` is used row by row; speech ends at the first semantic id 1 or with the
        noise.
        """
        hidden, cache = self.prefill([prompt], len(noise))
        frames: list[Tensor] = []
        for row in noise:
            ids = self.acoustic_transformer.frame(hidden, row[None], cfg_alpha, steps)
            if int(ids[0, 0]) == END_AUDIO_ID:
                break
            frames.append(ids[0])
            hidden = self.step(ids, cache)
        if not frames:
            return torch.zeros((self.config.codec.n_codebooks, 0), dtype=torch.long, device=self.device)
        return torch.stack(frames, dim=1) - 2
