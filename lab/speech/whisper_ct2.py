"""A CTranslate2 Whisper as a folder for transformers: `python -m lab.speech.whisper_ct2 FOLDER -o FOLDER`.

The source folder holds `model.bin`, `config.json` and `tokenizer.json`, as faster-whisper reads them. The
result is what `WhisperForConditionalGeneration`, `WhisperTokenizer` and `WhisperFeatureExtractor` load. The
file format and the variables' names: ctranslate2/specs/model_spec.py (`_serialize`) and `WhisperLoader` in
ctranslate2/converters/transformers.py, of CTranslate2 4.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_BINARY_VERSION = 6
# CTranslate2's DataType, in order; it has int8 and int16 for quantized weights, which are refused.
_TYPES = ("float32", "int8", "int16", "int32", "float16")
_MULTILINGUAL = 51_865  # tokens; the English-only vocabulary has fewer (OpenAI's `Whisper.is_multilingual`)


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 `model.bin` by name, without aliases.

    Raises ValueError for another kind or version of file, and for data types that numpy does not have.
    """
    content = path.read_bytes()
    at = 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, content, at)
        at += struct.calcsize(form)
        return value

    def string() -> str:
        nonlocal at
        length = number("H")  # with the final zero
        at += length
        return content[at - length : at - 1].decode("utf-8")

    version = number("I")
    if version != _BINARY_VERSION or (kind := string()) != "WhisperSpec":
        found = f"version {version}" if version != _BINARY_VERSION else f"a {kind}"
        raise ValueError(f"{path} is {found}; expected a WhisperSpec in binary version {_BINARY_VERSION}")
    number("I")  # revision of the specification
    variables = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        type_id, size = number("B"), number("I")
        if type_id >= len(_TYPES):
            raise ValueError(
                f"{path}: {name} is of data type {type_id}; convert the model to float16 or float32"
            )
        data = np.frombuffer(content, _TYPES[type_id], size // np.dtype(_TYPES[type_id]).itemsize, at)
        variables[name] = data.reshape(shape)
        at += size
    return variables


def _modules(prefix: str, variables: dict[str, np.ndarray]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(CTranslate2's module, transformers' parent, its modules in the order of their fused rows)."""
    side = f"model.{prefix}"
    if prefix == "encoder":
        yield from (("encoder/conv1", side, ("conv1",)), ("encoder/conv2", side, ("conv2",)))
    yield f"{prefix}/layer_norm", side, ("layer_norm",)
    layers = {int(found[1]) for name in variables if (found := re.match(rf"{prefix}/layer_(\d+)/", name))}
    for layer in sorted(layers):
        ours, theirs = f"{prefix}/layer_{layer}", f"{side}.layers.{layer}"
        yield f"{ours}/self_attention/layer_norm", theirs, ("self_attn_layer_norm",)
        yield f"{ours}/self_attention/linear_0", f"{theirs}.self_attn", ("q_proj", "k_proj", "v_proj")
        yield f"{ours}/self_attention/linear_1", f"{theirs}.self_attn", ("out_proj",)
        if prefix == "decoder":
            yield f"{ours}/attention/layer_norm", theirs, ("encoder_attn_layer_norm",)
            yield f"{ours}/attention/linear_0", f"{theirs}.encoder_attn", ("q_proj",)
            yield f"{ours}/attention/linear_1", f"{theirs}.encoder_attn", ("k_proj", "v_proj")
            yield f"{ours}/attention/linear_2", f"{theirs}.encoder_attn", ("out_proj",)
        yield f"{ours}/ffn/layer_norm", theirs, ("final_layer_norm",)
        yield f"{ours}/ffn/linear_0", theirs, ("fc1",)
        yield f"{ours}/ffn/linear_1", theirs, ("fc2",)


def to_transformers(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of `WhisperForConditionalGeneration`; its output layer is the tied embedding.

    Raises ValueError where weights are quantized or a variable is left over.
    """
    state, used = {}, set()

    def take(name: str) -> np.ndarray:
        value = variables[name]
        if value.dtype.kind != "f":
            raise ValueError(
                f"{name} is {value.dtype}; expected a model of float16 or float32, not a quantized one"
            )
        used.add(name)
        return value

    state["model.decoder.embed_tokens.weight"] = take("decoder/embeddings/weight")
    for prefix in ("encoder", "decoder"):
        state[f"model.{prefix}.embed_positions.weight"] = take(f"{prefix}/position_encodings/encodings")
        for ours, parent, theirs in _modules(prefix, variables):
            for key, target in (
                ("weight", "weight"),
                ("bias", "bias"),
                ("gamma", "weight"),
                ("beta", "bias"),
            ):
                if f"{ours}/{key}" in variables:
                    rows = np.split(take(f"{ours}/{key}"), len(theirs))
                    # transformers' Whisper has no bias on keys; CTranslate2 writes zeros there.
                    state |= {
                        f"{parent}.{module}.{target}": row
                        for module, row in zip(theirs, rows, strict=True)
                        if (module, target) != ("k_proj", "bias")
                    }
    left = {name for name, value in variables.items() if value.ndim} - used
    if left:
        raise ValueError(f"no place in transformers' Whisper for {', '.join(sorted(left))}")
    return state


def model_config(variables: dict[str, np.ndarray], special: dict[str, int]) -> dict[str, Any]:
    """`WhisperConfig`'s fields, from the variables' shapes. special: special tokens' numbers."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "max_source_positions": variables["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": variables["decoder/position_encodings/encodings"].shape[0],
        "decoder_start_token_id": special["<|startoftranscript|>"],
    }
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), special["<|endoftext|>"])
    for side in ("encoder", "decoder"):
        layers = [name for name in variables if re.fullmatch(rf"{side}/layer_\d+/ffn/linear_0/weight", name)]
        config[f"{side}_layers"] = len(layers)
        config[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        config[f"{side}_ffn_dim"] = variables[layers[0]].shape[0]
    return config


def generation_config(
    model: dict[str, Any], source: dict[str, Any], special: dict[str, int]
) -> dict[str, Any]:
    """`GenerationConfig`'s fields. model: of `model_config`. source: CTranslate2's config.json."""
    config = {name: value for name, value in model.items() if name.endswith("_token_id")}
    config |= {
        "alignment_heads": source["alignment_heads"],
        "suppress_tokens": source["suppress_ids"],
        "begin_suppress_tokens": source["suppress_ids_begin"],
        "no_timestamps_token_id": special["<|notimestamps|>"],
        "prev_sot_token_id": special["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "max_length": model["max_target_positions"],
        "return_timestamps": False,
        "is_multilingual": model["vocab_size"] >= _MULTILINGUAL,
    }
    if config["is_multilingual"]:
        config["lang_to_id"] = {
            token: number for token, number in special.items() if number in set(source["lang_ids"])
        }
        config["task_to_id"] = {task: special[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return config


def convert(source: Path, output: Path) -> None:
    """Write transformers' folder `output` of CTranslate2's folder `source`."""
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor

    variables = read_variables(source / "model.bin")
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    model = model_config(variables, special)
    generation = generation_config(model, json.loads((source / "config.json").read_text()), special)

    output.mkdir(parents=True, exist_ok=True)
    config = WhisperConfig(**model, architectures=["WhisperForConditionalGeneration"])
    config.save_pretrained(output)
    GenerationConfig(**generation).save_pretrained(output)
    WhisperFeatureExtractor(feature_size=model["num_mel_bins"]).save_pretrained(output)
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"])
    texts = {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "vocab.json": json.dumps(tokenizer["model"]["vocab"], ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "added_tokens.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024, "errors": "replace"}
            | dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
        ),
    }
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    state = {name: np.ascontiguousarray(value) for name, value in to_transformers(variables).items()}
    temporary = output / "model.safetensors.part"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(output / "model.safetensors")


def main() -> None:
    """Parse the options and convert."""
    parser = argparse.ArgumentParser(prog="python -m lab.speech.whisper_ct2", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of the CTranslate2 model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    convert(args.source, args.output)


if __name__ == "__main__":
    main()
