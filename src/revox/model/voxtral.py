"""The whole model: embeddings, backbone, acoustic transformer and codec, under the names of the release's
file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .acoustic import AcousticTransformer
from .backbone import Backbone, KVCache
from .codec import Codec
from .config import VoxtralConfig
from .embedding import Embeddings
from .linear import one_digit


def parameter_name(tensor: str) -> str:
    """The name in `Voxtral.state_dict()` of a tensor of consolidated.safetensors."""
    return f"backbone.{tensor}" if tensor.startswith(("layers.", "norm.")) else tensor


def tensor_name(parameter: str) -> str:
    """The name in consolidated.safetensors of an entry of `Voxtral.state_dict()`."""
    return parameter.removeprefix("backbone.")


class FrameInputs(NamedTuple):
    """What a frame is made of, on the model's device, for each slot.

    The frame before, ids `[slots, 37]`, and the position where it is fed `[slots]`; `noise` `[slots, 36]`;
    `cfg_alpha` `[slots]`; whether it may be the end, `may_end` `[slots]`.
    """

    ids: Tensor
    positions: Tensor
    noise: Tensor
    cfg_alpha: Tensor
    may_end: Tensor


class Voxtral(nn.Module):
    """Text and a voice embedding in, frames of codes and audio out."""

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
        """The arithmetic's type, and the weights' where they are not quantized."""
        return self.backbone.norm.weight.dtype

    def embed_prompt(self, tokens: Tensor, audio_token: int, voice_embedding: Tensor) -> Tensor:
        """Embeddings `[time, dim]` of prompt `tokens` `[time]`, the `audio_token` positions replaced by
        `voice_embedding` `[N, dim]`.

        Raises ValueError when the prompt has another number of audio positions than the voice embedding.
        """
        embedded = self.mm_audio_embeddings.tok_embeddings(tokens).to(self.dtype)
        places = tokens == audio_token
        if int(places.sum()) != voice_embedding.shape[0]:
            raise ValueError(
                f"the prompt has {int(places.sum())} audio positions and the voice embedding "
                f"{voice_embedding.shape[0]}; build the prompt for this voice"
            )
        return embedded.masked_scatter(places[:, None], voice_embedding.to(embedded))

    def prefill(self, prompts: Sequence[Tensor], cache: KVCache) -> Tensor:
        """Read prompts (each `[time, dim]`), or what follows the beginnings that the slots of `cache` hold.

        The cache must have room. Returns the hidden state at each one's last position, `[batch, dim]`, from
        which its first frame is read.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")
        padded = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        with one_digit():
            hidden = self.backbone(padded, cache, lengths)
        return torch.stack([states[n - 1] for states, n in zip(hidden, lengths.tolist(), strict=True)])

    def feed_frames(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Feed the frames just spoken, ids `[batch, 37]`; the next hidden state `[batch, dim]`."""
        rows = self.mm_audio_embeddings.frames(ids[:, :, None]).to(self.dtype)
        return self.backbone(rows, cache)[:, 0]

    def next_frame(
        self, inputs: FrameInputs, keys: Tensor, values: Tensor, steps: int | None = None
    ) -> Tensor:
        """Feed a frame and choose the next, ids `[slots, 37]`, in every slot of `keys` and `values`.

        All of one frame as one function of fixed shapes, without a value that the host reads: the embedding
        sum, the backbone's step, the semantic choice, and the flow with both branches in one batch.
        """
        rows = self.mm_audio_embeddings.frames(inputs.ids[:, :, None])[:, 0].to(self.dtype)
        hidden = self.backbone.step(rows, keys, values, inputs.positions)
        return self.acoustic_transformer.frame(hidden, inputs.noise, inputs.cfg_alpha, steps, inputs.may_end)

    def teacher_forced(self, sequences: Sequence[Tensor]) -> Tensor:
        """Hidden states `[batch, longest, dim]` of whole `sequences` (each `[time, dim]`: a prompt's
        embeddings and those of given frames), without a cache; differentiable."""
        return self.backbone(nn.utils.rnn.pad_sequence(list(sequences), batch_first=True))
