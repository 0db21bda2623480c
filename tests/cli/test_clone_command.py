from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner, Result

import revox
from conftest import in_shards
from revox.checkpoint.encoder_file import decoder_sha256
from revox.checkpoint.errors import VoiceError
from revox.checkpoint.inject import InjectionOptions, eject, inject
from revox.checkpoint.inspect import inspect
from revox.checkpoint.load import load_model
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.cli import clone_command, voice_command
from revox.cli.main import build_app
from revox.cli.options import with_old_names
from revox.cloning.clone import SELECTED
from revox.coding.errors import CodingError
from revox.coding.student import STUDENT_FILE, StudentEncoder, save_student, student_folder
from revox.demo import checkpoint_folder
from revox.evaluation import best_of as module
from revox.evaluation.best_of import CandidateScore
from revox.marking import MarkError, verify_file
from revox.progress import Progress
from revox.speech import Audio, AudioError, read_audio, write_audio
from revox.training.speaker import SpeakerLoss
from revox.training.verifier import VerifierTraining, train_verifier

pytestmark = pytest.mark.usefixtures("one_thread")

AGREED = "my own voice, recorded by me"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3.4 s of voiced syllables between silences, stereo, 44.1 kHz, FLAC."""
    rate = 44100
    t = np.arange(int(3.4 * rate)) / rate
    phase = 2 * np.pi * np.cumsum(170 + 20 * np.sin(2 * np.pi * 1.3 * t)) / rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 14))
    sound = 0.1 * voice * np.clip(0.6 + np.sin(2 * np.pi * 3 * t), 0, None)
    sound = np.pad(sound, int(0.7 * rate))
    sound += 1e-4 * np.random.default_rng(0).standard_normal(len(sound))
    path = tmp_path_factory.mktemp("clip") / "me.flac"
    write_audio(path, Audio(np.stack((sound, 0.5 * sound)), rate))
    return path


@pytest.fixture
def quick_presets(tiny_preset_codes: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets' codes at hand, so that they need not be recovered from their rows."""
    monkeypatch.setattr(
        "revox.coding.presets.preset_codes", lambda *_, **__: list(tiny_preset_codes.values())
    )


def clone(*arguments: object) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(cls=with_old_names(clone_command.OLD_NAMES))(clone_command.command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def options(folder: Path, name: str = "me") -> tuple[object, ...]:
    return (*named(folder, name), "--steps", 2)


def named(folder: Path, name: str) -> tuple[object, ...]:
    return ("--checkpoint", folder, "--name", name, "--consent", AGREED)


def test_clone_adds_a_voice_and_says_what_it_used(clip: Path, tiny_checkpoint_copy: Path, tmp_path: Path):
    heard = tmp_path / "decoded.wav"
    result = clone(clip, *options(tiny_checkpoint_copy), "--decoded", heard)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "me.flac" in said
    assert "Uses 0." in said  # which stretch of the recording
    assert "dB over the noise" in said  # and why
    assert "loss" in said
    assert "revox speak" in said
    voice = load_voice(tiny_checkpoint_copy, "me")
    assert voice.codes is not None
    assert voice.codes.shape == (37, voice.frames)
    assert voice.provenance["consent"]["statement"] == AGREED
    assert voice.provenance["source"]["file"] == "me.flac"
    assert read_audio(heard).seconds == pytest.approx(voice.frames * 0.08)
    verdict = verify_file(heard)
    assert verdict.state == "marked"
    assert "voice me" in verdict.sentences[0]


@pytest.mark.usefixtures("quick_presets")
def test_ctrl_c_keeps_the_best_so_far_and_still_adds_the_voice(
    clip: Path, tiny_checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(at: Progress) -> None:
        if at.what != SELECTED:
            raise KeyboardInterrupt

    monkeypatch.setattr(clone_command, "_show_progress", lambda *_: nullcontext(interrupt))
    result = clone(clip, *options(tiny_checkpoint_copy))
    assert result.exit_code == 0, result.output
    assert "stopped by hand after 1 steps" in " ".join(result.output.split())
    assert load_voice(tiny_checkpoint_copy, "me").provenance["settings"]["stopped"]


@pytest.mark.usefixtures("quick_presets")
def test_what_was_found_outlasts_a_voice_that_cannot_be_added_and_can_be_added_later(
    clip: Path, tiny_checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    held: list[Voice] = []

    def full(folder: Path, name: str, rows: Tensor, codes: Tensor, record: dict, *_: object) -> None:
        held.append(Voice(name, codes, rows, record))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("revox.checkpoint.voices.add_voice", full)
    result = clone(clip, *options(tiny_checkpoint_copy))
    assert isinstance(result.exception, CodingError)
    said = str(result.exception)
    assert said.startswith("No space left on device. The codes found are saved in ")
    monkeypatch.undo()
    command = shlex.split(said.partition("add them with: ")[2])
    assert command[:3] == ["revox", "voice", "add"]
    assert CliRunner().invoke(voice_command.app, command[2:]).exit_code == 0
    voice = load_voice(tiny_checkpoint_copy, "me")
    assert torch.equal(voice.codes, held[0].codes)
    assert torch.equal(voice.embedding, held[0].embedding)
    assert voice.provenance["consent"]["statement"] == AGREED
    assert voice.provenance["settings"]["made"] == held[0].provenance


def test_codes_are_kept_where_they_can_be_and_over_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    voice = Voice("me", torch.zeros(37, 4, dtype=torch.int64), torch.zeros(5, 256), {"method": "test"})
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(there))
    (here / "me.codes.safetensors").write_text("another's")
    assert clone_command._save(voice) == here / "me-2.codes.safetensors"
    assert (here / "me.codes.safetensors").read_text() == "another's"
    here.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    assert clone_command._save(voice) is None
    there.mkdir()
    assert clone_command._save(voice) == there / "me.codes.safetensors"


@pytest.mark.usefixtures("quick_presets")
def test_a_folder_that_cannot_be_written_is_said_before_the_clip_is_read(tiny_checkpoint_copy: Path):
    (tiny_checkpoint_copy / ".revox").touch()
    result = clone("no such file.wav", *options(tiny_checkpoint_copy))
    assert isinstance(result.exception, VoiceError)
    assert "cannot be written" in str(result.exception)


@pytest.mark.usefixtures("quick_presets")
@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_a_recording_that_is_moved_during_the_search_and_whose_name_is_no_text_loses_nothing(
    clip: Path, tiny_checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    odd = tmp_path / os.fsdecode(b"caf\xe9.flac")
    shutil.copy(clip, odd)
    moved = nullcontext(lambda at: odd.unlink(missing_ok=True))
    monkeypatch.setattr(clone_command, "_show_progress", lambda *_: moved)
    result = clone(odd, *options(tiny_checkpoint_copy))
    assert result.exit_code == 0, result.exception
    source = load_voice(tiny_checkpoint_copy, "me").provenance["source"]
    assert source["file"] == "caf\\xe9.flac"
    assert source["sha256"] == hashlib.sha256(clip.read_bytes()).hexdigest()


@pytest.mark.usefixtures("quick_presets")
def test_a_voice_is_replaced_only_when_that_was_asked_for(clip: Path, tiny_checkpoint_copy: Path):
    assert clone(clip, *options(tiny_checkpoint_copy)).exit_code == 0
    refused = clone(clip, *options(tiny_checkpoint_copy))
    assert isinstance(refused.exception, VoiceError)
    assert "--overwrite" in str(refused.exception)
    assert clone(clip, *options(tiny_checkpoint_copy), "--seed", 3, "--overwrite").exit_code == 0
    assert load_voice(tiny_checkpoint_copy, "me").provenance["settings"]["seed"] == 3


@pytest.mark.parametrize(
    ("name", "sentence"), [("neutral_male", "is a preset"), ("My Voice", "cannot name a voice")]
)
def test_a_name_that_will_not_do_is_refused_before_the_clip_is_read(
    tiny_checkpoint: Path, name: str, sentence: str
):
    result = clone("no such file.wav", *options(tiny_checkpoint, name), "--overwrite")
    assert isinstance(result.exception, VoiceError)
    assert sentence in str(result.exception)


@pytest.mark.parametrize(
    "words",
    [
        ["clone", "CLIP", "--name", "me", "--consent", AGREED, "--decoded", "out.wav"],
        ["voice", "decode", "neutral_male", "-o", "out.wav"],
        ["doctor", "--sounds", "--out", "report"],
    ],
)
def test_a_certificate_that_cannot_sign_is_refused_before_the_work(
    clip: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REVOX_SIGNING_CERTIFICATE", str(tmp_path / "none.pem"))
    for work in ("revox.load", "revox.doctor.examine.examine", "revox.checkpoint.voices.load_voice"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it was begun"))
    given = [str(clip) if word == "CLIP" else word for word in words]
    result = CliRunner().invoke(build_app(), [*given, "--checkpoint", str(tiny_checkpoint)])
    assert isinstance(result.exception, MarkError), result.output


def test_without_consent_nothing_is_done(clip: Path, tiny_checkpoint: Path):
    result = clone(clip, "--checkpoint", tiny_checkpoint, "--name", "me")
    assert isinstance(result.exception, CodingError)
    assert "--consent" in str(result.exception)
    assert all(entry.name != "me" for entry in list_voices(tiny_checkpoint))


def test_a_clip_that_is_missing_or_holds_no_speech_is_refused(tiny_checkpoint: Path, tmp_path: Path):
    missing = clone(tmp_path / "none.wav", *options(tiny_checkpoint))
    assert isinstance(missing.exception, AudioError)
    silent = tmp_path / "silent.wav"
    write_audio(silent, Audio(np.zeros(16000 * 4), 16000))
    result = clone(silent, *options(tiny_checkpoint))
    assert isinstance(result.exception, AudioError)
    assert all(entry.name != "me" for entry in list_voices(tiny_checkpoint))


@pytest.mark.usefixtures("quick_presets")
def test_with_a_transcript_the_whole_recording_is_used_and_what_was_said_is_kept(
    clip: Path, tiny_checkpoint_copy: Path, tmp_path: Path
):
    said = tmp_path / "said.txt"
    said.write_text("one two three\n", encoding="utf-8")
    result = clone(clip, *options(tiny_checkpoint_copy), "--transcript", f"@{said}")
    assert result.exit_code == 0, result.exception
    voice = load_voice(tiny_checkpoint_copy, "me")
    assert voice.provenance["transcript"] == "one two three"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "transcript is empty"),
        ("@", "cannot be read"),
        ("@none.txt", "cannot be read"),
        ("caf\udce9", "not UTF-8"),
    ],
)
def test_a_transcript_that_says_nothing_is_refused(
    clip: Path, tiny_checkpoint: Path, given: str, sentence: str
):
    result = clone(clip, *options(tiny_checkpoint), "--transcript", given)
    assert isinstance(result.exception, CodingError)
    assert sentence in str(result.exception)


def test_a_recording_too_long_for_its_transcript_is_refused(
    clip: Path, tiny_checkpoint: Path, tmp_path: Path
):
    audio = read_audio(clip)
    long = tmp_path / "long.wav"
    write_audio(long, Audio(np.tile(audio.samples, 8), audio.rate))
    result = clone(long, *options(tiny_checkpoint), "--transcript", "one two three")
    assert isinstance(result.exception, AudioError)
    assert "too long to be used whole" in str(result.exception)


@pytest.mark.usefixtures("quick_presets")
def test_a_trained_student_gives_the_codes_at_once_and_a_search_offers_one(
    clip: Path, tiny_checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REVOX_CACHE", str(tmp_path / "cache"))
    searched = clone(clip, *options(tiny_checkpoint_copy))
    assert "revox train student" in searched.output
    assert load_voice(tiny_checkpoint_copy, "me").provenance["method"] == "inversion"
    refused = clone(clip, *named(tiny_checkpoint_copy, "me2"), "--method", "student")
    assert "train it once with `revox train student" in str(refused.exception)

    codec = load_model(tiny_checkpoint_copy, parts=("audio_tokenizer",)).audio_tokenizer
    student = StudentEncoder.for_codec(codec, 16, 1)
    student.record = {"sentences": 7}
    file = student_folder(tiny_checkpoint_copy) / STUDENT_FILE
    save_student(file, decoder_sha256(tiny_checkpoint_copy), student)
    found = clone(clip, *named(tiny_checkpoint_copy, "me3"))
    assert found.exit_code == 0, found.exception
    assert "codes from the trained student" in " ".join(found.output.split())
    assert "revox train student" not in found.output
    assert load_voice(tiny_checkpoint_copy, "me3").provenance["settings"]["student"] == {"sentences": 7}
    renamed = clone(clip, *named(tiny_checkpoint_copy, "me4"), "--quick-encoder", "--refine", 1)
    assert "--quick-encoder is now --method student" in renamed.output
    record = load_voice(tiny_checkpoint_copy, "me4").provenance
    assert record["method"] in ("student", "student, refined")
    assert set(record["settings"]["scores"]) == {"student", "refined"}
    file.write_bytes(file.read_bytes()[:100])  # damaged: as if there were none
    assert clone(clip, *options(tiny_checkpoint_copy, "me5")).exit_code == 0
    assert load_voice(tiny_checkpoint_copy, "me5").provenance["method"] == "inversion"


@pytest.mark.usefixtures("quick_presets")
def test_the_best_of_several_searches_is_the_one_whose_speech_scores_best(
    clip: Path, tiny_checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REVOX_CACHE", str(tmp_path))
    monkeypatch.setattr("revox.evaluation.best_of.DEFAULT_TEXTS", ("one",))
    people = [(str(i), np.random.default_rng(i).normal(size=16000).astype(np.float32)) for i in range(2)]
    file = tmp_path / "verifier.safetensors"
    train_verifier(people, 24000, VerifierTraining(steps=1, batch=4)).save(file)
    found: list[float] = []

    def similarity(network: SpeakerLoss, spoken: Tensor, recording: Tensor) -> Tensor:
        assert spoken.shape[0] == recording.shape[0] == 1
        found.append((0.2, 0.7, 0.4)[len(found)])
        return torch.tensor(found[-1:])

    monkeypatch.setattr(SpeakerLoss, "similarity", similarity)
    several = (*options(tiny_checkpoint_copy), "--best-of", 3, "--verifier", file)
    result = clone(clip, *several, "--seed", 5)
    assert result.exit_code == 0, result.exception
    assert "3 times the cost" in " ".join(result.output.split())
    record = load_voice(tiny_checkpoint_copy, "me").provenance
    assert [one["similarity"] for one in record["best_of"]] == [0.2, 0.7, 0.4]
    assert [one["seed"] for one in record["best_of"]] == [5, 6, 7]
    assert record["settings"]["seed"] == 6
    refused = clone(clip, *several[:-1], "Resemblyzer", "--overwrite")
    assert "Resemblyzer's" in str(refused.exception)
    refused = clone(clip, *options(tiny_checkpoint_copy), "--verifier", file, "--overwrite")
    assert "add --best-of N" in str(refused.exception)


def test_candidates_that_were_found_outlast_one_that_is_stopped(monkeypatch: pytest.MonkeyPatch):
    scores = iter((0.2, 0.7, KeyboardInterrupt()))

    def score(tts: object, voice: SimpleNamespace, seed: int, *_: object) -> CandidateScore:
        one = next(scores)
        if isinstance(one, BaseException):
            raise one
        return CandidateScore(seed, one, None)

    def voice(seed: int) -> SimpleNamespace:
        return SimpleNamespace(seed=seed, provenance={}, coding=SimpleNamespace(stopped=False))

    monkeypatch.setattr(module, "_score", score)
    best, found = module.best_of(None, voice, range(5), None)
    assert (best.seed, len(found)) == (1, 2)
    scores = iter((torch.OutOfMemoryError("too large"),))
    with pytest.warns(UserWarning, match="the voice of seed 0 is left out: too large"):
        best, found = module.best_of(None, voice, range(5), None)
    assert (best.seed, found) == (0, [])


LAB_ENCODER = Path(__file__).parents[2] / "lab" / "reference-encoder" / "encoder.safetensors"


def test_an_injected_encoder_is_used_at_once_and_an_ejected_one_is_not(tmp_path: Path):
    folder = tmp_path / "lab"
    inject(checkpoint_folder(), LAB_ENCODER, InjectionOptions(out=folder))
    speech = checkpoint_folder().parent / "examples" / "1034-121119-0000.flac"
    named = (speech, "--checkpoint", folder, "--consent", "the reader, under CC BY", "--name")
    assert clone(*named, "quick").exit_code == 0
    voice = load_voice(folder, "quick")
    assert voice.provenance["method"] == "encoder"
    assert "steps_done" not in voice.provenance["settings"]
    assert clone(*named, "polished", "--refine", 2).exit_code == 0
    scores = load_voice(folder, "polished").provenance["settings"]["scores"]
    kept = load_voice(folder, "polished").provenance["settings"]["chosen"]
    assert scores[kept]["total"] <= scores["encoder"]["total"]
    refused = clone(*named, "other", "--budget", 5)
    assert isinstance(refused.exception, CodingError)
    eject(folder)
    assert inspect(folder).encoder == "absent"
    refused = clone(*named, "other", "--refine", 2)
    assert isinstance(refused.exception, CodingError)
    assert "of an encoder or a student" in str(refused.exception)
    assert clone(*named, "other", "--method", "encoder").exit_code != 0


@pytest.mark.usefixtures("quick_presets")
def test_a_part_of_an_encoder_is_left_off_and_said(
    clip: Path, tiny_checkpoint_with_encoder: Path, tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_checkpoint_with_encoder, tmp_path / "partial"))
    weights = load_file(folder / "consolidated.safetensors")
    del weights["audio_tokenizer.encoder_blocks.6.layers.1.ffn_scale"]
    save_file(weights, folder / "consolidated.safetensors")
    assert isinstance(clone(clip, *options(folder), "--method", "encoder").exception, CodingError)
    result = clone(clip, *options(folder))
    assert result.exit_code == 0, result.exception
    assert "only a part of an encoder" in " ".join(result.output.split())
    assert load_voice(folder, "me").provenance["method"] == "inversion"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [(("--method", "magic"), "no method"), (("--refine", 3), "of an encoder or a student")],
)
def test_a_method_that_will_not_do_is_refused_before_the_clip_is_read(
    tiny_checkpoint_copy: Path, given: tuple[object, ...], sentence: str
):
    result = clone("no such file.wav", *options(tiny_checkpoint_copy), *given)
    assert isinstance(result.exception, CodingError)
    assert sentence in str(result.exception)


def test_a_folder_of_sharded_weights_is_cloned_into_and_spoken_from(clip: Path, tiny_checkpoint_copy: Path):
    folder = in_shards(tiny_checkpoint_copy)
    result = clone(clip, *options(folder))
    assert result.exit_code == 0, result.output
    assert revox.load(folder, "cpu").speak("one", "me", max_seconds=0.2).samples.size
