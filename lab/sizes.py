"""The lab checkpoint's sizes: a small Voxtral in the release's own format."""

from __future__ import annotations

from typing import Any

from lab.errors import LabError
from revox.checkpoint import release

PRESETS = tuple(release.PRESETS)
"""The release's presets, in the order of their ids."""


def lab_params(
    vocab_size: int, language_width: int = 256, language_layers: int = 4, **codec: Any
) -> dict[str, Any]:
    """The lab's params.json.

    `language_width` is that of backbone and acoustic transformer; feed-forward layers and heads grow with it.
    `language_layers` are the backbone's. `codec` overrides entries of `audio_tokenizer_args` (the miniature
    build of the tests). Raises LabError for a width that does not divide into heads.
    """
    if language_width < 128 or language_width % 128:
        raise LabError(
            f"language_width is {language_width}: a multiple of 128 is needed, two heads for each key"
        )
    heads = language_width // 64
    tokenizer_args = {
        "channels": 1,
        "sampling_rate": 24000,
        "pretransform_patch_size": 240,
        "patch_proj_kernel_size": 7,
        "semantic_codebook_size": 512,
        "semantic_dim": 64,
        "acoustic_codebook_size": 21,
        "acoustic_dim": 36,
        "conv_weight_norm": True,
        "causal": True,
        "attn_sliding_window_size": 16,
        "half_attn_window_upon_downsampling": True,
        "dim": 192,
        "hidden_dim": 512,
        "head_dim": 48,
        "n_heads": 4,
        "n_kv_heads": 4,
        "qk_norm_eps": 1e-6,
        "qk_norm": True,
        "use_biases": False,
        "norm_eps": 0.01,
        "layer_scale": True,
        "layer_scale_init": 0.2,
        "encoder_transformer_lengths_str": "1,2,1,2",
        "encoder_convs_kernels_str": "4,4,4,3",
        "encoder_convs_strides_str": "2,2,2,1",
        "decoder_transformer_lengths_str": "2,1,2,1",
        "decoder_convs_kernels_str": "3,4,4,4",
        "decoder_convs_strides_str": "1,2,2,2",
        "voice": {name: i for i, name in enumerate(PRESETS)},
        **codec,
    }
    rate = tokenizer_args["sampling_rate"]
    stride = 1
    for s in tokenizer_args["encoder_convs_strides_str"].split(","):
        stride *= int(s)
    frame_rate = rate / (tokenizer_args["pretransform_patch_size"] * stride)
    n_acoustic = tokenizer_args["acoustic_dim"]
    return {
        "dim": language_width,
        "n_layers": language_layers,
        "head_dim": 64,
        "hidden_dim": 2 * language_width,
        "n_heads": heads,
        "n_kv_heads": heads // 2,
        "rope_theta": 1e6,
        "norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "max_seq_len": 4096,
        "model_type": "voxtral_tts",
        "max_position_embeddings": 4096,
        "multimodal": {
            "bos_token_id": 1,
            "audio_model_args": {
                "semantic_codebook_size": tokenizer_args["semantic_codebook_size"],
                "acoustic_codebook_size": tokenizer_args["acoustic_codebook_size"],
                "n_acoustic_codebook": n_acoustic,
                "audio_encoding_args": {
                    "codebook_pattern": "parallel",
                    "interleave_audio_tokens_per_segment": 8192,
                    "interleave_text_tokens_per_segment": 8192,
                    "single_trailing_segment": False,
                    "num_codebooks": 1 + n_acoustic,
                    "sampling_rate": rate,
                    "frame_rate": frame_rate,
                },
                "audio_token_id": 24,
                "begin_audio_token_id": 25,
                "input_embedding_concat_type": "sum",
                "acoustic_transformer_args": {
                    "input_dim": language_width,
                    "dim": language_width,
                    "n_layers": 3,
                    "head_dim": 64,
                    "hidden_dim": language_width * 9 // 8,
                    "n_heads": heads,
                    "n_kv_heads": heads // 2,
                    "use_biases": False,
                    "rope_theta": 10000.0,
                    "sigma": 1e-5,
                    "sigma_max": 1.0,
                },
                "p_uncond": 0.0,
                "text_feature_bugged": False,
                "condition_dropped_token_id": 42,
            },
            "audio_tokenizer_args": tokenizer_args,
        },
    }
