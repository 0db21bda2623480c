"""A beam over an encoder's best codes, beside every path that there is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from conftest import preset_codes, tiny_model
from revox.checkpoint.load import load_model
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding import beam as module
from revox.coding.beam import beam_search
from revox.coding.regularizers import Posterior
from revox.coding.student import StudentEncoder
from revox.metrics.likelihood import Continuations, likelihood
from revox.model.voxtral import Voxtral
from revox.synthesis.prompt import Prompter

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "ten past nine"
FRAMES = 4


@pytest.fixture(scope="module")
def model() -> Voxtral:
    return tiny_model().float()


@pytest.fixture(scope="module")
def prompter(tiny_checkpoint: Path) -> Prompter:
    return Prompter(tiny_checkpoint)


@pytest.fixture(scope="module")
def posterior(model: Voxtral) -> Posterior:
    rng = torch.Generator().manual_seed(0)
    config = model.config.codec
    scores = torch.randn((FRAMES, config.semantic_codebook_size), generator=rng)
    values = torch.rand((config.acoustic_dim, FRAMES), generator=rng) * 2 - 1
    return Posterior(scores.log_softmax(dim=1), values)


def prompt_of(model: Voxtral, prompter: Prompter, posterior: Posterior) -> tuple[torch.Tensor, torch.Tensor]:
    codes = posterior.codes(model.config.codec.acoustic_codebook_size)
    voice = model.mm_audio_embeddings.voice_embedding(codes)
    tokens = torch.tensor(prompter.tokens(TEXT, len(voice)))
    return model.embed_prompt(tokens, prompter.audio_token, voice), codes


def test_continuations_are_scored_as_teacher_forced_likelihood_scores_them(model, prompter, posterior):
    prompt, codes = prompt_of(model, prompter, posterior)
    found = Continuations(model, prompt, FRAMES)
    nll = []
    for frame in range(FRAMES):
        nll.append(-float(found.scores[0, codes[0, frame]]))
        # Two continuations, of which the first goes on: the second is dropped and taken up again from it.
        found.extend(torch.zeros(2, dtype=torch.long), codes[:, frame].expand(2, -1))
    wanted = likelihood(model, prompt, codes, draws=1).semantic[:-1]
    torch.testing.assert_close(torch.tensor(nll), wanted, rtol=1e-4, atol=1e-4)


def test_a_beam_as_wide_as_all_paths_finds_the_best_of_them(model, prompter, posterior, monkeypatch):
    monkeypatch.setattr(module, "CHOICES", 2)
    prompt, codes = prompt_of(model, prompter, posterior)
    best = posterior.log_probabilities.topk(2, dim=1).indices

    def score(path: tuple[int, ...]) -> float:
        one = codes.clone()
        one[0] = torch.tensor(path)
        of_model = -likelihood(model, prompt, one, draws=1).semantic[:-1].sum()
        of_encoder = posterior.log_probabilities[torch.arange(FRAMES), one[0]].sum()
        return float(of_encoder + 3.0 * of_model)

    wanted = max(itertools.product(*best.tolist()), key=score)
    found = beam_search(model, prompter, TEXT, posterior, beam=2**FRAMES, weight=3.0)
    assert tuple(found[0].tolist()) == wanted
    assert torch.equal(found[1:], codes[1:])
    alone = beam_search(model, prompter, TEXT, posterior, beam=1, weight=0.0)
    assert torch.equal(alone, codes)


def test_find_codes_follows_a_beam_where_the_words_are_known(tiny_checkpoint: Path, prompter):
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    codec = model.audio_tokenizer
    student = StudentEncoder.for_codec(codec, 16, 1)
    coder = Coder(
        codec, list(preset_codes().values()), lambda: (model, prompter), student=lambda codec: student
    )
    clip = 0.1 * torch.randn(FRAMES * 1920)
    settings = CodingSettings("student", beam=3)
    plain = find_codes(coder, clip, CodingSettings("student")).codes
    assert torch.equal(find_codes(coder, clip, settings).codes, plain)  # no words: no beam
    found = find_codes(coder, clip, settings, transcript=TEXT).codes
    assert torch.equal(found[1:], plain[1:])
    assert torch.equal(found, beam_search(model, prompter, TEXT, student.posterior(clip), 3))
