"""Making the lab's speech: which set holds what, at what level."""

import json

import numpy as np
import pytest
from miniature import CLIPS, planned, write_materials

from lab.data import SETS, SpeechSet, prepare
from lab.level import level, sounding
from lab.sources import SPEECH, SPEEDS, preset_speakers
from lab.speech.plan import read_speakers
from revox.speech import read_audio


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield write_materials(tmp_path_factory.mktemp("materials"), patch)


@pytest.fixture(scope="module")
def made(materials, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, materials.speech, materials.librispeech, 43)
    return folder


def test_the_plan_fills_the_splits_and_what_the_codec_does_not_need_is_more(made):
    speakers = read_speakers(SPEECH / "speakers.json")
    written = {split: [] for split in ("train", "validation", "heldout")}
    for item in planned():
        written[speakers[item.speaker].split].append(item.written)
    found = {name: [u.text for u in SpeechSet(made, name, "synthetic").utterances] for name in written}
    more = SpeechSet(made, "more", "synthetic").utterances
    later = [u.text for u in more if u.speaker in speakers]
    assert len(found["train"]) == 43
    assert found | {"train": found["train"] + later} == written
    changed = more[len(later) :]
    assert [u.text for u in changed] == 2 * found["train"]
    assert {u.speaker.rsplit("-", 1)[1] for u in changed} == {"0.94", "1.06"}
    assert not any(u.preset for u in changed)


def test_human_clips_are_utterances_at_the_labs_rate_and_level(made, materials):
    for split in ("train", "validation", "heldout"):
        speech = SpeechSet(made, split, "human")
        clips = [clip for clip in CLIPS if clip.split == split]
        assert speech.speakers == sorted(f"librispeech-{clip.speaker}" for clip in clips)
        for clip in clips:
            whole = read_audio(materials.librispeech / clip.file, rate=24000).samples
            parts = [whole[: round(1.9 * 24000)], whole[round(1.9 * 24000) :]]
            mine = speech.of(f"librispeech-{clip.speaker}")
            assert [speech.utterances[i].text for i in mine] == ["plain words,", "and more."]
            for i, part in zip(mine, parts, strict=True):
                expected = level(part[slice(*sounding(part, 24000))], 24000)
                np.testing.assert_allclose(speech.waveform(i), expected, atol=1 / 32768)


def test_more_holds_the_human_voices_changed_in_speed_and_pitch_alike(made):
    plain, more = SpeechSet(made, "train", "human"), SpeechSet(made, "more", "human")
    assert len(more) == 4 * len(plain)
    for speed in SPEEDS:
        mine = [i for speaker in plain.speakers for i in more.of(f"{speaker}-{speed}")]
        for one, other in zip(range(len(plain)), mine, strict=True):
            assert more.utterances[other].text == plain.utterances[one].text
            slow, fast = plain.waveform(one), more.waveform(other)
            assert len(slow) / len(fast) == pytest.approx(speed, abs=0.02)
            tones = [np.abs(np.fft.rfft(wave, 1 << 18)).argmax() for wave in (slow, fast)]
            assert tones[1] / tones[0] == pytest.approx(speed, abs=0.01)


def test_the_utterances_of_a_presets_speaker_carry_its_name_and_others_none(made):
    roles = {speaker: preset for preset, speaker in preset_speakers().items()}
    utterances = SpeechSet(made, "train", "synthetic").utterances
    assert [u.preset for u in utterances] == [roles.get(u.speaker) for u in utterances]
    assert len({u.preset for u in utterances}) == 21


def test_a_set_without_utterances_is_left_out_and_one_of_before_goes(materials, made, tmp_path):
    names = {path.stem for path in made.glob("*.json")}
    assert names == set(SETS)
    prepare(tmp_path, materials.speech, None, 43)
    assert (tmp_path / "synthetic-more.json").is_file()
    prepare(tmp_path, materials.speech, None, 1000)
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        f"synthetic-{split}" for split in ("train", "more", "validation", "heldout")
    }
    assert len(SpeechSet(tmp_path, "train", "synthetic")) == 46


def test_the_same_materials_make_the_same_sets(materials, made, tmp_path):
    prepare(tmp_path, materials.speech, materials.librispeech, 43)
    for path in made.glob("*.json"):
        assert json.loads(path.read_text()) == json.loads((tmp_path / path.name).read_text())
