from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import Params, read_params
from revox.model.config import AcousticConfig, BackboneConfig, CodecConfig, VoxtralConfig

PARITY = Path(__file__).parents[1] / "parity"
RELEASE = json.loads((PARITY / "release_params.json").read_text())


def written(folder: Path, params: Any) -> Path:
    (folder / "params.json").write_text(params if isinstance(params, str) else json.dumps(params))
    return folder


def changed(path: str, value: Any) -> dict[str, Any]:
    params = copy.deepcopy(RELEASE)
    *parents, last = path.split(".")
    section = params
    for key in parents:
        section = section[key]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return params


def test_the_releases_sizes_are_the_model_configs_own(tmp_path: Path) -> None:
    # The dataclasses of revox.model.config carry the published sizes as their defaults.
    config = read_params(written(tmp_path, RELEASE)).voxtral_config()
    assert config == VoxtralConfig(BackboneConfig(), AcousticConfig(), CodecConfig())


def test_steps_and_encoder_shape_that_the_release_omits_have_the_serving_codes_defaults(
    tmp_path: Path,
) -> None:
    config = read_params(written(tmp_path, RELEASE)).voxtral_config()
    assert config.acoustic.n_decoding_steps == 7
    assert config.codec.encoder_convs_kernels == (4, 4, 4, 3)
    assert config.codec.encoder_convs_strides == (2, 2, 2, 1)
    assert config.codec.encoder_transformer_lengths == (2, 2, 2, 2)


def test_what_is_read_is_written_back_with_fields_that_nobody_reads(tmp_path: Path) -> None:
    params = changed("multimodal.audio_tokenizer_args.future", {"a": [1, 2]}) | {"dtype": "bfloat16"}
    assert read_params(written(tmp_path, params)).model_dump(exclude_unset=True) == params


def test_other_rates_and_numbers_of_codebooks_are_taken_from_the_file(tmp_path: Path) -> None:
    params = copy.deepcopy(RELEASE)
    model, codec = params["multimodal"]["audio_model_args"], params["multimodal"]["audio_tokenizer_args"]
    model["n_acoustic_codebook"] = codec["acoustic_dim"] = 8
    model["audio_encoding_args"] |= {"num_codebooks": 9, "sampling_rate": 16000, "frame_rate": 12.5}
    codec |= {"sampling_rate": 16000, "pretransform_patch_size": 160}
    config = read_params(written(tmp_path, params)).voxtral_config()
    assert (config.codec.n_codebooks, config.codec.samples_per_frame, config.codec.frame_rate) == (
        9,
        1280,
        12.5,
    )


def test_codebook_sizes_in_one_string_are_read_as_vllm_omni_reads_them(tmp_path: Path) -> None:
    params = copy.deepcopy(RELEASE)
    model = params["multimodal"]["audio_model_args"]
    for key in ("semantic_codebook_size", "acoustic_codebook_size", "n_acoustic_codebook"):
        del model[key]
    model["codebook_sizes"] = ",".join(["8192"] + ["21"] * 36)
    read = read_params(written(tmp_path, params)).multimodal.audio_model_args
    assert (read.semantic_codebook_size, read.acoustic_codebook_size, read.n_acoustic_codebook) == (
        8192,
        21,
        36,
    )


@pytest.mark.parametrize(
    "path",
    [
        "dim",
        "n_layers",
        "vocab_size",
        "rope_theta",
        "multimodal.audio_model_args",
        "multimodal.audio_model_args.audio_encoding_args.frame_rate",
        "multimodal.audio_model_args.acoustic_transformer_args.n_layers",
        "multimodal.audio_tokenizer_args.sampling_rate",
        "multimodal.audio_tokenizer_args.semantic_dim",
    ],
)
def test_a_missing_size_is_named_and_never_assumed(tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointError, match=rf"params\.json: {path} is missing; restore"):
        read_params(written(tmp_path, changed(path, ...)))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("dim", "3072", r"dim: the value should be a valid integer, found '3072'"),
        ("dim", 0, "greater than 0"),
        ("n_layers", 10**9, "n_layers: the value should be less than or equal to 1024"),
        ("hidden_dim", 10**40, "hidden_dim: the value should be"),
        (
            "multimodal.audio_tokenizer_args.decoder_transformer_lengths_str",
            "2,2,2,1019",
            "at most 1024 layers",
        ),
        ("multimodal.audio_tokenizer_args.encoder_convs_kernels_str", "9999,4,4,3", "at most 1024 layers"),
        ("n_layers", True, "n_layers: the value should be a valid integer"),
        ("multimodal.audio_tokenizer_args.voice", ["a"], r"voice: .*dictionary"),
        ("multimodal.audio_tokenizer_args.decoder_convs_strides_str", "1,2,two,2", "whole numbers"),
        ("multimodal.audio_tokenizer_args.decoder_convs_strides_str", "1,2,2", "equally many"),
        ("multimodal.audio_tokenizer_args.decoder_convs_strides_str", "1,2,2,1", "multiply to the same"),
        ("multimodal.audio_tokenizer_args.channels", 2, "channels: the value should be 1, found 2"),
        ("multimodal.audio_tokenizer_args.semantic_codebook_size", 4096, "codebook sizes .* the same"),
        ("multimodal.audio_model_args.audio_encoding_args.num_codebooks", 36, "num_codebooks should be 37"),
        ("multimodal.audio_model_args.audio_encoding_args.frame_rate", 25, "frame_rate should be 12.5"),
        ("multimodal.audio_model_args.audio_encoding_args.sampling_rate", 16000, "sampling_rate should be"),
        ("multimodal.audio_model_args.acoustic_transformer_args.input_dim", 2048, "input_dim should be dim"),
        ("n_kv_heads", 5, "n_heads should be a multiple"),
    ],
)
def test_values_that_cannot_be_are_told_in_one_sentence(
    tmp_path: Path, path: str, value: Any, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        read_params(written(tmp_path, changed(path, value)))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "params.json") in str(error.value)
    assert "restore the file" in str(error.value)


def test_another_models_params_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"params\.json is of another model \(model_type 'mamba'"):
        read_params(written(tmp_path, {"model_type": "mamba", "dim": 4}))
    with pytest.raises(CheckpointError, match="is of another model"):
        read_params(written(tmp_path, {"dim": 4}))


def test_the_architectures_name_is_enough_as_it_is_for_vllm_omni(tmp_path: Path) -> None:
    params = changed("model_type", ...) | {"architectures": ["VoxtralTTSForConditionalGeneration"]}
    assert read_params(written(tmp_path, params)).dim == 3072


def test_a_folder_of_another_model_is_told_from_an_incomplete_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"params\.json is missing; name the folder of a Voxtral"):
        read_params(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"holds another model \(config\.json says 'llama'"):
        read_params(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "voxtral_tts"}')
    with pytest.raises(CheckpointError, match="a converted Voxtral TTS checkpoint"):
        read_params(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder; name the folder"):
        read_params(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"voxtral"', "\x00\x01", "[" * 100_000])
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"params\.json (is not valid JSON|is empty|should hold a JSON object)"
    ) as error:
        read_params(written(tmp_path, text))
    assert "download it again" in str(error.value)


def test_vllm_omnis_own_parser_reads_the_same_params() -> None:
    sys.path.insert(0, str(PARITY))
    try:
        from oracle import load_oracle
    finally:
        sys.path.remove(str(PARITY))
    theirs = load_oracle().parse_params(RELEASE)
    params = Params.model_validate(RELEASE)
    config = params.voxtral_config()
    acoustic = theirs.audio_config["audio_model_args"]["acoustic_transformer_args"]
    codec = theirs.audio_config["codec_args"]
    assert theirs.audio_config["speaker_id"] == params.voices
    assert theirs.audio_config["sampling_rate"] == config.codec.sampling_rate
    assert theirs.text_config.hidden_size == config.backbone.dim
    assert theirs.text_config.num_hidden_layers == config.backbone.n_layers
    assert theirs.text_config.num_key_value_heads == config.backbone.n_kv_heads
    assert {key: value for key, value in acoustic.items() if hasattr(config.acoustic, key)} == {
        key: getattr(config.acoustic, key) for key in acoustic if hasattr(config.acoustic, key)
    }
    assert {key: value for key, value in codec.items() if hasattr(config.codec, key)} == {
        key: getattr(config.codec, key) for key in codec if hasattr(config.codec, key)
    }


def test_one_command_parses_the_file_once_and_a_changed_file_anew(tmp_path: Path) -> None:
    folder = written(tmp_path, RELEASE)
    first = read_params(folder)
    assert read_params(folder) is first
    written(tmp_path, RELEASE | {"max_seq_len": 128})
    assert read_params(folder).max_seq_len == 128
    assert first.max_seq_len == RELEASE["max_seq_len"]
