"""The tiny model that speaks in these tests, and prompts for it."""

from __future__ import annotations

import pytest
import torch

from revox.checkpoint.load import load_model
from revox.checkpoint.voices import load_voice
from revox.synthesis.prompt import Prompter, make_prompt


@pytest.fixture(scope="module", autouse=True)
def _everywhere_here(one_thread):
    """One thread in every file of this room."""


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    # float64, where no code hangs on a rounding: what is compared here must be equal on every machine.
    return load_model(tiny_checkpoint, dtype=torch.float64)


@pytest.fixture(scope="module")
def prompter(tiny_checkpoint):
    return Prompter(tiny_checkpoint)


@pytest.fixture(scope="module")
def prompts_of(model, prompter, tiny_checkpoint):
    """`prompts_of([(text, voice, ...), ...])`: as the model reads them."""

    def embedded(requests):
        return [
            make_prompt(model, prompter, text, load_voice(tiny_checkpoint, name)).embeddings
            for text, name, _ in requests
        ]

    return embedded
