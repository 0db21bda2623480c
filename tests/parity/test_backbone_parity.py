"""The backbone is transformers' Mistral, q and k rows permuted: hidden states within 1e-4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import random_backbone_state, relative_error, small_params
from subject import config_of, load_ours, noise_of
from torch import Tensor
from transformers import MistralConfig, MistralModel

from revox.model.backbone import Backbone, KVCache

TOLERANCE = 1e-4


def half_split_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk from interleaved pairs (the file) to halves (Hugging Face)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def their_backbone(params: dict[str, Any], state: dict[str, Tensor]) -> MistralModel:
    """transformers' MistralModel with the backbone's tensors of `state` (the file's names)."""
    config = MistralConfig(
        vocab_size=8,
        hidden_size=params["dim"],
        intermediate_size=params["hidden_dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        head_dim=params["head_dim"],
        rms_norm_eps=params["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
        max_position_embeddings=params["max_position_embeddings"],
        sliding_window=None,
        pad_token_id=None,
    )
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    theirs = {"embed_tokens.weight": torch.zeros(8, params["dim"])}
    for name, tensor in state.items():
        if name.endswith("wq.weight"):
            tensor = half_split_rows(tensor, params["n_heads"])
        elif name.endswith("wk.weight"):
            tensor = half_split_rows(tensor, params["n_kv_heads"])
        for ours, other in names.items():
            name = name.replace(f".{ours}.", f".{other}.")
        theirs[name] = tensor
    with torch.device("meta"):
        model = MistralModel(config)
    model.load_state_dict(theirs, assign=True)
    # Built without storage: the rotary table is not among the weights.
    model.rotary_emb = type(model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def our_backbone(params: dict[str, Any], state: dict[str, Tensor]) -> Backbone:
    return load_ours(Backbone(config_of(params).backbone), state, "", torch.float32)


@pytest.fixture(scope="module")
def backbones() -> tuple[Backbone, MistralModel]:
    params = small_params()
    state = random_backbone_state(params, seed=3)
    return our_backbone(params, state), their_backbone(params, state)


def hidden_of(model: MistralModel, embeddings: Tensor) -> Tensor:
    return model(inputs_embeds=embeddings, use_cache=False).last_hidden_state


def test_hidden_states_are_mistrals(backbones):
    ours, theirs = backbones
    embeddings = noise_of(1, 2, 150, 256)
    assert relative_error(ours(embeddings), hidden_of(theirs, embeddings)) < TOLERANCE


def test_the_layout_of_rotary_pairs_matters_so_that_the_permutation_is_tested(backbones):
    ours, _ = backbones
    params = small_params()
    state = random_backbone_state(params, seed=3)
    unpermuted = {
        name: half_split_rows(t, params["n_heads" if "wq" in name else "n_kv_heads"]) if t.ndim == 2 and
        name.endswith(("wq.weight", "wk.weight")) else t
        for name, t in state.items()
    }  # fmt: skip
    embeddings = noise_of(1, 1, 40, 256)
    assert relative_error(our_backbone(params, unpermuted)(embeddings), ours(embeddings)) > 0.01


def test_token_by_token_with_the_cache_equals_all_at_once(backbones):
    ours, theirs = backbones
    embeddings = noise_of(2, 2, 30, 256)
    cache = KVCache.empty(ours.config, 2, 30, torch.float32, "cpu")
    steps = torch.cat([ours(embeddings[:, i : i + 1], cache) for i in range(30)], dim=1)
    assert relative_error(steps, ours(embeddings)) < 1e-5
    assert relative_error(steps, hidden_of(theirs, embeddings)) < TOLERANCE


def test_a_prompt_in_chunks_and_then_steps_equals_all_at_once(backbones):
    ours, theirs = backbones
    embeddings = noise_of(3, 1, 41, 256)
    cache = KVCache.empty(ours.config, 1, 64, torch.float32, "cpu")
    parts = [ours(part, cache) for part in embeddings.split([17, 1, 12, 1, 1, 9], dim=1)]
    assert relative_error(torch.cat(parts, dim=1), hidden_of(theirs, embeddings)) < TOLERANCE


def test_each_prompt_of_a_right_padded_batch_and_its_steps_equal_what_it_gives_alone(backbones):
    ours, theirs = backbones
    lengths, steps = [23, 5, 14], 6
    sequences = [noise_of(10 + i, 1, n + steps, 256) for i, n in enumerate(lengths)]
    padded = torch.full((3, max(lengths), 256), 3.0)
    for row, sequence, n in zip(padded, sequences, lengths, strict=True):
        row[:n] = sequence[0, :n]
    cache = KVCache.empty(ours.config, 3, max(lengths) + steps, torch.float32, "cpu")
    prompt = ours(padded, cache, torch.tensor(lengths))
    fed = [
        ours(torch.cat([s[:, n + i : n + i + 1] for s, n in zip(sequences, lengths, strict=True)]), cache)
        for i in range(steps)
    ]
    for item, (sequence, n) in enumerate(zip(sequences, lengths, strict=True)):
        alone = hidden_of(theirs, sequence)[0]
        assert relative_error(prompt[item, :n], alone[:n]) < TOLERANCE
        assert relative_error(torch.cat(fed, dim=1)[item], alone[n:]) < TOLERANCE


def test_items_may_leave_a_batch_between_steps(backbones):
    ours, theirs = backbones
    sequences = noise_of(20, 3, 12, 256)
    cache = KVCache.empty(ours.config, 3, 12, torch.float32, "cpu")
    ours(sequences[:, :10], cache)
    cache.copy(2, 1)
    cache.swap(0, 1)
    left = cache.window(0, 2)
    last = [ours(sequences[[2, 0], i : i + 1], left) for i in (10, 11)]
    expected = hidden_of(theirs, sequences[[2, 0]])[:, 10:]
    assert relative_error(torch.cat(last, dim=1), expected) < TOLERANCE


def test_far_positions_are_mistrals(backbones):
    ours, theirs = backbones
    embeddings = noise_of(4, 1, 1, 256)
    cache = KVCache.empty(ours.config, 1, 4096, torch.float32, "cpu")
    past = noise_of(5, 1, 4095, 256)
    before = ours(past, cache)
    last = ours(embeddings, cache)
    expected = hidden_of(theirs, torch.cat((past, embeddings), dim=1))
    assert relative_error(torch.cat((before, last), dim=1)[:, ::65], expected[:, ::65]) < TOLERANCE
    assert relative_error(last[:, 0], expected[:, -1]) < TOLERANCE
