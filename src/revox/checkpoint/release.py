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

Shapes = dict[str, tuple[int, ...]]

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


def is_quantizable(name: str) -> bool:
    """Whether a tensor is a matrix of a transformer layer, not the codec's, or the condition's projection.

    The semantic head stays as it is: it decides by small differences, and is 2 % of what a frame reads.
    """
    layers = ("layers.", "acoustic_transformer.layers.", "acoustic_transformer.llm_projection.")
    return name.startswith(layers) and not name.endswith("norm.weight")


def expected_tensors(config: VoxtralConfig) -> dict[str, TensorSpec]:
    """Every tensor of a complete checkpoint of these sizes, the encoder's (`codec_encoder`) included."""
    backbone, acoustic, codec = config.backbone, config.acoustic, config.codec
    at, size = "acoustic_transformer.", codec.semantic_codebook_size
    shapes: Shapes = {}
    for layer in range(backbone.n_layers):
        shapes |= _transformer(f"layers.{layer}.", backbone)
    shapes["norm.weight"] = (backbone.dim,)
    shapes[TEXT_TABLE] = (backbone.vocab_size, backbone.dim)
    shapes[EMBEDDING_TABLE] = (config.audio_embedding_rows, backbone.dim)
    for layer in range(acoustic.n_layers):
        shapes |= _transformer(f"{at}layers.{layer}.", acoustic)
    shapes[f"{at}input_projection.weight"] = (acoustic.dim, codec.acoustic_dim)
    shapes[f"{at}time_projection.weight"] = (acoustic.dim, acoustic.dim)
    shapes[f"{at}llm_projection.weight"] = (acoustic.dim, acoustic.input_dim)
    shapes[f"{at}semantic_codebook_output.weight"] = (config.semantic_output_rows, acoustic.dim)
    shapes[f"{at}acoustic_codebook_output.weight"] = (codec.acoustic_dim, acoustic.dim)
    shapes[f"{at}norm.weight"] = (acoustic.dim,)
    shapes |= _decoder(codec)
    shapes["audio_tokenizer.quantizer.semantic_codebook.cluster_usage"] = (size,)
    shapes["audio_tokenizer.quantizer.semantic_codebook.embedding_sum"] = (size, codec.semantic_dim)
    shapes |= _encoder(codec)
    return {
        name: TensorSpec(shape, "BF16", component_of(name) or "backbone") for name, shape in shapes.items()
    }


def _transformer(prefix: str, config: BackboneConfig | AcousticConfig | CodecConfig) -> Shapes:
    dim, hidden = config.dim, config.hidden_dim
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: Shapes = {
        "attention.wq.weight": (queries, dim),
        "attention.wk.weight": (keys, dim),
        "attention.wv.weight": (keys, dim),
        "attention.wo.weight": (dim, queries),
        "feed_forward.w1.weight": (hidden, dim),
        "feed_forward.w2.weight": (dim, hidden),
        "feed_forward.w3.weight": (hidden, dim),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    if isinstance(config, CodecConfig):
        shapes |= {"attention.q_norm.weight": (queries,), "attention.k_norm.weight": (keys,)}
        shapes |= {"attention_scale": (dim,), "ffn_scale": (dim,)}
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def _stack(prefix: str, layers: int, codec: CodecConfig) -> Shapes:
    shapes: Shapes = {}
    for layer in range(layers):
        shapes |= _transformer(f"{prefix}layers.{layer}.", codec)
    return shapes


def _convolution(prefix: str, first: int, second: int, kernel: int, weight_norm: bool = True) -> Shapes:
    # `first` is the output's channels, but the input's in a transposed convolution.
    if not weight_norm:
        return {f"{prefix}conv.weight": (first, second, kernel)}
    norm = f"{prefix}conv.parametrizations.weight.original"
    return {f"{norm}0": (first, 1, 1), f"{norm}1": (first, second, kernel)}


def _decoder(codec: CodecConfig) -> Shapes:
    kernels, strides = codec.decoder_convs_kernels, codec.decoder_convs_strides
    at, index = "audio_tokenizer.decoder_blocks.", 1
    shapes = _convolution(f"{at}0.", codec.dim, codec.latent_dim, kernels[0])
    for block, layers in enumerate(codec.decoder_transformer_lengths, 1):
        shapes |= _stack(f"{at}{index}.", layers, codec)
        index += 1
        if block < len(kernels) and (kernels[block], strides[block]) != (1, 1):
            shapes |= _convolution(f"{at}{index}.", codec.dim, codec.dim, kernels[block])
            index += 1
    patch, kernel = codec.pretransform_patch_size, codec.patch_proj_kernel_size
    return shapes | _convolution(
        "audio_tokenizer.output_proj.", patch, codec.dim, kernel, codec.conv_weight_norm
    )


def _encoder(codec: CodecConfig) -> Shapes:
    kernels, strides = codec.encoder_convs_kernels, codec.encoder_convs_strides
    at, index = "audio_tokenizer.encoder_blocks.", 0
    patch, kernel = codec.pretransform_patch_size, codec.patch_proj_kernel_size
    shapes = _convolution("audio_tokenizer.input_proj.", codec.dim, patch, kernel, codec.conv_weight_norm)
    for block, layers in enumerate(codec.encoder_transformer_lengths, 1):
        shapes |= _stack(f"{at}{index}.", layers, codec)
        index += 1
        last = block == len(kernels)
        if last or (kernels[block - 1], strides[block - 1]) != (1, 1):
            outputs = codec.latent_dim if last else codec.dim
            shapes |= _convolution(f"{at}{index}.", outputs, codec.dim, kernels[block - 1])
            index += 1
    return shapes
