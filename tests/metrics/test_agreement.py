"""Agreement of codes given the same past: a model with itself, with another, and with fewer bits."""

from __future__ import annotations

import pytest
import torch

from revox.checkpoint.load import load_model
from revox.checkpoint.voices import load_voice
from revox.demo import checkpoint_folder
from revox.metrics.agreement import ComparedUtterance, code_agreement
from revox.synthesis.engine import Engine, Request, noise_of
from revox.synthesis.prompt import Prompter, make_prompt

TEXTS = ("please close the door in the kitchen", "today is monday the third of march", "my number is two")
VOICES = ("neutral_male", "casual_female", "de_male", "fr_female")


@pytest.fixture(scope="module")
def reference():
    return load_model(checkpoint_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def utterances(reference):
    """What the lab checkpoint says in float32."""
    prompter, spoken = Prompter(checkpoint_folder()), []
    for seed, (text, name) in enumerate((text, name) for text in TEXTS for name in VOICES):
        voice = load_voice(checkpoint_folder(), name)
        request = Request(make_prompt(reference, prompter, text, voice).embeddings, seed, max_frames=80)
        [one] = Engine(reference).generate_batch([request])
        tokens = torch.tensor(prompter.tokens(text, len(voice.embedding)))
        noise = noise_of(seed, 36)[: len(one.frames) + 1]
        spoken.append(
            ComparedUtterance(tokens, prompter.audio_token, voice.embedding, torch.stack(one.frames), noise)
        )
    return spoken


def test_a_model_chooses_what_it_said_itself(reference, utterances):
    found = code_agreement(reference, reference, utterances)
    assert (found.semantic, found.acoustic, found.level_error, found.first) == (1, 1, 0, None)
    assert found.frames == sum(len(one.frames) + 1 for one in utterances)


def test_8_bits_choose_98_of_100_semantic_codes_as_float32_does(reference, utterances):
    found = code_agreement(reference, load_model(checkpoint_folder(), quantized="int8"), utterances)
    assert found.semantic >= 0.98
    assert found.level_error < 0.15  # 7 bits of the acoustic transformer's activations without VNNI


def test_4_bits_choose_fewer(reference, utterances):
    found = code_agreement(reference, load_model(checkpoint_folder(), quantized="int4"), utterances)
    assert 0.85 <= found.semantic < 1
    assert found.first is not None
    assert 0.1 < found.level_error < 0.5
