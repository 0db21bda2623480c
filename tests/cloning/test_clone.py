from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import revox
from revox.checkpoint.load import load_model
from revox.checkpoint.voices import add_voice, load_voice
from revox.cloning import CloneError
from revox.cloning.clone import PARTS, choose_ways, clone_voice, preset_codes
from revox.coding.encode import encode
from revox.coding.invert import InversionConfig
from revox.model.voxtral import Voxtral
from revox.speech import Audio, AudioError
from revox.speech.loudness import loudness

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = InversionConfig(polish_rounds=1, scales=((1024, 160),))
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
def model(tiny_checkpoint: Path) -> Voxtral:
    return load_model(tiny_checkpoint, dtype=torch.float32, parts=PARTS)


@pytest.fixture(scope="module")
def presets(tiny_checkpoint: Path, model: Voxtral) -> list[Tensor]:
    return preset_codes(tiny_checkpoint, model)


def test_the_codes_of_all_presets_are_recovered(presets: list[Tensor], tiny_preset_codes: dict[str, Tensor]):
    assert len(presets) == 20
    for found, true in zip(presets, tiny_preset_codes.values(), strict=True):
        assert torch.equal(found, true)


def test_presets_beyond_the_limit_are_left_out(tiny_checkpoint: Path, model: Voxtral):
    # 10, 11, 12 frames ...: the third passes 25.
    assert [c.shape[1] for c in preset_codes(tiny_checkpoint, model, max_frames=25)] == [10, 11, 12]


def test_a_clone_is_whole_frames_of_the_chosen_stretch_and_its_rows_are_the_sums_of_its_codes(
    model: Voxtral, presets: list[Tensor], tiny_checkpoint: Path
):
    audio = speechlike(3.4)
    cloned = clone_voice(model, audio, consent=AGREED, name="me", steps=3, config=QUICK, presets=presets)
    frames = cloned.voice.frames
    assert cloned.selection.start >= 0.4
    assert cloned.selection.end <= audio.seconds - 0.4
    assert cloned.reference.rate == cloned.decoded.rate == 24000
    assert len(cloned.reference.samples) == len(cloned.decoded.samples) == 1920 * frames
    assert 0 <= cloned.selection.seconds - cloned.reference.seconds < 0.08 * 5
    assert loudness(cloned.reference.samples, 24000) == pytest.approx(-23, abs=0.5)
    assert cloned.voice.codes is not None
    assert cloned.voice.codes.shape == (37, frames)
    # The rows are those that the release's own table gives, in bf16.
    served = load_model(tiny_checkpoint, dtype=torch.bfloat16, parts=["mm_audio_embeddings"])
    with torch.no_grad():
        rows = served.mm_audio_embeddings.voice_embedding(cloned.voice.codes)
    assert cloned.voice.embedding.dtype == torch.bfloat16
    assert torch.equal(cloned.voice.embedding, rows)
    with torch.no_grad():
        again = model.audio_tokenizer.decode(cloned.voice.codes[None])[0]
    assert np.allclose(cloned.decoded.samples, again.numpy(), atol=1e-6)


def test_a_clone_can_be_added_and_is_loaded_as_it_was(
    model: Voxtral, presets: list[Tensor], tiny_checkpoint_copy: Path
):
    cloned = clone_voice(
        model, speechlike(3.4), consent=AGREED, name="me", steps=1, config=QUICK, presets=presets
    )
    voice = cloned.voice
    add_voice(tiny_checkpoint_copy, voice.name, voice.embedding, voice.codes, voice.provenance)
    loaded = load_voice(tiny_checkpoint_copy, "me")
    assert torch.equal(loaded.embedding, voice.embedding)
    assert loaded.codes is not None
    assert voice.codes is not None
    assert torch.equal(loaded.codes, voice.codes)
    assert loaded.provenance == voice.provenance


def test_provenance_says_what_was_cloned_how_and_with_whose_consent(
    model: Voxtral, presets: list[Tensor], tmp_path: Path
):
    clip = tmp_path / "me.wav"
    clip.write_bytes(b"as it was on disk")
    cloned = clone_voice(
        model, speechlike(3.4), consent=AGREED, steps=2, seed=5, config=QUICK, presets=presets, source=clip
    )
    record = json.loads(json.dumps(cloned.voice.provenance))
    assert record["method"] == "inversion"
    assert record["consent"]["statement"] == AGREED
    assert record["source"]["file"] == "me.wav"
    assert record["source"]["sha256"] == hashlib.sha256(b"as it was on disk").hexdigest()
    assert record["source"]["start_s"] == pytest.approx(cloned.selection.start, abs=1e-3)
    assert record["source"]["seconds"] == pytest.approx(cloned.reference.seconds, abs=1e-3)
    assert record["settings"]["steps"] == record["settings"]["steps_done"] == 2
    assert record["settings"]["seed"] == 5
    assert not record["settings"]["stopped"]
    assert "created_at" in record


def test_the_same_seed_gives_the_same_voice_at_any_level_of_the_recording(
    model: Voxtral, presets: list[Tensor]
):
    loud, quiet = (
        clone_voice(
            model, speechlike(3.2, quiet=gain), consent=AGREED, steps=3, config=QUICK, presets=presets
        ).voice.codes
        for gain in (1.0, 0.5)  # a power of two: the float32 samples differ by nothing else
    )
    assert loud is not None
    assert quiet is not None
    assert torch.equal(loud, quiet)


def test_weights_in_bf16_are_inverted_in_float32_and_left_as_they_were(
    tiny_checkpoint: Path, presets: list[Tensor]
):
    served = load_model(tiny_checkpoint, dtype=torch.bfloat16, parts=PARTS)
    cloned = clone_voice(served, speechlike(3.2), consent=AGREED, steps=2, config=QUICK, presets=presets)
    assert cloned.voice.embedding.dtype == torch.bfloat16
    assert served.audio_tokenizer.output_proj.conv.weight.dtype == torch.bfloat16
    # The release is bf16: float32 copies of its weights are the same numbers.
    exact = load_model(tiny_checkpoint, dtype=torch.float32, parts=PARTS)
    again = clone_voice(exact, speechlike(3.2), consent=AGREED, steps=2, config=QUICK, presets=presets)
    assert cloned.voice.codes is not None
    assert again.voice.codes is not None
    assert torch.equal(cloned.voice.codes, again.voice.codes)


def test_stopping_keeps_the_best_voice_so_far(model: Voxtral, presets: list[Tensor]):
    def interrupt(at: object) -> None:
        raise KeyboardInterrupt

    cloned = clone_voice(
        model, speechlike(3.2), consent=AGREED, config=QUICK, presets=presets, progress=interrupt
    )
    assert cloned.result.stopped
    assert cloned.result.steps == 1
    assert cloned.voice.provenance["settings"]["stopped"]


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
    model: Voxtral, changes: dict[str, object], sentence: str
):
    def never(at: object) -> None:
        raise AssertionError("computed")

    arguments = {"consent": AGREED, "progress": never, **changes}
    with pytest.raises(CloneError, match=sentence):
        clone_voice(model, speechlike(3.2), **arguments)  # type: ignore[arg-type]


def test_a_recording_without_speech_or_with_values_that_are_no_numbers_is_refused(model: Voxtral):
    with pytest.raises(AudioError, match="speech"):
        clone_voice(model, Audio(np.zeros(80000), 16000), consent=AGREED)
    broken = speechlike(3.2).samples.copy()
    broken[1000] = np.nan
    with pytest.raises(CloneError, match="not numbers"):
        clone_voice(model, Audio(broken, 16000), consent=AGREED)


@pytest.fixture(scope="module")
def encoding(tiny_checkpoint_with_encoder: Path) -> Voxtral:
    return load_model(tiny_checkpoint_with_encoder, dtype=torch.float32, parts=PARTS)


@pytest.mark.parametrize(
    ("has_encoder", "settings", "ways"),
    [
        (False, {}, ("inversion",)),
        (False, {"method": "best", "steps": 3}, ("inversion",)),
        (False, {"method": "inversion", "quick_encoder": True}, ("inversion",)),
        (True, {}, ("encoder",)),
        (True, {"method": "encoder", "refine_steps": 4, "budget": 1.0}, ("encoder", "refined")),
        (True, {"method": "inversion", "steps": 3, "budget": 1.0}, ("inversion",)),
        (True, {"method": "best", "steps": 3}, ("encoder", "inversion")),
        (True, {"method": "best", "refine_steps": 4}, ("encoder", "refined", "inversion")),
    ],
)
def test_the_method_and_what_the_checkpoint_has_decide_whose_codes_there_are(has_encoder, settings, ways):
    assert choose_ways(has_encoder, **settings) == ways


@pytest.mark.parametrize(
    ("has_encoder", "settings", "sentence"),
    [
        (True, {"method": "magic"}, "no method 'magic'"),
        (True, {"refine_steps": -1}, "-1 steps"),
        (False, {"method": "encoder"}, "no whole encoder"),
        (False, {"refine_steps": 5}, "no whole encoder: leave it out"),
        (True, {"method": "inversion", "refine_steps": 5}, "the method is inversion: leave it out"),
        (True, {"steps": 5}, "--steps is for inversion"),
        (True, {"quick_encoder": True, "refine_steps": 5}, "--quick-encoder is for inversion"),
        (True, {"budget": 5.0}, "a budget limits nothing"),
    ],
)
def test_settings_that_would_be_passed_over_are_refused(has_encoder, settings, sentence):
    with pytest.raises(CloneError, match=sentence):
        choose_ways(has_encoder, **settings)


def test_with_an_encoder_nothing_is_searched_for(encoding: Voxtral, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr("revox.cloning.clone.invert", never)
    monkeypatch.setattr("revox.coding.refine.invert", never)
    cloned = clone_voice(encoding, speechlike(3.2), consent=AGREED)
    assert cloned.kept == "encoder"
    assert cloned.voice.provenance["method"] == "encoder"
    expected = encode(encoding.audio_tokenizer, torch.from_numpy(cloned.reference.samples))
    assert torch.equal(cloned.voice.codes, expected.codes)
    with pytest.raises(AssertionError, match="searched"):
        clone_voice(encoding, speechlike(3.2), consent=AGREED, method="inversion")


def test_the_record_says_what_was_compared_and_which_was_kept(encoding: Voxtral, presets: list[Tensor]):
    cloned = clone_voice(
        encoding, speechlike(3.2), consent=AGREED, method="best", refine_steps=3, steps=2, config=QUICK,
        presets=presets,
    )  # fmt: skip
    assert set(cloned.scores) == {"encoder", "refined", "inversion"}
    record = json.loads(json.dumps(cloned.voice.provenance))
    settings = record["settings"]
    totals = {name: score["total"] for name, score in settings["scores"].items()}
    assert settings["kept"] == cloned.kept == min(totals, key=lambda name: totals[name])
    assert record["method"] == {"refined": "encoder, refined"}.get(cloned.kept, cloned.kept)
    assert settings["refine"] == 3
    assert settings["steps"] == 2
    assert settings["steps_done"] == 5
    assert totals[cloned.kept] == pytest.approx(settings["loss"], abs=1e-5)


def test_a_refinement_that_is_stopped_keeps_the_better_codes(encoding: Voxtral, presets: list[Tensor]):
    cloned = clone_voice(
        encoding, speechlike(3.2), consent=AGREED, refine_steps=40, config=QUICK, presets=presets,
        should_stop=lambda: True,
    )  # fmt: skip
    settings = cloned.voice.provenance["settings"]
    assert settings["stopped"]
    assert settings["steps_done"] == 1
    assert cloned.scores[cloned.kept].total <= cloned.scores["encoder"].total


def test_the_library_takes_an_encoders_codes_at_once_and_refines_them_when_asked(
    tiny_checkpoint_with_encoder: Path,
    tiny_preset_codes: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("revox.cloning.clone.preset_codes", lambda *_: list(tiny_preset_codes.values()))
    tts = revox.load(tiny_checkpoint_with_encoder, device="cpu")
    at_once = tts.clone(speechlike(3.2), consent=AGREED, transcript="hm")
    assert at_once.provenance["method"] == "encoder"
    assert at_once.provenance["transcript"] == "hm"
    settings = tts.clone(speechlike(3.2), consent=AGREED, refine=1).provenance["settings"]
    assert settings["refine"] == settings["steps_done"] == 1
    assert set(settings["scores"]) == {"encoder", "refined"}
    assert settings["preset_frames"] > 0
    inverted = tts.clone(speechlike(3.2), consent=AGREED, method="inversion", budget=0.5)
    assert inverted.provenance["method"] == "inversion"
    with pytest.raises(CloneError, match="a budget limits nothing"):
        tts.clone("no such file.wav", consent=AGREED, budget=5.0)
