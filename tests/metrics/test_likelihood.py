from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from conftest import TINY, preset_codes, tiny_model
from revox.metrics.errors import MetricError
from revox.metrics.likelihood import (
    likelihood,
    soft_embedding,
    soft_likelihood,
    soft_voice_embedding,
)
from revox.model.backbone import KVCache
from revox.synthesis.engine import Engine, Request

AUDIO = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def codes():
    return preset_codes()["casual_male"]


def prompt_of(model, rows):
    tokens = torch.tensor([1, 25, *[AUDIO] * len(rows), 30, 500, 501, 31, 25])
    return model.embed_prompt(tokens, AUDIO, rows)


@pytest.fixture(scope="module")
def prompt(model):
    return prompt_of(model, model.mm_audio_embeddings.voice_embedding(preset_codes()["neutral_male"]))


def one_hot(codes):
    return functional.one_hot(codes[0], TINY.codec.semantic_codebook_size).float()


def values(codes):
    return codes[1:].float() / 10 - 1


def test_the_likelihood_is_that_of_speaking_frame_by_frame(model, prompt, codes):
    """Oracle: the loop that speaks, one frame at a time through its cache, made to say these codes."""
    room = len(prompt) + codes.shape[1]
    cache = KVCache.empty(model.config.backbone, 1, room, model.dtype, model.device)
    hidden = model.prefill([prompt], cache)
    expected = []
    for ids in (codes + 2).T:
        expected.append(-model.acoustic_transformer.semantic_logits(hidden)[0].log_softmax(0)[ids[0]])
        hidden = model.feed_frames(ids[None], cache)
    expected.append(-model.acoustic_transformer.semantic_logits(hidden)[0].log_softmax(0)[1])
    found = likelihood(model, prompt, codes)
    torch.testing.assert_close(found.semantic, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert float(found.semantic_nll) == pytest.approx(sum(map(float, expected)) / len(expected), abs=1e-4)
    assert float(found.end_nll) == pytest.approx(float(expected[-1]), abs=1e-4)


def test_what_the_model_chose_itself_is_likelier_than_anything_else(model, prompt):
    [spoken] = Engine(model).generate_batch([Request(prompt, 0, 12)])
    codes = spoken.codes()
    own = likelihood(model, prompt, codes)
    # Each code was the argmax: no other code of that frame costs less.
    other = codes.clone()
    other[0, -1] = (other[0, -1] + 1) % TINY.codec.semantic_codebook_size
    assert likelihood(model, prompt, other).semantic[-2] >= own.semantic[-2]
    random = torch.randint(21, (37, codes.shape[1]), generator=torch.Generator().manual_seed(0))
    assert likelihood(model, prompt, random).semantic_nll > own.semantic_nll


def test_flow_error_of_a_velocity_known_in_closed_form(model, prompt, codes, monkeypatch):
    """A velocity of zero errs by (x1 - x0)^2: x1^2 + 1 on average. The right velocity errs by nothing."""
    monkeypatch.setattr(model.acoustic_transformer, "velocity", lambda x, t, h: torch.zeros_like(x))
    many = likelihood(model, prompt, codes, draws=400)
    expected = values(codes).square().mean(dim=0) + 1
    torch.testing.assert_close(many.flow, expected, atol=0.1, rtol=0)
    goal = values(codes).T
    monkeypatch.setattr(  # from a point on the way, x1 is (x1 - x_t) / (1 - t) away
        model.acoustic_transformer, "velocity", lambda x, t, h: (goal - x) / (1 - t[:, None])
    )
    assert float(likelihood(model, prompt, codes).flow_error) < 1e-6


def test_draws_are_fixed_by_the_seed(model, prompt, codes):
    first, again = (likelihood(model, prompt, codes, seed=3).flow for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, likelihood(model, prompt, codes, seed=4).flow)


def test_hard_codes_given_softly_score_the_same(model, prompt, codes):
    hard = likelihood(model, prompt, codes)
    soft = soft_likelihood(model, prompt, one_hot(codes), values(codes))
    torch.testing.assert_close(soft.semantic, hard.semantic, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(soft.flow, hard.flow, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        soft_voice_embedding(model, one_hot(codes), values(codes)),
        model.mm_audio_embeddings.voice_embedding(codes),
        atol=1e-5,
        rtol=0,
    )


def test_soft_codes_by_hand(model):
    """Two equally likely codes, and a value a quarter of the way from level 10 to level 11."""
    semantic = torch.zeros(1, TINY.codec.semantic_codebook_size)
    semantic[0, 3] = semantic[0, 8] = 0.5
    acoustic = torch.full((36, 1), 0.0)
    acoustic[0] = 0.025
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    first = TINY.codec.semantic_codebook_size + 2
    expected = 0.5 * (table[3 + 2] + table[8 + 2])
    expected = expected + 0.75 * table[first + 10 + 2] + 0.25 * table[first + 11 + 2]
    for k in range(1, 36):
        expected = expected + table[first + 23 * k + 10 + 2]
    torch.testing.assert_close(soft_embedding(model, semantic, acoustic)[0], expected, atol=1e-5, rtol=0)


def test_expected_cross_entropy_is_linear_in_the_probabilities(model, prompt, codes):
    """The last frame's probabilities are read by nothing but its own cost."""
    probabilities = one_hot(codes)
    costs = []
    for code in (5, 6):
        probabilities[-1] = 0
        probabilities[-1, code] = 1
        costs.append(soft_likelihood(model, prompt, probabilities, values(codes)).semantic[-2])
    probabilities[-1, 5], probabilities[-1, 6] = 0.25, 0.75
    mixed = soft_likelihood(model, prompt, probabilities, values(codes)).semantic[-2]
    assert float(mixed) == pytest.approx(0.25 * float(costs[0]) + 0.75 * float(costs[1]), abs=1e-4)


def test_gradients_reach_both_inputs_at_every_frame_and_are_finite(model, codes):
    logits = 4 * one_hot(codes)
    logits.requires_grad_()
    # Exactly on levels, the two ends among them, as straight-through codes are.
    levels = values(codes)
    levels[0, 0], levels[1, 0] = -1.0, 1.0
    levels.requires_grad_()
    prompt = prompt_of(model, soft_voice_embedding(model, logits.softmax(-1), levels))
    score = soft_likelihood(model, prompt, logits.softmax(-1), levels)
    (score.semantic_nll + score.flow_error).backward()
    for gradient, frame in ((logits.grad, 1), (levels.grad, 0)):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert (gradient.abs().amax(dim=frame) > 0).all()


def test_the_gradient_in_a_value_is_the_difference_quotient(model, prompt, codes):
    semantic, acoustic = one_hot(codes), values(codes) + 0.02  # within a level's cell
    acoustic = acoustic.clamp(-0.98, 0.98).double().float().requires_grad_()

    def cost(v):
        score = soft_likelihood(model, prompt, semantic, v, draws=2)
        return score.semantic_nll + score.flow_error

    [gradient] = torch.autograd.grad(cost(acoustic), acoustic)
    direction = torch.randn(acoustic.shape, generator=torch.Generator().manual_seed(0)).sign()
    step = 5e-4
    with torch.no_grad():
        quotient = (cost(acoustic + step * direction) - cost(acoustic - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(quotient), rel=0.05)


def test_on_a_level_the_slope_is_the_mean_of_both_sides(model):
    semantic = torch.zeros(1, TINY.codec.semantic_codebook_size)
    semantic[0, 0] = 1
    acoustic = torch.zeros(36, 1, requires_grad=True)
    direction = torch.randn(TINY.backbone.dim, generator=torch.Generator().manual_seed(1))
    (soft_embedding(model, semantic, acoustic)[0] @ direction).backward()
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    start = TINY.codec.semantic_codebook_size + 2
    for k in range(36):
        middle = start + 23 * k + 10 + 2
        expected = float((table[middle + 1] - table[middle - 1]) @ direction) / 2 * 10
        assert float(acoustic.grad[k, 0]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "bad", [torch.zeros(37, 0).long(), torch.zeros(36, 4).long(), torch.full((37, 2), 21)]
)
def test_codes_that_cannot_be_scored_are_a_sentence(model, prompt, bad):
    with pytest.raises(MetricError, match=r"codes"):
        likelihood(model, prompt, bad)


def test_soft_codes_of_another_shape_are_a_sentence(model, codes):
    with pytest.raises(MetricError, match=r"probabilities \[frames, 512\]"):
        soft_embedding(model, one_hot(codes)[:, :-1], values(codes))
