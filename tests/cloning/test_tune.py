"""A voice is tuned: a wrong voice learns what the right one says, and nothing else changes."""

from __future__ import annotations

import errno
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import revox
from conftest import tiny_model
from revox.api import Revox
from revox.checkpoint.voices import load_voice
from revox.cli import voice_command
from revox.cloning.errors import CloneError
from revox.cloning.tune import TuningClip, VoiceTuning, tune_voice
from revox.demo import checkpoint_folder
from revox.metrics.likelihood import likelihood
from revox.metrics.voice_embeddings import table_deviation
from revox.model.config import N_SPECIAL_CODES
from revox.model.recompute import checkpointed_layers
from revox.speech import Audio, write_audio

TEXTS = ("We will be back on Thursday.", "The letters are on the table.", "Call me again on Sunday.")


@pytest.fixture(scope="module")
def lab() -> Revox:
    return revox.load(checkpoint_folder(), "cpu")


def test_another_voice_learns_to_be_as_likely_as_the_speakers_own(lab):
    own, other = lab.voice("casual_female"), lab.voice("pt_male")
    clips = [TuningClip(text, lab.synthesize(text, own).codes) for text in TEXTS]
    settings = VoiceTuning(steps=15, validate_every=4, batch=2, learning_rate=0.05, replay=False)
    weights = [p.clone() for p in lab.model.parameters()]
    scored = []
    tuned = tune_voice(
        lab.model, lab.prompter, other, clips[:2], clips[2:], settings,
        progress=lambda at: scored.append(at.done),
    )  # fmt: skip
    assert scored == [4, 8, 12, 15]  # what is left at the end, too
    none = VoiceTuning(steps=0, replay=False)
    best = tune_voice(lab.model, lab.prompter, own, clips[:2], clips[2:], none).before
    gap = tuned.before.cost(settings) - best.cost(settings)
    assert tuned.gained
    assert gap > 0.2
    assert tuned.after.cost(settings) - best.cost(settings) < 0.5 * gap
    assert tuned.embedding.dtype == torch.bfloat16
    assert tuned.embedding.shape == other.embedding.shape
    assert torch.equal(tuned.embedding[-1], other.embedding[-1])
    assert 0 < tuned.change < 1
    assert 0 < tuned.concentration <= 1
    assert all(map(torch.equal, weights, lab.model.parameters()))
    # What is stored is what was scored.
    prompt = lab.model.embed_prompt(
        torch.tensor(lab.prompter.tokens(TEXTS[2], len(tuned.embedding))), lab.prompter.audio_token,
        tuned.embedding,
    )  # fmt: skip
    found = likelihood(lab.model, prompt, clips[2].codes)
    assert float(found.semantic_nll) == pytest.approx(tuned.after.semantic, rel=1e-5)


def test_replays_keep_what_the_model_says_in_the_voice_it_begins_with(lab):
    own, other = lab.voice("casual_female"), lab.voice("pt_male")
    clips = [TuningClip(text, lab.synthesize(text, own).codes) for text in TEXTS[:2]]
    heard = lab.synthesize(TEXTS[2], other, seed=5).codes
    costs = {}
    for replay in (False, True):
        settings = VoiceTuning(steps=12, validate_every=4, batch=2, learning_rate=0.05, replay=replay)
        tuned = tune_voice(lab.model, lab.prompter, other, clips[:1], clips[1:], settings)
        tokens = torch.tensor(lab.prompter.tokens(TEXTS[2], len(tuned.embedding)))
        prompt = lab.model.embed_prompt(tokens, lab.prompter.audio_token, tuned.embedding)
        costs[replay] = float(likelihood(lab.model, prompt, heard).semantic_nll)
        # What is scored are the held-out clip and, with replays, the model's speech of the same text.
        costs["before", replay] = tuned.before.semantic
    assert costs[True] < costs[False]
    assert costs["before", True] < costs["before", False]


def test_without_a_gain_the_voice_is_the_one_it_began_with(lab):
    own = lab.voice("casual_female")
    clips = [TuningClip(text, lab.synthesize(text, own).codes) for text in TEXTS[:2]]
    stopped = tune_voice(lab.model, lab.prompter, own, clips[:1], clips[1:], should_stop=lambda: True)
    assert not stopped.gained
    assert stopped.steps == 0
    assert stopped.before == stopped.after
    assert torch.equal(stopped.embedding, own.embedding)


def test_stopped_before_tuning_it_ends_as_by_ctrl_c(lab, tmp_path):
    recordings = [(tmp_path / "a.wav", "one"), (tmp_path / "b.wav", "two")]
    with pytest.raises(KeyboardInterrupt):
        lab.tune(recordings, consent="my own voice", voice="casual_female", should_stop=lambda: True)


def test_checkpointed_layers_give_the_same_gradient_and_leave_no_trace():
    model = tiny_model().requires_grad_(False)
    start = torch.randn(1, 9, model.config.backbone.dim)
    found = []
    for kept in (False, True):
        x = start.clone().requires_grad_()
        if kept:
            with checkpointed_layers(model):
                model.backbone(x).square().sum().backward()
        else:
            model.backbone(x).square().sum().backward()
        found.append(x.grad)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(layer) for layer in model.backbone.layers)


def test_the_deviation_is_that_of_sums_of_rows_drawn_from_every_codebook():
    model = tiny_model()
    rng = torch.Generator().manual_seed(0)
    sizes = torch.tensor(model.config.codebook_rows)[:, None] - N_SPECIAL_CODES
    codes = (torch.rand((len(sizes), 8000), generator=rng) * sizes).long()
    with torch.no_grad():
        rows = model.mm_audio_embeddings.frames((codes + N_SPECIAL_CODES)[None])[0]
    assert torch.allclose(rows.std(dim=0), table_deviation(model), rtol=0.05)


def test_the_command_tunes_records_its_sources_and_says_what_is_missing(
    tmp_path, tiny_checkpoint_with_encoder, monkeypatch
):
    tiny_folder = Path(shutil.copytree(tiny_checkpoint_with_encoder, tmp_path / "checkpoint"))
    data = tmp_path / "clips"
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        t = np.arange(round(3.2 * 24000)) / 24000
        sound = 0.2 * np.sin(2 * np.pi * (200 + 40 * i) * t) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
        write_audio(data / f"{i}.wav", Audio(sound + 0.01 * rng.standard_normal(len(t)), 24000))
        (data / f"{i}.txt").write_text("the letters are on the table\n")
    given = [
        "tune",
        "ada",
        "--data",
        str(data),
        "-c",
        str(tiny_folder),
        "--device",
        "cpu",
        "--steps",
        "10",
    ]
    consent = ["--consent", "my own voice, recorded by me"]
    run = CliRunner().invoke

    assert isinstance(run(voice_command.app, given).exception, CloneError)
    done = run(voice_command.app, [*given, *consent])
    assert done.exit_code == 0, (done.output, done.exception)
    voice = load_voice(tiny_folder, "ada")
    record = voice.provenance
    assert record["method"] == "tuned"
    assert record["settings"]["best_step"] > 0
    files = {record["source"]["file"], *(source["file"] for source in record["more_sources"])}
    assert files == {"0.wav", "1.wav", "2.wav"}
    assert record["from"][0]["record"]["consent"]["statement"] == consent[1]
    # The codes are those it began with; the embedding is no longer their sum.
    began = tiny_sum(tiny_folder, voice.codes)
    assert torch.equal(voice.embedding[-1], began[-1])
    assert not torch.equal(voice.embedding, began)

    # What was learned outlasts a voice that cannot be added.
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("revox.api.Revox.tune", lambda *_, **__: replace(voice, name="eve"))
        patch.setattr("revox.checkpoint.voices.add_voice", full)
        message = str(run(voice_command.app, [*given[:1], "eve", *given[2:], *consent]).exception)
    assert message.startswith("No space left on device. The embedding learned is saved in ")
    words = shlex.split(message.partition("add it with: ")[2])
    assert words[:3] == ["revox", "voice", "add"]
    added = run(voice_command.app, words[2:])
    assert added.exit_code == 0, (added.output, added.exception)
    again = load_voice(tiny_folder, "eve")
    assert torch.equal(again.embedding, voice.embedding)
    assert again.provenance["settings"]["made"] == record

    (data / "1.txt").unlink()
    failed = run(voice_command.app, [*given[:1], "bob", *given[2:], *consent])
    assert isinstance(failed.exception, CloneError)
    assert "1.txt" in str(failed.exception)


def tiny_sum(folder: Path, codes: torch.Tensor) -> torch.Tensor:
    return (
        revox.load(folder, "cpu", torch.float32).model.mm_audio_embeddings.voice_embedding(codes).bfloat16()
    )
