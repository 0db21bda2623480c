"""The lab's speech sets and the shards they are packed into."""

import numpy as np
import pytest

from lab import LabError
from lab.data import RATE, SpeechSet, write_set
from lab.shards import Shard, pack, unpack


def glide(seconds, seed):
    """A tone that rises, with a little noise: something Opus keeps well."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (0.3 * np.sin(2 * np.pi * (200 * time + 100 * time**2)) + 0.003 * noise).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Three speakers with two utterances each, of different lengths."""
    parts = []
    for speaker in range(3):
        waves = [glide(0.5 + 0.25 * speaker, speaker), glide(1.01, 10 + speaker)]
        index = [
            {"speaker": f"s{speaker}", "sex": "F", "preset": None, "text": f"text {i}", "samples": len(wave)}
            for i, wave in enumerate(waves)
        ]
        parts.append((np.round(np.concatenate(waves) * 32768).astype(np.int16), index))
    (tmp_path / "data").mkdir()
    write_set(tmp_path / "data", "synthetic-train", iter(parts))
    return tmp_path


def test_a_set_gives_back_the_samples_and_texts_it_was_made_of(folder):
    speech = SpeechSet(folder / "data", "train")
    assert len(speech) == 6
    assert speech.speakers == ["s0", "s1", "s2"]
    assert speech.utterances[3].text == "text 1"
    np.testing.assert_allclose(speech.waveform(3), glide(1.01, 11), atol=1 / 32768)


def test_crops_have_the_length_asked_for_even_of_short_utterances(folder):
    speech = SpeechSet(folder / "data", "train", "synthetic")
    rng = np.random.default_rng(0)
    assert {len(speech.crop(rng, seconds)) for seconds in (0.2, 0.8, 2.5)} == {4800, 19200, 60000}
    again = SpeechSet(folder / "data", "train", "synthetic")
    np.testing.assert_array_equal(
        speech.crop(np.random.default_rng(3), 0.8), again.crop(np.random.default_rng(3), 0.8)
    )


def test_an_open_set_outlives_its_replacement(folder):
    old = SpeechSet(folder / "data", "train")
    before = old.waveform(5)
    wave = glide(0.3, 9)
    entry = {"speaker": "new", "sex": "M", "preset": None, "text": None, "samples": len(wave)}
    write_set(folder / "data", "synthetic-train", iter([(np.round(wave * 32768).astype(np.int16), [entry])]))
    np.testing.assert_array_equal(old.waveform(5), before)
    assert SpeechSet(folder / "data", "train").speakers == ["new"]


def test_shards_keep_the_speech_aligned_to_the_sample_and_much_smaller(folder):
    size = pack(folder / "data", folder / "shards", per_shard=4, bit_rate=32_000)
    original = SpeechSet(folder / "data", "train")
    assert size < sum(u.samples for u in original.utterances) * 2 / 5
    unpack(folder / "shards", folder / "again")
    again = SpeechSet(folder / "again", "train")
    assert again.utterances == original.utterances
    for i in range(6):
        wave, heard = original.waveform(i), again.waveform(i)
        spectra = np.fft.rfft(wave, 2 * len(wave)).conj() * np.fft.rfft(heard, 2 * len(wave))
        assert np.fft.irfft(spectra).argmax() == 0  # no delay
        assert np.corrcoef(wave, heard)[0, 1] > 0.98


def test_fewer_utterances_a_speaker_can_be_packed(folder):
    pack(folder / "data", folder / "shards", most=1)
    shard = Shard(folder / "shards" / "synthetic-train-0000.shard")
    assert [(one["speaker"], one["text"]) for one in shard.index] == [(f"s{i}", "text 0") for i in range(3)]


def test_one_utterance_is_read_without_the_others(folder):
    pack(folder / "data", folder / "shards", per_shard=4)
    shard = Shard(folder / "shards" / "synthetic-train-0001.shard")
    assert [one["speaker"] for one in shard.index] == ["s2", "s2"]
    assert len(shard.waveform(1)) == shard.index[1]["samples"] == round(1.01 * RATE)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_shard_is_named(folder, damage):
    pack(folder / "data", folder / "shards")
    path = folder / "shards" / "synthetic-train-0000.shard"
    data = path.read_bytes()
    path.write_bytes(data[:-10] if damage == "cut" else b"something else" * 9)
    with pytest.raises(LabError, match=r"synthetic-train-0000\.shard is not a complete shard"):
        Shard(path)


def test_a_folder_without_speech_says_how_to_make_it(tmp_path):
    with pytest.raises(LabError, match="python -m lab build"):
        SpeechSet(tmp_path, "train")
    with pytest.raises(LabError, match="no shards"):
        unpack(tmp_path, tmp_path / "out")
