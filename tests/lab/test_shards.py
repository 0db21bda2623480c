"""The lab's speech sets and the shards they are packed into."""

import lhotse
import numpy as np
import pytest

from lab import LabError
from lab.data import RATE, SETS, SpeechSet, write_set
from lab.shards import pack, unpack
from revox.training.data import DataError, find_sources


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
            {
                "speaker": f"s{speaker}",
                "sex": "F",
                "preset": None,
                "text": f"text {i}",
                "samples": len(wave),
            }
            for i, wave in enumerate(waves)
        ]
        parts.append((np.round(np.concatenate(waves) * 32768).astype(np.int16), index))
    (tmp_path / "data").mkdir()
    write_set(tmp_path / "data", "synthetic-train", iter(parts))
    return tmp_path


def test_a_set_gives_back_the_samples_and_texts_it_was_made_of(folder):
    speech = SpeechSet(folder / "data", "train", "synthetic")
    assert len(speech) == 6
    assert speech.speakers == ["s0", "s1", "s2"]
    assert speech.utterances[3].text == "text 1"
    np.testing.assert_allclose(speech.waveform(3), glide(1.01, 11), atol=1 / 32768)


def test_an_open_set_outlives_its_replacement(folder):
    old = SpeechSet(folder / "data", "train", "synthetic")
    before = old.waveform(5)
    wave = glide(0.3, 9)
    entry = {"speaker": "new", "sex": "M", "preset": None, "text": None, "samples": len(wave)}
    write_set(folder / "data", "synthetic-train", iter([(np.round(wave * 32768).astype(np.int16), [entry])]))
    np.testing.assert_array_equal(old.waveform(5), before)
    assert SpeechSet(folder / "data", "train", "synthetic").speakers == ["new"]


def test_shards_keep_the_speech_aligned_to_the_sample_and_much_smaller(folder):
    size = pack(folder / "data", folder / "shards", per_shard=4, bit_rate=32_000)
    original = SpeechSet(folder / "data", "train", "synthetic")
    assert (
        size < sum(u.samples for u in original.utterances) * 2 / 4
    )  # of 16-bit samples; a tar's last block is most of it
    assert unpack(folder / "shards", folder / "again") == ["synthetic-train"]
    again = SpeechSet(folder / "again", "train", "synthetic")
    assert again.utterances == original.utterances
    for i in range(6):
        wave, decoded = original.waveform(i), again.waveform(i)
        spectra = np.fft.rfft(wave, 2 * len(wave)).conj() * np.fft.rfft(decoded, 2 * len(wave))
        assert np.fft.irfft(spectra).argmax() == 0  # no delay
        assert np.corrcoef(wave, decoded)[0, 1] > 0.98


def test_fewer_utterances_a_speaker_can_be_packed(folder):
    pack(folder / "data", folder / "shards", most=1)
    unpack(folder / "shards", folder / "again")
    found = SpeechSet(folder / "again", "train", "synthetic").utterances
    assert [(one.speaker, one.text) for one in found] == [(f"s{i}", "text 0") for i in range(3)]


def test_every_set_of_a_build_is_packed(folder):
    data = folder / "data"
    wave = np.round(glide(0.3, 9) * 32767).astype(np.int16)
    entry = {"speaker": "new", "sex": "M", "preset": None, "text": None, "samples": len(wave)}
    for name in SETS[1:]:
        write_set(data, name, iter([(wave, [entry])]))
    pack(data, folder / "shards")
    assert sorted(unpack(folder / "shards", folder / "again")) == sorted(SETS)


def test_lhotse_and_training_read_the_shards(folder):
    pack(folder / "data", folder / "shards", per_shard=4)
    packed = folder / "shards" / "synthetic-train"
    cuts = list(lhotse.CutSet.from_shar(in_dir=packed))
    original = SpeechSet(folder / "data", "train", "synthetic").utterances
    assert [(c.supervisions[0].speaker, c.supervisions[0].text, c.custom["sex"]) for c in cuts] == [
        (one.speaker, one.text, one.sex) for one in original
    ]
    assert [c.num_samples for c in cuts] == [one.samples for one in original]
    (source,) = find_sources([str(packed)])
    speakers = sorted(cut.supervisions[0].speaker for cut in source.cuts)
    assert speakers == [one.speaker for one in original]


def test_an_interrupted_packing_continues_with_the_missing_shards(folder):
    pack(folder / "data", folder / "shards", per_shard=4)
    packed = folder / "shards" / "synthetic-train"
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    (packed / "cuts.000001.jsonl.gz").unlink()
    (packed / "recording.000000.tar").write_bytes(b"untouched")
    pack(folder / "data", folder / "shards", per_shard=4)
    before["recording.000000.tar"] = b"untouched"
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_shard_is_named_and_makes_no_set(folder, damage):
    pack(folder / "data", folder / "shards")
    path = folder / "shards" / "synthetic-train" / "recording.000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"something else" * 99)
    with pytest.raises(DataError, match=r"recording\.000000\.tar"):
        unpack(folder / "shards", folder / "again")
    assert not (folder / "again" / "synthetic-train.json").exists()


def test_a_set_of_an_older_version_is_named(folder):
    path = folder / "data" / "synthetic-train.json"
    path.write_text(path.read_text().replace('"preset"', '"phones"'))
    with pytest.raises(LabError, match=r"synthetic-train\.json is of an older version"):
        SpeechSet(folder / "data", "train", "synthetic")


def test_a_folder_without_speech_says_how_to_make_it(tmp_path):
    with pytest.raises(LabError, match="python -m lab build"):
        SpeechSet(tmp_path, "train", "synthetic")
    with pytest.raises(LabError, match="no shards"):
        unpack(tmp_path, tmp_path / "out")
