"""Facts of the release, Voxtral-4B-TTS-2603, each of them here and nowhere else.

Sizes, presets, and the tensors of a checkpoint of any sizes: names and shapes are those that vllm-omni 0.30's
modules give. At the release's sizes they are its 386 tensors, and the 114 of the codec encoder that it
withholds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revox.model.config import AcousticConfig, BackboneConfig, CodecConfig, VoxtralConfig

HUB_ID = "mistralai/Voxtral-4B-TTS-2603"
LICENSE = "CC BY-NC 4.0"
"""Of the weights, and of what is made from them."""

CONFIG = VoxtralConfig(BackboneConfig(), AcousticConfig(), CodecConfig())
"""The release's sizes."""

PRESETS = {
    "casual_female": 214,
    "casual_male": 147,
    "cheerful_female": 132,
    "neutral_female": 218,
    "neutral_male": 169,
    "pt_male": 144,
    "pt_female": 175,
    "nl_male": 138,
    "nl_female": 146,
    "it_male": 168,
    "it_female": 172,
    "fr_male": 97,
    "fr_female": 97,
    "es_male": 208,
    "es_female": 138,
    "de_male": 163,
    "de_female": 147,
    "ar_male": 67,
    "hi_male": 94,
    "hi_female": 86,
}
"""The preset voices in the order of their ids, with the length of each embedding (frames + 1)."""

# Measured on the presets: the Euclidean norm of an embedding's positions, the end frame's apart, and the
# cosine between two presets' mean positions.
POSITION_NORM = (4.2, 4.7)
END_POSITION_NORM = (14.0, 15.5)
MEAN_COSINE = (0.92, 1.0)

EMBEDDING_TABLE = "mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight"
TEXT_TABLE = "mm_audio_embeddings.tok_embeddings.weight"

COMPONENTS = (
    "backbone",
    "text_embedding",
    "audio_embedding",
    "acoustic_transformer",
    "codec_decoder",
    "quantizer",
    "codec_encoder",
)

ENCODER_PREFIXES = ("audio_tokenizer.input_proj.", "audio_tokenizer.encoder_blocks.")

IGNORED = frozenset({"acoustic_transformer.time_embedding.inv_freq"})
"""Computed by every runtime; not in the release, harmless where found."""


def release_params(voices: Iterable[str] = PRESETS) -> dict[str, Any]:
    """The content of the release's params.json, with these voices numbered in order."""
    params = json.loads((Path(__file__).parent / "release_params.json").read_text())
    params["multimodal"]["audio_tokenizer_args"]["voice"] = {name: i for i, name in enumerate(voices)}
    return params


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a checkpoint should hold: shape, type as safetensors names it, and its component."""

    shape: tuple[int, ...]
    dtype: str
    component: str

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def component_of(name: str) -> str | None:
    """The component that a tensor of this name belongs to, or None for a name of no component."""
    prefixes = {
        "layers.": "backbone",
        "norm.": "backbone",
        "mm_audio_embeddings.tok_embeddings.": "text_embedding",
        "mm_audio_embeddings.audio_codebook_embeddings.": "audio_embedding",
        "acoustic_transformer.": "acoustic_transformer",
        "audio_tokenizer.decoder_blocks.": "codec_decoder",
        "audio_tokenizer.output_proj.": "codec_decoder",
        "audio_tokenizer.quantizer.": "quantizer",
        **dict.fromkeys(ENCODER_PREFIXES, "codec_encoder"),
    }
    return next((component for prefix, component in prefixes.items() if name.startswith(prefix)), None)


def expected_tensors(config: VoxtralConfig) -> dict[str, TensorSpec]:
    """Every tensor of a complete checkpoint of these sizes, the encoder's (`codec_encoder`) included."""
    backbone, acoustic, codec = config.backbone, config.acoustic, config.codec
    shapes: dict[str, tuple[int, ...]] = {}

    def transformer(
        prefix: str, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, hidden_dim: int
    ) -> None:
        shapes[f"{prefix}attention.wq.weight"] = (n_heads * head_dim, dim)
        shapes[f"{prefix}attention.wk.weight"] = (n_kv_heads * head_dim, dim)
        shapes[f"{prefix}attention.wv.weight"] = (n_kv_heads * head_dim, dim)
        shapes[f"{prefix}attention.wo.weight"] = (dim, n_heads * head_dim)
        shapes[f"{prefix}feed_forward.w1.weight"] = (hidden_dim, dim)
        shapes[f"{prefix}feed_forward.w2.weight"] = (dim, hidden_dim)
        shapes[f"{prefix}feed_forward.w3.weight"] = (hidden_dim, dim)
        shapes[f"{prefix}attention_norm.weight"] = (dim,)
        shapes[f"{prefix}ffn_norm.weight"] = (dim,)

    def stack(prefix: str, layers: int) -> None:
        for layer in range(layers):
            at = f"{prefix}layers.{layer}."
            transformer(at, codec.dim, codec.n_heads, codec.n_kv_heads, codec.head_dim, codec.hidden_dim)
            shapes[f"{at}attention.q_norm.weight"] = (codec.n_heads * codec.head_dim,)
            shapes[f"{at}attention.k_norm.weight"] = (codec.n_kv_heads * codec.head_dim,)
            shapes[f"{at}attention_scale"] = (codec.dim,)
            shapes[f"{at}ffn_scale"] = (codec.dim,)

    def convolution(prefix: str, first: int, second: int, kernel: int, weight_norm: bool = True) -> None:
        # `first` is the output's channels, but the input's in a transposed convolution.
        if weight_norm:
            shapes[f"{prefix}conv.parametrizations.weight.original0"] = (first, 1, 1)
            shapes[f"{prefix}conv.parametrizations.weight.original1"] = (first, second, kernel)
        else:
            shapes[f"{prefix}conv.weight"] = (first, second, kernel)

    for layer in range(backbone.n_layers):
        heads = (backbone.n_heads, backbone.n_kv_heads, backbone.head_dim)
        transformer(f"layers.{layer}.", backbone.dim, *heads, backbone.hidden_dim)
    shapes["norm.weight"] = (backbone.dim,)

    shapes["mm_audio_embeddings.tok_embeddings.weight"] = (backbone.vocab_size, backbone.dim)
    shapes["mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight"] = (
        config.audio_embedding_rows,
        backbone.dim,
    )

    for layer in range(acoustic.n_layers):
        heads = (acoustic.n_heads, acoustic.n_kv_heads, acoustic.head_dim)
        transformer(f"acoustic_transformer.layers.{layer}.", acoustic.dim, *heads, acoustic.hidden_dim)
    shapes["acoustic_transformer.input_projection.weight"] = (acoustic.dim, codec.acoustic_dim)
    shapes["acoustic_transformer.time_projection.weight"] = (acoustic.dim, acoustic.dim)
    shapes["acoustic_transformer.llm_projection.weight"] = (acoustic.dim, acoustic.input_dim)
    shapes["acoustic_transformer.semantic_codebook_output.weight"] = (
        config.semantic_output_rows,
        acoustic.dim,
    )
    shapes["acoustic_transformer.acoustic_codebook_output.weight"] = (codec.acoustic_dim, acoustic.dim)
    shapes["acoustic_transformer.norm.weight"] = (acoustic.dim,)

    at = "audio_tokenizer."
    patch, kernel = codec.pretransform_patch_size, codec.patch_proj_kernel_size
    blocks = list(
        zip(
            codec.decoder_transformer_lengths,
            codec.decoder_convs_kernels,
            codec.decoder_convs_strides,
            strict=True,
        )
    )
    convolution(f"{at}decoder_blocks.0.", codec.dim, codec.latent_dim, blocks[0][1])
    index = 1
    for block, (layers, _, _) in enumerate(blocks):
        stack(f"{at}decoder_blocks.{index}.", layers)
        index += 1
        if block + 1 < len(blocks) and blocks[block + 1][1:] != (1, 1):
            convolution(f"{at}decoder_blocks.{index}.", codec.dim, codec.dim, blocks[block + 1][1])
            index += 1
    convolution(f"{at}output_proj.", patch, codec.dim, kernel, codec.conv_weight_norm)

    shapes[f"{at}quantizer.semantic_codebook.cluster_usage"] = (codec.semantic_codebook_size,)
    shapes[f"{at}quantizer.semantic_codebook.embedding_sum"] = (
        codec.semantic_codebook_size,
        codec.semantic_dim,
    )

    convolution(f"{at}input_proj.", codec.dim, patch, kernel, codec.conv_weight_norm)
    blocks = list(
        zip(
            codec.encoder_transformer_lengths,
            codec.encoder_convs_kernels,
            codec.encoder_convs_strides,
            strict=True,
        )
    )
    index = 0
    for block, (layers, block_kernel, stride) in enumerate(blocks):
        stack(f"{at}encoder_blocks.{index}.", layers)
        index += 1
        last = block + 1 == len(blocks)
        if last or (block_kernel, stride) != (1, 1):
            outputs = codec.latent_dim if last else codec.dim
            convolution(f"{at}encoder_blocks.{index}.", outputs, codec.dim, block_kernel)
            index += 1

    return {
        name: TensorSpec(shape, "BF16", component_of(name) or "backbone") for name, shape in shapes.items()
    }
