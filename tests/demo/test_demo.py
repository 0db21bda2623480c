"""The demonstration on the tiny checkpoint: its files, its figures, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import lab
from lab.sentences import split_of
from revox.checkpoint.voices import load_voice
from revox.cli import demo_command
from revox.demo import DemoError
from revox.demo.demo import EXAMPLES, OTHERS, REFERENCE, SENTENCES, Stages, run_demo
from revox.marking import verify_file
from revox.metrics import speaker
from revox.speech import read_audio

TIME = r"(\w+ (fifteen|forty five|twenty|ten|o'clock|thirty)|(half past|quarter to|quarter past) \w+)"
# The two rules of the domain's grammar (`lab.sentences`) that the sentences are of.
RULES = (
    r"please (open|close) the (door|window|curtain) in the (kitchen|bedroom|garden|office|bathroom|hall)",
    rf"the (next|last) (train|bus|plane) to the (city|airport|station|coast) leaves at {TIME}",
)
# SHA-256 of the clips as LibriSpeech gives them.
PUBLISHED = {
    "1034-121119-0000.flac": "5211abb41ab3ac933eca4c3916f1b0ad3d2aa1add2aa6db02f2c4a67fb1d7c7f",
    "1926-143879-0000.flac": "f1c18c0480f0e4205db919effba45900f5b3e7a6928292324d320026de858b4d",
    "2159-179154-0000.flac": "da4c34c477ad5be36ee40daf448e51121d8c43992a51381106c8209a41f87f4a",
    "248-130644-0000.flac": "a8953dd6bee36a80c3c63dd7d73680d60c526160badf0053fdce870c32fcf6af",
    "4680-16026-0000.flac": "ae59bf7249ab285e4a2356a89c648087c8c11827ddad03ddcab164beb0820f31",
    "5867-48852-0000.flac": "43f2857606bc60b9e53d87b081f4e89c2c4c96964675708106d66e91184d2ae5",
}


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def shown(tiny_checkpoint, tmp_path_factory, told):
    out = tmp_path_factory.mktemp("demo") / "demo-output"
    stages = Stages(told.append, lambda at: told.append(int(at.done)))
    return out, run_demo(out, checkpoint=tiny_checkpoint, steps=2, stages=stages)


@pytest.mark.parametrize("compared", [True, False])
def test_the_command_says_what_the_model_cannot_with_a_comparison_and_without(shown, compared, capsys):
    out, summary = shown
    demo_command._print_demo(out, summary if compared else {**summary, "similarity": None})
    assert "takes after a person in part" in capsys.readouterr().out


def test_it_leaves_three_sounds_a_picture_and_the_figures(shown):
    out, summary = shown
    for name in ("reference.wav", "decoded.wav", "speech.wav"):
        audio = read_audio(out / name)
        assert audio.rate == 24000
        assert audio.seconds > 0.1
    assert (out / "mel.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "summary.json").read_text()) == summary


def test_what_it_made_is_marked_as_synthetic_and_the_recording_is_not(shown):
    out, _ = shown
    verdicts = {name: verify_file(out / f"{name}.wav").state for name in ("reference", "decoded", "speech")}
    assert verdicts == {"reference": "unmarked", "decoded": "marked", "speech": "marked"}


def test_the_decoded_clip_is_as_long_as_the_reference_and_made_by_the_voice_that_was_added(shown):
    out, _ = shown
    reference, decoded = (read_audio(out / name) for name in ("reference.wav", "decoded.wav"))
    voice = load_voice(out / "checkpoint", "demo")
    assert reference.samples.shape == decoded.samples.shape == (voice.frames * 1920,)
    assert voice.provenance["source"]["file"] == REFERENCE
    assert "LibriSpeech" in voice.provenance["consent"]["statement"]

    import revox

    codec = revox.load(out / "checkpoint", device="cpu").model.audio_tokenizer
    again = codec.decode(voice.codes[None])[0].numpy()
    np.testing.assert_allclose(decoded.samples, np.clip(again, -1, 1), atol=1e-4)


def test_similarities_are_those_of_the_verification_model_on_the_files(shown):
    out, summary = shown
    verifier = speaker.SpeakerVerifier()
    other = OTHERS[0]
    for title in ("decoded", "speech"):
        made = read_audio(out / f"{title}.wav")
        scores = summary["similarity"][title]
        assert len(scores["to_others"]) == 5
        own = verifier.similarity(made, read_audio(out / "reference.wav"))
        assert scores["to_reference"] == pytest.approx(own, abs=0.01)
        foreign = verifier.similarity(made, read_audio(EXAMPLES / other))
        assert scores["to_others"][other.split("-")[0]] == pytest.approx(foreign, abs=0.01)


def test_the_real_time_factor_is_time_over_speech(shown):
    _, summary = shown
    factor = summary["seconds"]["speak"] / summary["speech_seconds"]
    assert summary["real_time_factor"] == pytest.approx(factor, rel=0.02)


def test_it_tells_each_stage_and_each_step_of_the_search(shown, told):
    assert next(line for line in told if isinstance(line, str)) == "loading the checkpoint"
    assert [step for step in told if not isinstance(step, str)][:2] == [1, 2]


def test_the_checkpoint_that_it_copies_stays_as_it_was(shown, tiny_checkpoint):
    assert not (tiny_checkpoint / "voice_embedding" / "demo.pt").exists()
    assert "demo" not in (tiny_checkpoint / "params.json").read_text()


def test_it_does_not_replace_a_folder_that_is_not_its_own(tiny_checkpoint, tmp_path):
    mine = tmp_path / "checkpoint"
    mine.mkdir()
    (mine / "params.json").write_text("mine")
    with pytest.raises(DemoError, match="not from a demonstration"):
        run_demo(tmp_path, checkpoint=tiny_checkpoint, steps=1)
    assert (mine / "params.json").read_text() == "mine"


def test_without_the_verification_model_it_says_so_and_leaves_the_similarities_out(
    tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    monkeypatch.setitem(sys.modules, "resemblyzer.audio", None)
    summary = run_demo(tmp_path, checkpoint=tiny_checkpoint, steps=0)
    assert summary["similarity"] is None
    assert any("Resemblyzer" in note for note in summary["notes"])
    assert (tmp_path / "speech.wav").stat().st_size > 1000


def test_its_sentences_are_of_the_domain_and_no_training_sentences():
    assert [split_of(sentence) for sentence in SENTENCES] == ["heldout", "heldout"]
    assert all(re.fullmatch(rule, s.lower().rstrip(".")) for rule, s in zip(RULES, SENTENCES, strict=True))


def test_its_clips_are_unchanged_and_of_speakers_that_training_did_not_use():
    rows = (Path(lab.__file__).parent / "lists" / "librispeech.csv").read_text().splitlines()
    heldout = {row.split(",")[0] for row in rows if row.endswith(",heldout")}
    assert {REFERENCE, *OTHERS} <= heldout
    assert {path.name for path in EXAMPLES.glob("*.flac")} == {REFERENCE, *OTHERS} == set(PUBLISHED)
    for name, digest in PUBLISHED.items():
        assert hashlib.sha256((EXAMPLES / name).read_bytes()).hexdigest() == digest
        assert name in (EXAMPLES / "README.md").read_text()
