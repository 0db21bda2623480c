"""Sizes of every part of the model, as plain frozen dataclasses (read from params.json by
`revox.checkpoint`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

N_SPECIAL_CODES = 2
"""Ids 0 `[EMPTY_AUDIO]` and 1 `[END_AUDIO]` of every codebook; a code c is stored as the id c + 2."""

EMPTY_AUDIO_ID = 0
END_AUDIO_ID = 1


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of the codec. Names are those of params.json's `audio_tokenizer_args`."""

    sampling_rate: int = 24000
    pretransform_patch_size: int = 240
    patch_proj_kernel_size: int = 7
    semantic_codebook_size: int = 8192
    semantic_dim: int = 256
    acoustic_codebook_size: int = 21
    acoustic_dim: int = 36
    conv_weight_norm: bool = True
    attn_sliding_window_size: int = 16
    half_attn_window_upon_downsampling: bool = True
    dim: int = 1024
    hidden_dim: int = 4096
    head_dim: int = 128
    n_heads: int = 8
    n_kv_heads: int = 8
    qk_norm_eps: float = 1e-6
    norm_eps: float = 1e-2
    layer_scale_init: float = 0.01
    encoder_transformer_lengths: tuple[int, ...] = (2, 2, 2, 2)
    encoder_convs_kernels: tuple[int, ...] = (4, 4, 4, 3)
    encoder_convs_strides: tuple[int, ...] = (2, 2, 2, 1)
    decoder_transformer_lengths: tuple[int, ...] = (2, 2, 2, 2)
    decoder_convs_kernels: tuple[int, ...] = (3, 4, 4, 4)
    decoder_convs_strides: tuple[int, ...] = (1, 2, 2, 2)

    @property
    def latent_dim(self) -> int:
        """Channels of a latent: the semantic ones first, then the acoustic ones."""
        return self.semantic_dim + self.acoustic_dim

    @property
    def n_codebooks(self) -> int:
        """One semantic codebook and `acoustic_dim` acoustic ones."""
        return 1 + self.acoustic_dim

    @property
    def patches_per_frame(self) -> int:
        """How many waveform patches make one frame of codes."""
        return math.prod(self.encoder_convs_strides)

    @property
    def samples_per_frame(self) -> int:
        """Samples of audio that one frame of codes stands for."""
        return self.pretransform_patch_size * self.patches_per_frame

    @property
    def frame_rate(self) -> float:
        """Frames a second, Hz."""
        return self.sampling_rate / self.samples_per_frame


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes of the language model. Names are those of params.json."""

    dim: int = 3072
    n_layers: int = 26
    head_dim: int = 128
    hidden_dim: int = 9216
    n_heads: int = 32
    n_kv_heads: int = 8
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    vocab_size: int = 131072


@dataclass(frozen=True)
class AcousticConfig:
    """Sizes of the flow-matching transformer. Names are those of `acoustic_transformer_args`."""

    input_dim: int = 3072
    dim: int = 3072
    n_layers: int = 3
    head_dim: int = 128
    hidden_dim: int = 9216
    n_heads: int = 32
    n_kv_heads: int = 8
    norm_eps: float = 1e-5
    n_decoding_steps: int = 7


@dataclass(frozen=True)
class VoxtralConfig:
    """The whole model: backbone, acoustic transformer, codec."""

    backbone: BackboneConfig
    acoustic: AcousticConfig
    codec: CodecConfig

    @property
    def codebook_rows(self) -> tuple[int, ...]:
        """Rows of each codebook in the audio embedding table, the two special ids included."""
        codec = self.codec
        acoustic = codec.acoustic_codebook_size + N_SPECIAL_CODES
        return (codec.semantic_codebook_size + N_SPECIAL_CODES, *([acoustic] * codec.acoustic_dim))

    @property
    def audio_embedding_rows(self) -> int:
        """Rows of the audio embedding table: all codebooks, padded to a multiple of 128."""
        return _round_up(sum(self.codebook_rows), 128)

    @property
    def semantic_output_rows(self) -> int:
        """Rows of `semantic_codebook_output`, padded to a multiple of 128."""
        return _round_up(self.codebook_rows[0], 128)


def _round_up(n: int, multiple: int) -> int:
    return multiple * ((n + multiple - 1) // multiple)
