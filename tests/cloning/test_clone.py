from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import revox
from revox.api import Revox
from revox.checkpoint.load import load_model
from revox.checkpoint.voices import add_voice, load_voice
from revox.cloning.clone import SELECTED, ClonedVoice, CloneRequest, clone_voice
from revox.cloning.errors import CloneError
from revox.coding import Coder, CodingSettings
from revox.coding.errors import CodingError
from revox.coding.invert import InversionConfig
from revox.coding.student import StudentEncoder
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio, AudioError, write_audio
from revox.speech.loudness import loudness

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = InversionConfig(local_search_rounds=1, scales=((1024, 160),))
AGREED = "my own voice, recorded by me"


def speechlike(seconds: float, rate: int = 16000, quiet: float = 1.0) -> Audio:
    """Voiced syllables of a falling pitch between two silences of 0.7 s."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 - 10 * t / seconds + 15 * np.sin(2 * np.pi * 1.3 * t)) / rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 14))
    syllables = np.clip(0.6 + np.sin(2 * np.pi * 3 * t), 0, None)
    noise = np.random.default_rng(0).standard_normal(len(t)) * 1e-4
    silence = np.random.default_rng(1).standard_normal(int(0.7 * rate)) * 1e-4
    return Audio(np.concatenate((silence, 0.1 * voice * syllables + noise, silence)) * quiet, rate)


@pytest.fixture(scope="module")
def tts(tiny_checkpoint: Path) -> Revox:
    return revox.load(tiny_checkpoint, device="cpu", lazy=True)


@pytest.fixture(scope="module")
def encoding(tiny_checkpoint_with_encoder: Path, tts: Revox) -> Revox:
    loaded = revox.load(tiny_checkpoint_with_encoder, device="cpu", lazy=True)
    loaded.coder._presets = tts.coder.preset_codes()  # its presets are the same: they are recovered once
    return loaded


def clone(
    tts: Revox,
    reference: Audio | Path,
    *,
    consent: str = AGREED,
    name: str = "clone",
    progress: ProgressCallback = ignore_progress,
    should_stop: Callable[[], bool] | None = None,
    **settings: Any,
) -> ClonedVoice:
    """As `Revox.clone`, by a quicker search."""
    request = CloneRequest(reference, consent, name, coding=CodingSettings(inversion=QUICK, **settings))
    table = tts.model.mm_audio_embeddings
    return clone_voice(tts.coder, table, request, progress=progress, should_stop=should_stop)


def test_a_clone_is_whole_frames_of_the_chosen_stretch_and_its_rows_are_the_sums_of_its_codes(
    tts: Revox, tiny_checkpoint: Path
):
    audio = speechlike(3.4)
    cloned = clone(tts, audio, name="me", steps=3)
    frames = cloned.frames
    assert cloned.selection.start >= 0.4
    assert cloned.selection.end <= audio.seconds - 0.4
    assert cloned.reference.rate == cloned.decoded.rate == 24000
    assert len(cloned.reference.samples) == len(cloned.decoded.samples) == 1920 * frames
    assert 0 <= cloned.selection.seconds - cloned.reference.seconds < 0.08 * 5
    assert loudness(cloned.reference.samples, 24000) == pytest.approx(-23, abs=0.5)
    assert cloned.codes is not None
    assert cloned.codes.shape == (37, frames)
    # The rows are those that the release's own table gives, in bf16.
    served = load_model(tiny_checkpoint, dtype=torch.bfloat16, parts=["mm_audio_embeddings"])
    with torch.no_grad():
        rows = served.mm_audio_embeddings.voice_embedding(cloned.codes)
    assert cloned.embedding.dtype == torch.bfloat16
    assert torch.equal(cloned.embedding, rows)
    with torch.no_grad():
        again = tts.model.audio_tokenizer.decode(cloned.codes[None])[0]
    assert np.allclose(cloned.decoded.samples, again.numpy(), atol=1e-6)


def test_a_clone_can_be_added_and_is_loaded_as_it_was(tts: Revox, tiny_checkpoint_copy: Path):
    voice = clone(tts, speechlike(3.4), name="me", steps=1)
    add_voice(tiny_checkpoint_copy, voice.name, voice.embedding, voice.codes, voice.provenance)
    loaded = load_voice(tiny_checkpoint_copy, "me")
    assert torch.equal(loaded.embedding, voice.embedding)
    assert loaded.codes is not None
    assert voice.codes is not None
    assert torch.equal(loaded.codes, voice.codes)
    assert loaded.provenance == voice.provenance


def test_provenance_says_what_was_cloned_how_and_with_whose_consent(tts: Revox, tmp_path: Path):
    clip = tmp_path / "me.wav"
    write_audio(clip, speechlike(3.4))
    cloned = clone(tts, clip, steps=2, seed=5)
    record = json.loads(json.dumps(cloned.provenance))
    assert record["method"] == "inversion"
    assert record["consent"]["statement"] == AGREED
    assert record["source"]["file"] == "me.wav"
    assert record["source"]["sha256"] == hashlib.sha256(clip.read_bytes()).hexdigest()
    assert record["source"]["start_s"] == pytest.approx(cloned.selection.start, abs=1e-3)
    assert record["source"]["seconds"] == pytest.approx(cloned.reference.seconds, abs=1e-3)
    assert record["settings"]["steps"] == record["settings"]["steps_done"] == 2
    assert record["settings"]["seed"] == 5
    assert not record["settings"]["stopped"]
    assert "created_at" in record


def test_the_same_seed_gives_the_same_voice_at_any_level_of_the_recording(tts: Revox):
    # Half is a power of two: the float32 samples differ by nothing else.
    loud, quiet = (clone(tts, speechlike(3.2, quiet=gain), steps=3).codes for gain in (1.0, 0.5))
    assert loud is not None
    assert quiet is not None
    assert torch.equal(loud, quiet)


def test_weights_in_bf16_are_inverted_in_float32_and_left_as_they_were(tts: Revox, tiny_checkpoint: Path):
    served = revox.load(tiny_checkpoint, device="cpu", dtype=torch.bfloat16, lazy=True)
    served.coder._presets = tts.coder.preset_codes()
    cloned = clone(served, speechlike(3.2), steps=2)
    assert cloned.embedding.dtype == torch.bfloat16
    assert served.model.audio_tokenizer.output_proj.conv.weight.dtype == torch.bfloat16
    # The release is bf16: float32 copies of its weights are the same numbers.
    again = clone(tts, speechlike(3.2), steps=2)
    assert cloned.codes is not None
    assert again.codes is not None
    assert torch.equal(cloned.codes, again.codes)


def test_stopping_keeps_the_best_voice_so_far(tts: Revox):
    def interrupt(at: Progress) -> None:
        if at.what != SELECTED:
            raise KeyboardInterrupt

    cloned = clone(tts, speechlike(3.2), progress=interrupt)
    assert cloned.coding.stopped
    assert cloned.coding.searches["inversion"].steps == 1
    assert cloned.provenance["settings"]["stopped"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"consent": " "}, "consent is required"),
        ({"budget": 0.0}, "budget"),
        ({"budget": float("nan")}, "budget"),
        ({"steps": -1}, "steps"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_computed(
    tts: Revox, changes: dict[str, Any], sentence: str
):
    def never(at: object) -> None:
        raise AssertionError("computed")

    with pytest.raises(CodingError, match=sentence):
        clone(tts, speechlike(3.2), progress=never, **changes)


def test_a_recording_without_speech_or_with_values_that_are_no_numbers_is_refused(tts: Revox):
    with pytest.raises(AudioError, match="speech"):
        clone(tts, Audio(np.zeros(80000), 16000))
    broken = speechlike(3.2).samples.copy()
    broken[1000] = np.nan
    with pytest.raises(CodingError, match="not numbers"):
        clone(tts, Audio(broken, 16000))


def test_with_an_encoder_nothing_is_searched_for(encoding: Revox, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr("revox.coding.find.invert", never)
    cloned = clone(encoding, speechlike(3.2))
    assert cloned.coding.method == "encoder"
    assert cloned.provenance["method"] == "encoder"
    expected = encoding.coder.encode(torch.from_numpy(cloned.reference.samples))
    assert torch.equal(cloned.codes, expected.codes)
    with pytest.raises(AssertionError, match="searched"):
        clone(encoding, speechlike(3.2), method="inversion")


def test_the_record_says_what_was_compared_and_which_was_kept(encoding: Revox):
    cloned = clone(encoding, speechlike(3.2), method="best", refine=3, steps=2)
    assert set(cloned.coding.scores) == {"encoder", "refined", "inversion"}
    record = json.loads(json.dumps(cloned.provenance))
    settings = record["settings"]
    totals = {name: score["total"] for name, score in settings["scores"].items()}
    assert settings["chosen"] == cloned.coding.method == min(totals, key=lambda name: totals[name])
    assert record["method"] == {"refined": "encoder, refined"}.get(settings["chosen"], settings["chosen"])
    assert settings["refine"] == 3
    assert settings["steps"] == 2
    assert settings["steps_done"] == 5
    assert totals[settings["chosen"]] == pytest.approx(settings["loss"], abs=1e-5)


def test_a_refinement_that_is_stopped_keeps_the_better_codes(encoding: Revox):
    cloned = clone(encoding, speechlike(3.2), refine=40, should_stop=lambda: True)
    settings = cloned.provenance["settings"]
    assert settings["stopped"]
    assert settings["steps_done"] == 1
    scores = cloned.coding.scores
    assert scores[cloned.coding.method].total <= scores["encoder"].total


def test_the_library_takes_an_encoders_codes_at_once_and_refines_them_when_asked(encoding: Revox):
    at_once = encoding.clone(speechlike(3.2), consent=AGREED, transcript="hm")
    assert at_once.provenance["method"] == "encoder"
    assert at_once.provenance["transcript"] == "hm"
    settings = encoding.clone(speechlike(3.2), consent=AGREED, refine=1).provenance["settings"]
    assert settings["refine"] == settings["steps_done"] == 1
    assert set(settings["scores"]) == {"encoder", "refined"}
    assert settings["preset_frames"] > 0
    inverted = encoding.clone(speechlike(3.2), consent=AGREED, method="inversion", budget=0.5)
    assert inverted.provenance["method"] == "inversion"
    with pytest.raises(CodingError, match="--budget limits nothing"):
        encoding.clone("no such file.wav", consent=AGREED, budget=5.0)


def test_cloning_without_a_transcript_reads_no_more_of_the_checkpoint_than_it_needs(
    tiny_checkpoint: Path, tts: Revox
):
    lazy = revox.load(tiny_checkpoint, device="cpu", lazy=True)
    lazy.coder._presets = tts.coder.preset_codes()
    lazy.clone(speechlike(3.2), consent=AGREED, steps=0)
    assert "model" not in lazy.__dict__
    assert "prompter" not in lazy.__dict__
    assert lazy._coding_model.backbone.norm.weight.is_meta


@pytest.fixture
def at_once(tts: Revox, monkeypatch: pytest.MonkeyPatch) -> Revox:
    """With a student, which has learned nothing."""
    student = StudentEncoder.for_codec(tts.coder.codec, 16, 1)
    student.record = {"steps": 0}
    monkeypatch.setattr(tts, "coder", Coder(tts.coder.codec, student=lambda codec: student))
    return tts


def test_the_old_name_of_a_method_works_and_says_the_new_one(at_once: Revox):
    with pytest.warns(DeprecationWarning, match="method='student'"):
        voice = at_once.clone(speechlike(3.2), consent=AGREED, quick_encoder=True)
    assert voice.provenance["method"] == "student"
    assert voice.provenance["settings"]["student"] == {"steps": 0}


def test_several_recordings_make_one_voice_of_at_most_thirty_seconds(at_once: Revox, tmp_path: Path):
    tts = at_once
    write_audio(tmp_path / "b.wav", speechlike(4.0))
    clips = [speechlike(40.0), tmp_path / "b.wav", speechlike(1.5)]  # the last alone would be too short
    told: list[Progress] = []
    voice = tts.clone(clips, consent=AGREED, progress=told.append)
    selected = [at.facts for at in told if at.what == SELECTED]
    assert [facts["file"] for facts in selected] == ["", "b.wav", ""]
    used = [voice.provenance["source"], *voice.provenance["more_sources"]]
    assert [one.get("file") for one in used] == [None, "b.wav", None]
    seconds = [one["seconds"] for one in used]
    assert seconds[1] > 3.5  # a short one is taken whole and a long one has what is left
    assert seconds[0] > 15
    assert sum(seconds) <= 30
    assert voice.reference.seconds == pytest.approx(sum(seconds), abs=0.5)
    levels = [np.sqrt(np.mean(part**2)) for part in np.array_split(voice.reference.samples, 6)]
    assert max(levels) < 2 * min(levels)
    with pytest.raises(CloneError, match="3 were given"):
        tts.clone(clips, consent=AGREED, transcript="one two")
    with pytest.raises(CloneError, match="no recording was given"):
        tts.clone([], consent=AGREED)
