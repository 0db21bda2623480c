"""LoRA factors in peft's format: read as peft means them, equal to merged weights, or refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import revox
from conftest import TINY, tiny_model
from revox.checkpoint.adapter import CONFIG_FILE, FACTORS_FILE, read_adapter, write_adapter
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.load import load_model
from revox.checkpoint.release import expected_tensors
from revox.checkpoint.tensors import WEIGHTS
from revox.model.voxtral import parameter_name
from revox.training.deltas import Deltas

EXPECTED = expected_tensors(TINY)
QUERIES = "layers.1.attention.wq"
OUTPUTS = "acoustic_transformer.layers.0.feed_forward.w2"
# As peft 0.21 writes it, with the settings that are off left out.
CONFIG = {
    "alpha_pattern": {}, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
    "init_lora_weights": True, "layer_replication": None, "lora_alpha": 16, "lora_bias": False,
    "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": 2, "rank_pattern": {},
    "target_modules": ["wq", "w2"], "task_type": None, "use_dora": False, "use_rslora": False,
}  # fmt: skip


def factors_of(stem: str, rank: int = 2) -> dict[str, torch.Tensor]:
    out, inside = EXPECTED[f"{stem.removeprefix('backbone.')}.weight"].shape
    rng = torch.Generator().manual_seed(len(stem))
    return {
        f"base_model.model.{stem}.lora_A.weight": torch.randn((rank, inside), generator=rng),
        f"base_model.model.{stem}.lora_B.weight": 0.02 * torch.randn((out, rank), generator=rng),
    }


@pytest.fixture
def written(tmp_path):
    """A folder as peft writes it."""

    def write(tensors=None, **config):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        save_file(tensors or factors_of(QUERIES) | factors_of(OUTPUTS), folder / FACTORS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(CONFIG | config))
        return folder

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_becomes_w_plus_alpha_over_r_times_b_a(tiny_checkpoint, written, dtype):
    folder = written()
    before = load_model(tiny_checkpoint, dtype=torch.float32).state_dict()
    after = load_model(tiny_checkpoint, dtype=dtype, adapter=folder).state_dict()
    for stem in (QUERIES, OUTPUTS):
        a, b = factors_of(stem).values()
        name = parameter_name(f"{stem}.weight")
        expected = before[name] + 16 / 2 * (b @ a)
        torch.testing.assert_close(after.pop(name), expected.to(dtype), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(tensor.float(), before[name]) for name, tensor in after.items())


def test_names_of_the_wrapped_network_are_taken_too(tiny_checkpoint, written):
    adapter = read_adapter(written(factors_of(f"backbone.{QUERIES}")), EXPECTED)
    assert list(adapter.factors) == [f"{QUERIES}.weight"]


@pytest.mark.parametrize("part", ["lora", "attention"])
def test_what_training_writes_gives_the_merged_weights(tiny_checkpoint, tmp_path, part):
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    deltas = Deltas.on(model, part, rank=2)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in deltas.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    merged = deltas.merged(model, 0.75)
    write_adapter(tmp_path / "adapter", deltas.adapter(0.75), {"seed": 0})
    applied = load_model(tiny_checkpoint, dtype=torch.float32, adapter=tmp_path / "adapter").state_dict()
    base = load_model(tiny_checkpoint, dtype=torch.float32).state_dict()
    assert merged
    for name, tensor in merged.items():
        assert torch.equal(applied[parameter_name(name)].bfloat16(), tensor)
        assert not torch.equal(base[parameter_name(name)].bfloat16(), tensor)
    # The written names match those modules and no other.
    pattern = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["target_modules"]
    assert {n for n in EXPECTED if re.fullmatch(pattern, n.removesuffix(".weight"))} == set(merged)


def test_changes_of_full_rank_have_no_adapter():
    assert Deltas.on(tiny_model(), "embeddings", rank=2).adapter(1.0) is None


def test_quantized_weights_are_those_of_the_changed_ones(tiny_checkpoint, written):
    layer = load_model(tiny_checkpoint, quantized="int8", adapter=written()).backbone.layers[1].attention.wq
    a, b = factors_of(QUERIES).values()
    base = load_model(tiny_checkpoint, dtype=torch.float32).backbone.layers[1].attention.wq.weight
    found = layer(torch.eye(base.shape[1])).T
    torch.testing.assert_close(found, base + 8 * (b @ a), rtol=0, atol=float((8 * (b @ a)).abs().max()) / 64)
    assert float((8 * (b @ a)).abs().max()) > 0.1


def test_it_speaks_what_the_merged_folder_speaks(tiny_checkpoint, tiny_checkpoint_copy, written):
    folder = written(lora_alpha=2)
    state = load_file(tiny_checkpoint_copy / WEIGHTS)
    for stem in (QUERIES, OUTPUTS):
        a, b = factors_of(stem).values()
        state[f"{stem}.weight"] = (state[f"{stem}.weight"].float() + b @ a).bfloat16()
    save_file(state, tiny_checkpoint_copy / WEIGHTS)
    given = {"device": "cpu", "dtype": torch.bfloat16}
    adapted, merged = (
        revox.load(tiny_checkpoint, adapter=folder, **given),
        revox.load(tiny_checkpoint_copy, **given),
    )
    plain = revox.load(tiny_checkpoint, **given)
    codes = [
        tts.synthesize("ten to five", "pt_male", seed=1, max_seconds=0.8).codes
        for tts in (adapted, merged, plain)
    ]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_an_adapter_that_does_not_fit_is_a_sentence(tiny_checkpoint, written, tmp_path):
    def refused(folder, sentence):
        with pytest.raises(CheckpointError, match=sentence):
            load_model(tiny_checkpoint, adapter=folder)

    good = factors_of(QUERIES)
    down, up = good
    refused(tmp_path / "nothing", r"adapter_config\.json is missing; name a folder")
    refused(written(peft_type="LOHA"), "peft_type: Input should be 'LORA'")
    refused(written(r=0), "r: Input should be greater than 0")
    refused(written(lora_alpha=None), "lora_alpha: Input should be a valid number")
    refused(written(bias="all"), "bias: Input should be 'none'")
    refused(written(use_dora=True), "use_dora is True, and plain LoRA of one rank and scale is expected")
    refused(written(alpha_pattern={"wq": 4}), "alpha_pattern is {'wq': 4}")
    refused(written(r=3), r"lora_A.weight is F32 \[2, \d+\], expected floating point \[3, \d+\]")
    refused(written({up: good[up]}), "lacks the factors of layers.1.attention.wq.weight")
    refused(written(good | {up: good[up][:8].clone()}), r"\[8, 2\], expected floating point \[128, 2\]")
    refused(written(good | {up: torch.full_like(good[up], torch.nan)}), "not finite")
    refused(written(good | {up: good[up].int()}), "is I32")
    for stem in ("layers.9.attention.wq", "layers.1.self_attn.q_proj", "norm",
                 "audio_tokenizer.decoder_blocks.1.layers.0.attention.wq"):  # fmt: skip
        named = {key.replace(QUERIES, stem): value for key, value in good.items()}
        refused(written(named), rf"{stem}\.lora_A\.weight is not a LoRA factor of a matrix of this")
    refused(written({f"{down}.extra": good[down]}), "is not a LoRA factor")
    folder = written()
    (folder / FACTORS_FILE).write_bytes(b"none")
    refused(folder, "is truncated, damaged or not a safetensors file")
