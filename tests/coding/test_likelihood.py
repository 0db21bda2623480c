"""Language-model guidance of codes, as a search uses it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import revox
from revox.coding.invert import InversionConfig, invert
from revox.coding.likelihood import language_model_guidance
from revox.coding.regularizers import Regularizers
from revox.demo import checkpoint_folder

TEXT = "See you on Monday the ninth."


@pytest.fixture(scope="module")
def tts() -> revox.api.Revox:
    return revox.load(checkpoint_folder(), device="cpu", dtype=torch.float32)


def guidance(tts, text: str):
    return language_model_guidance(tts.model, tts.prompter, text)


def soft(tts, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = tts.model.config.codec.semantic_codebook_size
    return functional.one_hot(codes[0], size).float(), codes[1:].float() / 10 - 1


def test_it_prefers_the_text_that_was_said_and_judges_the_same_codes_the_same(tts):
    codes = tts.synthesize(TEXT, "casual_male", seed=0).codes
    with torch.no_grad():
        right = guidance(tts, TEXT)(*soft(tts, codes))
        again = guidance(tts, TEXT)(*soft(tts, codes))
        wrong = guidance(tts, "Twelve bottles please.")(*soft(tts, codes))
        random = guidance(tts, TEXT)(*soft(tts, torch.randint(21, codes.shape)))
    assert right == again
    assert right < wrong < random


def test_its_slope_reaches_both_kinds_of_codes_and_each_question_draws_anew(tts):
    codes = tts.synthesize(TEXT, "casual_male", seed=0).codes[:, :10]
    probabilities, values = (x.requires_grad_() for x in soft(tts, codes))
    ask = guidance(tts, TEXT)
    first, second = ask(probabilities, values), ask(probabilities, values)
    assert first != second
    first.backward()
    assert probabilities.grad.abs().sum() > 0
    assert values.grad.abs().sum() > 0


def test_a_search_that_asks_ends_with_codes_that_the_model_likes_better(tts):
    codes = tts.synthesize(TEXT, "casual_male", seed=0).codes
    codec = tts.model.audio_tokenizer
    target = codec.decode(codes[None])[0].detach()
    config = InversionConfig(steps=15, local_search_rounds=0, guidance_weight=2.0, guidance_every=1)
    plain = invert(codec, target, config=config).codes
    asked = invert(
        codec, target, config=config, regularizers=Regularizers(guidance=guidance(tts, TEXT))
    ).codes
    with torch.no_grad():
        judge = guidance(tts, TEXT)
        assert judge(*soft(tts, asked)) < 0.9 * judge(*soft(tts, plain))
