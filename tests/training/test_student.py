"""The student: the model speaks, an encoder learns its codes, and all of it can be stopped and resumed."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from revox.checkpoint.load import load_model
from revox.cli import train_command
from revox.coding.find import MODEL_PARTS
from revox.coding.presets import preset_codes
from revox.coding.student import load_student, save_student, trained_student
from revox.demo import checkpoint_folder
from revox.model.codec import Codec
from revox.progress import Progress
from revox.training import student as module
from revox.training.errors import TrainingError
from revox.training.sentences import drawn_sentences
from revox.training.spoken import Utterance, clear_speech
from revox.training.student import (
    StudentRequest,
    StudentTraining,
    held_out_scores,
    make_student,
    train_student,
)
from revox.training.student_plan import plan_student

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = StudentTraining(steps=60, batch=4, frames=8, width=48, blocks=1, warmup=5)


@pytest.fixture(scope="module")
def lab() -> tuple[Codec, list[torch.Tensor]]:
    model = load_model(checkpoint_folder(), dtype=torch.float32, parts=MODEL_PARTS)
    return model.audio_tokenizer, preset_codes(checkpoint_folder(), model, max_frames=250)


def test_it_learns_the_codes_and_comes_back_from_its_file(lab, tmp_path: Path):
    codec, codes = lab
    found: list[Mapping[str, Any]] = []
    student = train_student(codec, codes, SHORT, tmp_path, progress=lambda at: found.append(at.facts))
    assert found[-1]["acoustic"] < 0.8 * found[0]["acoustic"]
    assert found[-1]["semantic"] < found[0]["semantic"]
    save_student(tmp_path / "file", "this decoder", student)
    again = load_student(tmp_path / "file", "this decoder", codec)
    assert again is not None
    clip = codec.decode(codes[0][None, :, :10])[0]
    for a, b in zip(again.posterior(clip), student.posterior(clip), strict=True):
        assert torch.equal(a, b)
    assert again.record["steps"] == 60
    assert load_student(tmp_path / "file", "another decoder", codec) is None


def test_a_stopped_training_goes_on_to_the_same_student(lab, tmp_path: Path):
    codec, codes = lab
    brief = dataclasses.replace(SHORT, steps=30)

    def stop(at: Progress) -> None:
        if at.done == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train_student(codec, codes, brief, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_student(codec, codes, brief, tmp_path / "stopped", stamp="a", progress=stop)
    done: list[float] = []
    resumed = train_student(
        codec, codes, brief, tmp_path / "stopped", stamp="a", progress=lambda at: done.append(at.done)
    )
    assert done == [20, 30]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    train_student(
        codec, codes, brief, tmp_path / "stopped", stamp="b", progress=lambda at: done.append(at.done)
    )
    assert done[2:] == [10, 20, 30]  # of other speech it begins anew


def test_time_ends_the_training_and_the_learning_rate_has_fallen_by_then(lab, tmp_path: Path):
    codec, codes = lab
    brief = dataclasses.replace(SHORT, steps=10_000, seconds=1.0)
    trainer = module.StudentTrainer(codec, codes, brief, tmp_path, "")
    trainer.run(lambda row: None, report_every=10, validate_every=10)
    assert 0 < trainer.step_count < 5000
    assert trainer.learning_rate() < 0.1 * brief.learning_rate
    again = module.StudentTrainer(codec, codes, brief, tmp_path, "")
    assert again.resume()
    again.run(lambda row: None, report_every=10, validate_every=10)
    assert again.step_count == trainer.step_count, "what has had its time is left as it is"


def test_an_untrained_student_is_not_useful_and_the_truth_is(lab):
    codec, codes = lab
    untrained = module.StudentEncoder.for_codec(codec, 16, 1)
    scores = held_out_scores(untrained, codec, codes, codes[:2])
    assert not scores.useful
    assert scores.usual_levels > 1
    knowing = dataclasses.replace(scores, agreement=1.0, levels=0.0)
    assert knowing.useful


def test_the_command_says_its_plan_and_trains_the_student_that_cloning_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REVOX_CACHE", str(tmp_path))
    monkeypatch.setattr("revox.training.spoken.SHARD", 16)
    (tmp_path / "texts.txt").write_text("\n".join(f"it is {n} o'clock" for n in ("one", "two", "ten", "six")))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train_command.student_command)

    def run(*arguments: object) -> str:
        texts = ("--texts", tmp_path / "texts.txt", "--sentences", 40, "--device", "cpu")
        result = CliRunner().invoke(app, [str(a) for a in (checkpoint_folder(), *texts, *arguments)])
        assert result.exit_code == 0, result.exception
        return " ".join(result.output.split())

    planned = run("--steps", 40, "--plan")
    assert re.search(r"says 40 sentences .* learns for 40 steps .* GB of memory", planned)
    assert not (tmp_path / "students").exists()
    monkeypatch.setattr(module.HeldOutScores, "useful", True)
    assert "right in" in run("--steps", 2)
    codec = load_model(checkpoint_folder(), parts=("audio_tokenizer",)).audio_tokenizer
    student = trained_student(checkpoint_folder(), codec)
    assert student is not None
    assert student.record["steps"] == 2
    assert 20 < student.record["sentences"] <= 40


def test_a_student_that_learned_too_little_is_not_kept(
    lab, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REVOX_CACHE", str(tmp_path))
    spoken = [Utterance("one", torch.randint(0, 21, (37, 12)))] * 4
    monkeypatch.setattr(module, "spoken_utterances", lambda *_, **__: spoken)
    monkeypatch.setattr(module, "preset_codes", lambda *_: [])
    with pytest.raises(TrainingError, match=r"learned too little.*--sentences or --minutes"):
        make_student(tiny_checkpoint, StudentRequest(4, training=dataclasses.replace(SHORT, steps=1)))
    codec = load_model(tiny_checkpoint, parts=("audio_tokenizer",)).audio_tokenizer
    assert trained_student(tiny_checkpoint, codec) is None


def test_a_plan_grows_with_what_is_asked_and_the_release_needs_its_weights(tmp_path: Path):
    folder = checkpoint_folder()
    small, large = (plan_student(folder, count, StudentTraining(), "cpu") for count in (1000, 10_000))
    assert 5 * small.speaking < large.speaking
    assert small.memory < 2e9
    (tmp_path / "params.json").write_text(
        (Path(__file__).parents[1] / "parity" / "release_params.json").read_text()
    )
    release = plan_student(tmp_path, 1000, StudentTraining(), "cpu")
    assert 8e9 < release.memory < 12e9  # bf16
    exact = plan_student(tmp_path, 1000, StudentTraining(), "cpu", torch.float32)
    assert 17e9 < exact.memory < 20e9
    assert release.seconds > 10 * small.seconds  # how much more depends on the processor's bf16


def test_babble_is_left_out_by_its_length_or_its_likelihood():
    frames, characters = [30, 31, 29, 33, 30, 28, 95, 30, 8, 32], [20] * 10
    nll = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 3.0, 1.0, 1.3]
    clear = [True] * 10
    clear[6] = clear[7] = clear[8] = False
    assert clear_speech(frames, characters, nll) == clear
    steady = clear_speech([3 * n for n in range(1, 11)], [30 * n - 10 for n in range(1, 11)], [1.0] * 10)
    assert steady == [True] * 10  # long sentences take long
    assert clear_speech(frames[5:], characters[5:], []) == [True] * 5  # too few to tell


def test_drawn_sentences_differ_and_do_not_depend_on_how_many_there_are():
    many = drawn_sentences(3000)
    assert len(set(many)) == 3000
    assert drawn_sentences(40) == many[:40]
    assert drawn_sentences(40, seed=1) != many[:40]
    lengths = np.array([len(text) for text in many])
    assert (lengths.min(), lengths.max()) > (9, 60)
    assert all(re.fullmatch(r"[A-Z][A-Za-z ,-]+[.?!]", text) for text in many)
    assert not any(re.search(r"\ba [aeio]", text, re.I) for text in many)
