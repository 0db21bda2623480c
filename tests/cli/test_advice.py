"""Following an error's advice changes the outcome."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from revox.checkpoint.voices import add_voice, load_voice
from revox.cli import main
from revox.model.acoustic import AcousticTransformer
from revox.model.config import END_AUDIO_ID


@pytest.fixture
def revox(monkeypatch, capfd):
    """Run a command; its exit code, and its last line of standard error."""
    monkeypatch.setattr(main, "COMMANDS", {name: main.COMMANDS[name] for name in ("speak", "voice")})
    monkeypatch.setenv("COLUMNS", "4000")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["revox", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        err = capfd.readouterr().err
        assert "Traceback" not in err
        return SimpleNamespace(code=code, err=err.strip().splitlines()[-1] if err.strip() else "")

    return run


def commands_in(sentence):
    return [shlex.split(one)[1:] for one in re.findall(r"`(revox [^`]*)`", sentence)]


def test_a_model_that_ends_at_once_speaks_with_more_takes_and_with_no_other_seed(
    revox, tiny_checkpoint, tmp_path, monkeypatch
):
    real = AcousticTransformer.semantic_logits

    def end_first(self, hidden):
        logits = real(self, hidden)
        logits[..., END_AUDIO_ID] = 1e4
        return logits

    monkeypatch.setattr(AcousticTransformer, "semantic_logits", end_first)
    said = ("speak", "ten to five", "-c", tiny_checkpoint, "-o", tmp_path / "a.wav", "--voice", "pt_male")
    for seed in (0, 1, 99):
        silent = revox(*said, "--takes", 1, "--seed", seed)
        assert silent.code == 2
        assert "allow more takes (--takes 3)" in silent.err
        assert "no seed changes that" in silent.err
    assert revox(*said, "--takes", 3).code == 4
    assert (tmp_path / "a.wav").stat().st_size > 1000


def test_where_more_takes_cannot_help_the_checkpoint_is_to_be_checked(
    revox, tiny_checkpoint_copy, tmp_path, monkeypatch
):
    from revox.synthesis import longform

    monkeypatch.setattr(longform.TakeCheck, "min_frames", 0)
    real = AcousticTransformer.semantic_logits
    monkeypatch.setattr(
        AcousticTransformer,
        "semantic_logits",
        lambda self, hidden: real(self, hidden).index_fill(-1, torch.tensor([END_AUDIO_ID]), 1e4),
    )
    said = ("speak", "ten", "-c", tiny_checkpoint_copy, "-o", tmp_path / "a.wav", "--voice", "pt_male")
    silent = revox(*said, "--takes", 2)
    assert silent.code == 2
    assert "check the checkpoint with `revox doctor`" in silent.err


def test_a_voice_whose_file_is_gone_is_removed_as_the_sentence_says(revox, tiny_checkpoint_copy, tmp_path):
    embedding = load_voice(tiny_checkpoint_copy, "pt_male").embedding
    record = {"consent": {"statement": "mine, yes"}}
    add_voice(tiny_checkpoint_copy, "ada", embedding, None, record)
    for name in ("neutral_male", "ada"):
        (tiny_checkpoint_copy / "voice_embedding" / f"{name}.pt").unlink()
        said = ("speak", "ten", "-c", tiny_checkpoint_copy, "-o", tmp_path / "a.wav", "--voice", name)
        [command] = commands_in(revox(*said).err)
        assert command[:3] == ["voice", "remove", name]
        assert revox(*command, "-c", tiny_checkpoint_copy).code == 0
        assert f"has no voice '{name}'" in revox(*said).err


def test_a_voice_in_torchs_file_only_is_exported_as_inspect_says(revox, tiny_checkpoint_copy):
    from revox.checkpoint.inspect import inspect

    path = tiny_checkpoint_copy / "voice_embedding" / "ar_male.pt"
    save_file({"embedding": torch.load(path, weights_only=True)}, path.with_suffix(".safetensors"))
    path.unlink()
    [note] = inspect(tiny_checkpoint_copy).notes
    [command] = commands_in(note)
    assert revox(*command, "-c", tiny_checkpoint_copy).code == 0
    assert inspect(tiny_checkpoint_copy).notes == []


def test_a_voice_that_is_in_no_list_is_listed_as_the_sentence_says(revox, tiny_checkpoint_copy, tmp_path):
    source = tiny_checkpoint_copy / "voice_embedding" / "ar_male.pt"
    shutil.copy(source, source.with_name("ada.pt"))
    said = ("speak", "ten", "-c", tiny_checkpoint_copy, "-o", tmp_path / "a.wav", "--voice", "ada")
    refused = revox(*said, "--takes", 1, "--max-seconds", 0.4)
    assert refused.code == 2
    [command] = commands_in(refused.err)
    assert revox(*command, "-c", tiny_checkpoint_copy).code == 0
    assert revox(*said, "--takes", 1, "--max-seconds", 0.4).code == 0


def test_a_name_that_cannot_be_comes_with_one_that_can(revox, tiny_checkpoint_copy):
    source = tiny_checkpoint_copy / "voice_embedding" / "ar_male.pt"
    rest = (source, "-c", tiny_checkpoint_copy, "--consent", "mine, yes")
    refused = revox("voice", "add", "My Voice", *rest)
    assert refused.code == 2
    assert revox("voice", "add", refused.err.split("such as ")[1], *rest).code == 0
