"""Our model beside the oracle's, with the same random weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from oracle import (
    Oracle,
    load_into_oracle,
    random_acoustic_state,
    random_codec_state,
    small_params,
)
from torch import Tensor, nn

from revox.model.acoustic import AcousticTransformer
from revox.model.codec import Codec
from revox.model.config import AcousticConfig, BackboneConfig, CodecConfig, VoxtralConfig
from revox.model.embedding import Embeddings


def config_of(params: dict[str, Any]) -> VoxtralConfig:
    """Our config with a params.json's sizes, without `revox.checkpoint` (which is compared with this)."""
    multimodal = params["multimodal"]
    codec = dict(multimodal["audio_tokenizer_args"])
    for name in [name for name in codec if name.endswith("_str")]:
        codec[name.removesuffix("_str")] = tuple(int(n) for n in codec.pop(name).split(","))

    def take(kind: type, values: dict[str, Any]) -> Any:
        return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})

    return VoxtralConfig(
        backbone=take(BackboneConfig, params),
        acoustic=take(AcousticConfig, multimodal["audio_model_args"]["acoustic_transformer_args"]),
        codec=take(CodecConfig, codec),
    )


def load_ours(module: nn.Module, state: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> nn.Module:
    """Give our module every tensor of `state` under `prefix`; a missing or unknown name fails."""
    own = {name.removeprefix(prefix): t.to(dtype) for name, t in state.items() if name.startswith(prefix)}
    module.load_state_dict(own, assign=True)
    return module.eval().requires_grad_(False)


@dataclass(frozen=True)
class Pair:
    """The same weights in our modules and in the oracle's."""

    oracle: Oracle
    params: dict[str, Any]
    config: VoxtralConfig
    codec: Codec
    acoustic: AcousticTransformer
    embeddings: Embeddings
    their_codec: nn.Module
    their_acoustic: nn.Module

    @classmethod
    def small(cls, oracle: Oracle, dtype: torch.dtype, seed: int = 0, **codec: Any) -> Pair:
        """Both at small size; `codec` overrides sizes of the codec."""
        params = small_params(**codec)
        config = config_of(params)
        their_codec = oracle.audio_tokenizer(params, dtype)
        their_acoustic = oracle.acoustic_transformer(params, dtype)
        state = random_codec_state(their_codec, seed) | random_acoustic_state(their_acoustic, seed + 1)
        state["mm_audio_embeddings.tok_embeddings.weight"] = torch.randn(
            config.backbone.vocab_size, config.backbone.dim, generator=torch.Generator().manual_seed(seed + 2)
        )
        load_into_oracle(their_codec, {k: v for k, v in state.items() if "acoustic_t" not in k}, dtype)
        load_into_oracle(their_acoustic, {k: v for k, v in state.items() if "acoustic_t" in k}, dtype)
        return cls(
            oracle, params, config,
            load_ours(Codec(config.codec, with_encoder=True), state, "audio_tokenizer.", dtype),
            load_ours(AcousticTransformer(config), state, "acoustic_transformer.", dtype),
            load_ours(Embeddings(config), state, "mm_audio_embeddings.", dtype),
            their_codec, their_acoustic,
        )  # fmt: skip


def noise_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def speechlike(samples: int, seed: int) -> Tensor:
    """A waveform `[samples]` at 24 kHz with harmonics, pauses and noise, within [-1, 1]."""
    t = torch.arange(samples) / 24000
    pitch = 110 + 40 * torch.sin(2 * torch.pi * (1.3 + 0.1 * seed) * t)
    phase = 2 * torch.pi * torch.cumsum(pitch / 24000, 0)
    voice = sum(torch.sin(k * phase) / k for k in range(1, 12)) * 0.25
    envelope = torch.sin(2 * torch.pi * 2.1 * t + seed).clamp(min=0)
    return (voice * envelope + 0.02 * noise_of(seed, samples)).clamp(-1, 1)


def random_codes(config: VoxtralConfig, batch: int, frames: int, seed: int) -> Tensor:
    """Codes `[batch, 37, frames]`, from 0, each codebook over its whole range."""
    generator = torch.Generator().manual_seed(seed)
    codec = config.codec
    semantic = torch.randint(codec.semantic_codebook_size, (batch, 1, frames), generator=generator)
    acoustic = torch.randint(
        codec.acoustic_codebook_size, (batch, codec.acoustic_dim, frames), generator=generator
    )
    return torch.cat((semantic, acoustic), dim=1)
