"""The language model's opinion of codes, as a search uses it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional

import revox
from revox.coding.invert import InversionConfig, invert
from revox.coding.likelihood import opinion_on
from revox.demo import checkpoint_folder

TEXT = "See you on Monday the ninth."


@pytest.fixture(scope="module")
def tts() -> revox.api.Revox:
    return revox.load(checkpoint_folder(), device="cpu", dtype=torch.float32)


def opinion(tts, text: str):
    return opinion_on(tts.model, partial(tts.prompter.tokens_for_rows, text), tts.prompter.audio_token)


def soft(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return functional.one_hot(codes[0], 512).float(), codes[1:].float() / 10 - 1


def test_it_prefers_the_text_that_was_said_and_judges_the_same_codes_the_same(tts):
    codes = tts.synthesize(TEXT, "casual_male", seed=0).codes
    with torch.no_grad():
        right = opinion(tts, TEXT)(*soft(codes))
        again = opinion(tts, TEXT)(*soft(codes))
        wrong = opinion(tts, "Twelve bottles please.")(*soft(codes))
        random = opinion(tts, TEXT)(*soft(torch.randint(21, codes.shape)))
    assert right == again
    assert right < wrong < random


def test_its_slope_reaches_both_kinds_of_codes_and_each_question_draws_anew(tts):
    codes = tts.synthesize(TEXT, "casual_male", seed=0).codes[:, :10]
    probabilities, values = (x.requires_grad_() for x in soft(codes))
    ask = opinion(tts, TEXT)
    first, second = ask(probabilities, values), ask(probabilities, values)
    assert first != second
    first.backward()
    assert probabilities.grad.abs().sum() > 0
    assert values.grad.abs().sum() > 0


def test_a_search_that_asks_ends_with_codes_that_the_model_likes_better(tts):
    codes = tts.synthesize(TEXT, "casual_male", seed=0).codes
    codec = tts.model.audio_tokenizer
    target = codec.decode(codes[None])[0].detach()
    config = InversionConfig(steps=30, polish_rounds=0, opinion_weight=2.0, opinion_every=1)
    plain = invert(codec, target, config=config).codes
    asked = invert(codec, target, config=config, opinion=opinion(tts, TEXT)).codes
    with torch.no_grad():
        judge = opinion(tts, TEXT)
        assert judge(*soft(asked)) < 0.9 * judge(*soft(plain))
