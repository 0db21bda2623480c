from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from lab.speech.whisper_ct2 import convert, read_variables, to_transformers

TYPES = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|notimestamps|>", "<|startofprev|>"]


def _write(path, variables, name="WhisperSpec", version=6):
    """CTranslate2's model.bin, as `ModelSpec._serialize` writes it."""

    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", version) + string(name) + struct.pack("<II", 3, len(variables))
    for key, value in variables.items():
        content += string(key) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        content += struct.pack("<BI", TYPES[str(value.dtype)], value.nbytes) + value.tobytes()
    alias = string("decoder/projection/weight") + string("decoder/embeddings/weight")
    path.write_bytes(content + struct.pack("<I", 1) + alias)


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        num_mel_bins=4,
        max_source_positions=6,
        max_target_positions=5,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture
def variables(whisper):
    """The model's weights under CTranslate2's names, fused as `WhisperLoader` fuses them."""
    model, found = whisper.model, {}

    def put(name, *modules):
        weights = [m.weight.detach() for m in modules]
        norm = len(weights[0].shape) == 1
        found[f"{name}/{'gamma' if norm else 'weight'}"] = torch.cat(weights).numpy()
        biases = [torch.zeros(len(m.weight)) if m.bias is None else m.bias.detach() for m in modules]
        found[f"{name}/{'beta' if norm else 'bias'}"] = torch.cat(biases).numpy()

    put("encoder/conv1", model.encoder.conv1)
    put("encoder/conv2", model.encoder.conv2)
    found["decoder/embeddings/weight"] = model.decoder.embed_tokens.weight.detach().numpy()
    for side, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        put(f"{side}/layer_norm", part.layer_norm)
        found[f"{side}/position_encodings/encodings"] = part.embed_positions.weight.detach().numpy()
        found[f"{side}/num_heads"] = np.array(2, np.int16)
        for i, layer in enumerate(part.layers):
            name, attention = f"{side}/layer_{i}", layer.self_attn
            put(f"{name}/self_attention/layer_norm", layer.self_attn_layer_norm)
            put(f"{name}/self_attention/linear_0", attention.q_proj, attention.k_proj, attention.v_proj)
            put(f"{name}/self_attention/linear_1", attention.out_proj)
            if side == "decoder":
                cross = layer.encoder_attn
                put(f"{name}/attention/layer_norm", layer.encoder_attn_layer_norm)
                put(f"{name}/attention/linear_0", cross.q_proj)
                put(f"{name}/attention/linear_1", cross.k_proj, cross.v_proj)
                put(f"{name}/attention/linear_2", cross.out_proj)
            put(f"{name}/ffn/layer_norm", layer.final_layer_norm)
            put(f"{name}/ffn/linear_0", layer.fc1)
            put(f"{name}/ffn/linear_1", layer.fc2)
    return found


def test_a_converted_folder_is_the_same_whisper_to_transformers(tmp_path, whisper, variables):
    _write(tmp_path / "model.bin", variables)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"alignment_heads": [[0, 1]], "suppress_ids": [5], "suppress_ids_begin": [6], "lang_ids": [2]}
        )
    )
    special = [{"content": token, "id": i} for i, token in enumerate(SPECIAL)]
    tokenizer = {"added_tokens": special, "model": {"vocab": {"a": 5, "b": 6, "ab": 7}, "merges": ["a b"]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(tmp_path, tmp_path / "out")
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", use_safetensors=True).eval()
    assert loaded.generation_config.alignment_heads == [[0, 1]]
    assert not loaded.generation_config.is_multilingual
    inputs = {"input_features": torch.randn(1, 4, 12), "decoder_input_ids": torch.tensor([[1, 7, 3]])}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, whisper(**inputs).logits, rtol=0, atol=0)


def test_half_precision_stays_half_precision(tmp_path, variables):
    halves = {k: v.astype(np.float16) if v.ndim else v for k, v in variables.items()}
    _write(tmp_path / "model.bin", halves)
    state = to_transformers(read_variables(tmp_path / "model.bin"))
    assert {value.dtype for value in state.values()} == {np.dtype("float16")}


def test_a_quantized_model_is_refused(tmp_path, variables):
    variables["encoder/conv1/weight"] = variables["encoder/conv1/weight"].astype(np.int8)
    _write(tmp_path / "model.bin", variables)
    with pytest.raises(ValueError, match=r"encoder/conv1/weight is int8; expected a model of float16"):
        to_transformers(read_variables(tmp_path / "model.bin"))


def test_a_variable_without_a_place_is_named(variables):
    variables["encoder/extra/weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"no place in transformers' Whisper for encoder/extra/weight"):
        to_transformers(variables)


def test_another_kind_or_version_of_file_is_named(tmp_path):
    _write(tmp_path / "model.bin", {}, name="TransformerSpec")
    with pytest.raises(ValueError, match=r"is a TransformerSpec; expected a WhisperSpec in binary version 6"):
        read_variables(tmp_path / "model.bin")
    _write(tmp_path / "model.bin", {}, version=5)
    with pytest.raises(ValueError, match=r"is version 5; expected a WhisperSpec"):
        read_variables(tmp_path / "model.bin")
