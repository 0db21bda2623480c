"""A run put together from a checkpoint's folder and folders of speech."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from revox.checkpoint.encoder_file import decoder_sha256, read_record
from revox.cli import train_command
from revox.speech import Audio, write_audio
from revox.training.data import find_sources
from revox.training.errors import TrainingError
from revox.training.restore import RunOptions, hold_out, restore_encoder
from revox.training.settings import EncoderTraining
from revox.training.spoken import read_sentences, spoken_codes

SETTINGS: dict[str, Any] = {
    "steps": 4, "clips": 2, "pairs": 2, "seconds": 0.64, "save_every": 2, "report_every": 1,
    "validate_every": 4, "resolutions": [[256, 20]], "sentences": 0,
    "discriminator": {"start": 100},
}  # fmt: skip


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty speakers of one clip each, 16 kHz."""
    folder = tmp_path_factory.mktemp("speech")
    for i in range(20):
        t = np.arange(16000) / 16000
        wave = 0.1 * np.sin(2 * np.pi * (100 + 10 * i) * t) * (1 + np.sin(2 * np.pi * 3 * t))
        (folder / f"speaker{i:02d}").mkdir()
        write_audio(folder / f"speaker{i:02d}" / "a.flac", Audio(wave.astype(np.float32), 16000))
    return folder


def options(cache: Path, **changes: Any) -> RunOptions:
    return RunOptions(workers=0, device="cpu", cache=cache, tensorboard=False, **changes)


def settings(**changes: Any) -> EncoderTraining:
    return EncoderTraining.model_validate(SETTINGS | changes)


def test_a_run_told_to_stop_saves_and_goes_on_to_the_same_encoder(
    tiny_checkpoint: Path, speech: Path, tmp_path: Path
):
    whole = restore_encoder(
        tiny_checkpoint, [str(speech)], tmp_path / "whole", settings(), options(tmp_path / "cache")
    )

    def stop(row: dict[str, float]) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        restore_encoder(
            tiny_checkpoint, [str(speech)], out, settings(), options(tmp_path / "cache", report=stop)
        )
    said: list[str] = []
    again = options(tmp_path / "cache", resume=True, say=said.append)
    resumed = restore_encoder(tiny_checkpoint, [str(speech)], out, settings(), again)
    assert "going on from step 2" in said
    assert resumed.read_bytes() == whole.read_bytes()
    record = read_record(whole)
    assert record["decoder_sha256"] == decoder_sha256(tiny_checkpoint)
    assert record["steps"] == 4
    assert record["data"] == [str(speech)]
    with pytest.raises(TrainingError, match="--resume"):
        restore_encoder(tiny_checkpoint, [str(speech)], out, settings(), options(tmp_path / "cache"))
    with pytest.raises(TrainingError, match="another learning_rate"):
        restore_encoder(tiny_checkpoint, [str(speech)], out, settings(learning_rate=1e-5), again)
    with pytest.raises(TrainingError, match="no run to go on with"):
        restore_encoder(tiny_checkpoint, [str(speech)], tmp_path / "new", settings(), again)


def test_speakers_that_are_looked_at_are_not_learnt_from(speech: Path, tmp_path: Path):
    sources = find_sources([str(speech)], cache=tmp_path, workers=0)
    train, held = hold_out(sources, 12)
    kept = {clip.speaker for source in train for clip in source.clips}
    out = {clip.speaker for source in held for clip in source.clips}
    assert len(out) == 2  # a tenth of twenty
    assert not kept & out
    assert len(kept) == 18
    again = {clip.speaker for source in hold_out(sources, 12)[1] for clip in source.clips}
    assert again == out


def test_what_the_presets_say_is_kept_and_taken_up_where_it_stopped(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("revox.training.spoken.AT_ONCE", 2)
    monkeypatch.setattr("revox.training.spoken.MAX_FRAMES", 80)
    kept, told = tmp_path / "spoken.safetensors", []

    def spoken(count: int, seed: int = 0) -> list[torch.Tensor]:
        told.clear()
        return spoken_codes(
            tiny_checkpoint, count, kept, seed=seed, dtype=torch.float32,
            progress=lambda done, of: told.append(done),
        )  # fmt: skip

    two = spoken(2)
    assert told == [2]
    four = spoken(4)
    assert told == [4]  # the first two were there
    assert len(two) >= 1  # those that ended by themselves
    assert all(torch.equal(a, b) and a.shape[0] == 37 for a, b in zip(two, four, strict=False))
    spoken(4)
    assert told == []
    kept.write_bytes(kept.read_bytes()[:100])
    spoken(2)
    assert told == [2]  # damaged: spoken again
    spoken(2, seed=1)
    assert told == [2]  # another seed


def test_texts_that_are_empty_or_missing_are_a_sentence(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(TrainingError, match="one sentence a line"):
        read_sentences(tmp_path / "empty.txt")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_sentences(tmp_path / "none.txt")


def test_stopped_by_a_signal_the_command_exits_with_0_and_says_how_to_go_on(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("revox.training.restore.restore_encoder", stopped)
    app = typer.Typer()
    app.add_typer(train_command.app, name="train")
    result = CliRunner().invoke(
        app, ["train", "encoder", "-c", str(tiny_checkpoint), "-o", str(tmp_path / "run")]
    )
    assert result.exit_code == 0, result.output
    assert "--resume" in result.output


def test_without_speech_or_presets_the_sentence_says_so(tiny_checkpoint_copy: Path, tmp_path: Path):
    with pytest.raises(TrainingError, match="no speech is named"):
        restore_encoder(tiny_checkpoint_copy, [], tmp_path / "a", settings(), options(tmp_path))
    assert not (tmp_path / "a").exists()
    for file in (tiny_checkpoint_copy / "voice_embedding").iterdir():
        file.unlink()
    with pytest.raises(TrainingError, match="no preset"):
        restore_encoder(tiny_checkpoint_copy, [], tmp_path / "b", settings(clips=0), options(tmp_path))
