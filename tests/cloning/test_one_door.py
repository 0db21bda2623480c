"""One clip has one set of codes: the command line, the server, evaluation and the doctor ask `Revox`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

import revox
from revox.api import Revox
from revox.checkpoint.voices import load_voice
from revox.cli import clone_command
from revox.cloning.clone import ClonedVoice
from revox.cloning.consent import record_consent
from revox.demo import checkpoint_folder
from revox.doctor import clone_checks
from revox.doctor.checkpoint_under_test import CheckpointUnderTest
from revox.evaluation.subject import Setup, Subject
from revox.serving.references import Reference
from revox.serving.settings import ServeSettings
from revox.serving.voices import Voices
from revox.speech import read_audio

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP = checkpoint_folder().parent / "examples" / "1034-121119-0000.flac"
CONSENT = "the reader, who published the recording under CC BY"


@pytest.fixture
def folder(
    tiny_checkpoint_with_encoder: Path,
    tiny_preset_codes: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A checkpoint whose presets' codes are at hand: recovering them takes a while."""
    monkeypatch.setattr(
        "revox.coding.presets.preset_codes", lambda *_, **__: list(tiny_preset_codes.values())[:3]
    )
    return Path(shutil.copytree(tiny_checkpoint_with_encoder, tmp_path / "checkpoint"))


def by_command_line(folder: Path, *options: object) -> Tensor | None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(clone_command.command)
    arguments = (CLIP, "-c", folder, "--name", "me", "--consent", CONSENT, *options)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.exception
    return load_voice(folder, "me").codes


def by_server(tts: Revox) -> Tensor | None:
    reference = Reference(CLIP.read_bytes(), read_audio(CLIP), "upload")
    voices = Voices(ServeSettings(checkpoint=str(tts.folder), voices_folder=tts.folder / "uploaded"), tts)
    return voices._clone(voices._select(reference, None), "me", record_consent(CONSENT), None).codes


def by_evaluation(folder: Path, cloned: ClonedVoice, **settings: Any) -> Tensor:
    subject = Subject(Setup(folder, folder / "evaluation", device="cpu", **settings))
    return subject.encode(cloned.reference)


def by_doctor(tts: Revox, cloned: ClonedVoice, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The codes that its encoder check compares with a voice's own, given the clip in place of its sound."""
    [name, *_] = tts.voices()
    examined = CheckpointUnderTest(tts.folder, tts, quick=True, names=[name])
    monkeypatch.setattr(CheckpointUnderTest, "decoded", lambda *_: cloned.reference)
    monkeypatch.setattr(CheckpointUnderTest, "recovered", lambda *_: cloned)
    compared: list[Tensor] = []
    monkeypatch.setattr(
        clone_checks, "semantic_agreement", lambda codes, _: float(compared.append(codes) or 0)
    )
    monkeypatch.setattr(clone_checks, "embedding_cosine", lambda *_: 0.0)
    clone_checks.encoder(examined)
    [codes] = compared
    return codes


def test_all_fronts_find_the_codes_that_the_encoder_gives_as_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    tts = revox.load(folder, device="cpu")
    cloned = tts.clone(CLIP, consent=CONSENT)
    samples = torch.from_numpy(cloned.reference.samples)
    served = tts.model.audio_tokenizer.bfloat16().encode_as_served(samples[None].bfloat16())[0]
    tts = revox.load(folder, device="cpu")
    found = {
        "library": cloned.codes,
        "command line": by_command_line(folder),
        "server": by_server(tts),
        "evaluation": by_evaluation(folder, cloned),
        "doctor": by_doctor(tts, cloned, monkeypatch),
    }
    assert {front: codes is not None and torch.equal(codes, served) for front, codes in found.items()} == (
        dict.fromkeys(found, True)
    )


def test_all_fronts_find_the_same_codes_by_inversion_in_so_many_steps(folder: Path):
    cloned = revox.load(folder, device="cpu").clone(CLIP, consent=CONSENT, method="inversion", steps=2)
    found = (
        by_command_line(folder, "--method", "inversion", "--steps", 2),
        by_evaluation(folder, cloned, method="inversion", steps=2),
    )
    assert all(codes is not None and torch.equal(codes, cloned.codes) for codes in found)
