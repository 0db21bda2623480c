"""Weights in fewer bits: read as the libraries that wrote them read them, and as revox writes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.inspect import inspect
from revox.checkpoint.load import fastest_weights, load_model
from revox.checkpoint.quantize import write_quantized
from revox.checkpoint.quantized import stored_weights
from revox.checkpoint.release import TensorSpec
from revox.checkpoint.runtimes import VLLM_OMNI
from revox.checkpoint.tensors import WEIGHTS, read_header
from revox.model.linear import Int4Linear, Int8Linear, Int8Weight, as_tensor

# Each has the tensors that a library writes for one matrix, and `expected`, its own dequantization.
FILES = sorted((Path(__file__).parent / "quantized").glob("*.safetensors"))
WRONG_STATES = (b"[]", b"{}", b"no JSON", b'{"shape": null, "blocksize": 64}')
"""Of bitsandbytes' NF4."""


def read(path: Path, shape: tuple[int, ...]) -> tuple[str, Tensor]:
    """The kind and the values of the matrix `weight` in a file."""
    [weight] = stored_weights(read_header(path), {"weight": TensorSpec(shape, "BF16", "backbone")}).values()
    return weight.kind, as_tensor(weight.read())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_matrix_is_what_the_library_that_quantized_it_says(path):
    with safe_open(path, "pt") as file:
        expected, library = file.get_tensor("expected").float(), file.metadata()["made by"]
    kind, values = read(path, tuple(expected.shape))
    assert kind.split()[0].lower() in library.lower()
    assert (abs(values - expected) <= 2**-22 * abs(expected)).all()


@pytest.mark.parametrize("shape", [(1,), (), (256,), (256, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("last", ["weight_scale", "weight_scale_inv", "scale_weight", "qscale_weight"])
def test_fp8_is_multiplied_by_its_scale_of_a_tensor_a_channel_or_a_block(shape, last, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = (100 * torch.randn(256, 384, generator=generator)).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=generator) + 0.1
    path = tmp_path / "fp8.safetensors"
    save_file({"weight": weight, last: scale, "input_scale": torch.ones(1)}, path)
    factors = scale
    if shape == (2, 3):
        factors = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    elif shape == (256,):
        factors = scale[:, None]
    kind, values = read(path, (256, 384))
    assert kind == "FP8"
    assert torch.equal(values, weight.float() * factors)


def test_parts_that_do_not_fit_together_are_refused_with_the_matrix_named(tmp_path):
    path = tmp_path / "int8.safetensors"
    save_file({"weight": torch.zeros(16, 32, dtype=torch.int8), "weight_scale": torch.ones(5)}, path)
    with pytest.raises(
        CheckpointError, match=r"weight \(revox int8\) does not stand for a matrix \[16, 32\]"
    ):
        read(path, (16, 32))
    with pytest.raises(CheckpointError, match=r"does not stand for a matrix \[16, 64\]"):
        read(path, (16, 64))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_damaged_parts_are_a_sentence_whatever_is_wrong_with_them(path, tmp_path):
    whole = load_file(path)
    shape = tuple(whole.pop("expected").shape)
    state = "weight.quant_state.bitsandbytes__nf4"
    damaged = [whole | {name: torch.zeros(0, dtype=whole[name].dtype)} for name in whole]
    damaged += [whole | {name: whole[name].reshape(-1)[:1]} for name in whole if whole[name].numel() > 1]
    damaged += [whole | {state: torch.tensor(list(text), dtype=torch.uint8)} for text in WRONG_STATES]
    for parts in damaged if state in whole else damaged[: -len(WRONG_STATES)]:
        if parts.get("weight_format", torch.ones(1)).numel():
            save_file({**parts}, tmp_path / "damaged.safetensors")
            with pytest.raises(CheckpointError, match="does not stand for a matrix"):
                read(tmp_path / "damaged.safetensors", shape)


def test_scales_of_no_block_are_refused(tmp_path):
    weight = torch.zeros(16, 32).to(torch.float8_e4m3fn)
    save_file({"weight": weight, "weight_scale": torch.zeros(0, 0)}, tmp_path / "fp8.safetensors")
    with pytest.raises(CheckpointError, match="does not stand for a matrix"):
        read(tmp_path / "fp8.safetensors", (16, 32))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_written_in_fewer_bits_loads_as_the_original_quantized_at_load(
    bits, tiny_checkpoint, tmp_path
):
    before, after = write_quantized(tiny_checkpoint, tmp_path / "small", bits)
    assert after < before
    small, held = (
        load_model(folder, quantized=f"int{bits}") for folder in (tmp_path / "small", tiny_checkpoint)
    )
    x = torch.randn(3, 256)
    for path, layer in held.named_modules():
        if isinstance(layer, Int8Linear | Int4Linear):
            inputs = x[:, : layer.in_features]
            assert torch.equal(small.get_submodule(path)(inputs), layer(inputs)), path
    for name, tensor in held.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name
    assert fastest_weights(tmp_path / "small", torch.device("cpu")) == f"int{bits}"
    assert {p.name for p in (tmp_path / "small").iterdir()} >= {"params.json", "tekken.json", WEIGHTS}
    assert len(list((tmp_path / "small" / "voice_embedding").glob("*.pt"))) == 20


def test_a_folder_in_8_bits_in_floating_point_is_what_its_values_stand_for(tiny_checkpoint, tmp_path):
    write_quantized(tiny_checkpoint, tmp_path / "small", 8)
    name = "layers.1.feed_forward.w2.weight"
    original = load_file(tiny_checkpoint / WEIGHTS)[name]
    model = load_model(tmp_path / "small", dtype=torch.float32)
    held = model.backbone.layers[1].feed_forward.w2.weight
    assert torch.equal(held, Int8Weight.of(original).dequantize())


def test_fp8_weights_may_be_held_in_8_bits(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "params.json", tmp_path)
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    name = "layers.0.attention.wq.weight"
    scale = tensors[name].float().abs().max() / 448
    tensors[f"{name}_scale"] = scale.reshape(1)
    tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / WEIGHTS)
    layer = load_model(tmp_path, quantized="int8").backbone.layers[0].attention.wq
    x, weight = torch.randn(4, 256), tensors[name].float() * scale
    assert (layer(x) - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()


def test_what_is_quantized_already_is_not_quantized_again(tiny_checkpoint, tmp_path):
    write_quantized(tiny_checkpoint, tmp_path / "small", 8)
    with pytest.raises(CheckpointError, match=r"is quantized already \(revox int8\)"):
        write_quantized(tmp_path / "small", tmp_path / "smaller", 4)
    assert not (tmp_path / "smaller").exists()


MLX_NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
"""As mlx-audio's `_remap_layer_key` renames the parts of a layer."""


def mlx_name(name: str, prefix: str) -> str:
    """The name that mlx-audio's `sanitize` gives to a tensor of the release."""
    if name.startswith("layers."):
        _, layer, part = name.split(".", 2)
        return f"{prefix}layers.{layer}.{MLX_NAMES[part.removesuffix('.weight')]}.weight"
    renamed = {
        "mm_audio_embeddings.tok_embeddings.weight": "embed_tokens.weight",
        "norm.weight": "norm.weight",
    }
    return prefix + renamed[name] if name in renamed else name.removeprefix("mm_audio_embeddings.")


@pytest.mark.parametrize("prefix", ["language_model.model.model.", "language_model.model."])
def test_a_folder_with_mlx_audios_names_is_the_same_model(prefix, tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "params.json", tmp_path)
    shutil.copy(tiny_checkpoint / "tekken.json", tmp_path)
    shutil.copytree(tiny_checkpoint / "voice_embedding", tmp_path / "voice_embedding")
    tensors = {mlx_name(k, prefix): v for k, v in load_file(tiny_checkpoint / WEIGHTS).items()}
    wq = mlx_name("layers.1.attention.wq.weight", prefix)
    values = torch.randint(0, 16, tensors[wq].shape, generator=torch.Generator().manual_seed(0))
    shifts = 4 * torch.arange(8)
    packed = (values.unflatten(1, (-1, 8)) << shifts).sum(-1)
    groups = tensors[wq].shape[0], tensors[wq].shape[1] // 64
    tensors[wq] = packed.to(torch.uint32)
    tensors[wq.replace("weight", "scales")] = torch.full(groups, 0.5)
    tensors[wq.replace("weight", "biases")] = torch.full(groups, -4.0)
    save_file(tensors, tmp_path / "model.safetensors")
    report = inspect(tmp_path)
    assert (report.problems, report.unknown, report.renamed) == ([], [], True)
    speaks = {found.name: found.preset_speech for found in report.runtimes}
    assert speaks["revox"] == "speaks the presets"
    assert "mlx-audio's names" in speaks[VLLM_OMNI.title]
    model, original = load_model(tmp_path, dtype=None), load_model(tiny_checkpoint, dtype=None).state_dict()
    for name, tensor in model.state_dict().items():
        exact = values * 0.5 - 4 if name == "backbone.layers.1.attention.wq.weight" else original[name]
        assert torch.equal(tensor.float(), exact.float()), name
