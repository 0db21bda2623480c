"""Packed clips are the clips, in files that any tar reads, written whole or not at all."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import put, tone

import revox.training.data.shards as shards_module
from revox.speech import read_audio
from revox.training.data import Clip, DataError, Source, find_sources, pack
from revox.training.data.locate import clip_source
from revox.training.data.shards import read_shard, shard_clips

RATE = 24000


@pytest.fixture
def source(tmp_path) -> Source:
    """Six clips of half a second, the third of which is no audio."""
    clips = []
    for i in range(6):
        path = put(tmp_path / "in" / f"{i}.wav", 400 + 100 * i, 0.5, 16000 if i == 5 else 48000)
        clips.append(Clip(str(path), f"s{i % 2}", "de" if i else None, f"wört {i}", 0.5, None))
    (tmp_path / "in" / "2.wav").write_text("no audio")
    return Source("six", clips)


def hertz(samples: np.ndarray, rate: int) -> float:
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * rate / len(samples)


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_what_is_packed_comes_back_as_a_source(source, tmp_path, codec):
    packed = pack([source], tmp_path / "out", codec=codec, workers=0)
    assert packed.clips == 5
    assert packed.seconds == pytest.approx(2.5, abs=1e-3)
    assert [Path(key).name for key, _ in packed.skipped] == ["2.wav"]
    [found] = find_sources([str(tmp_path / "out")], cache=tmp_path / "cache", workers=0)
    for i, clip in zip((0, 1, 3, 4, 5), found.clips, strict=True):
        assert (clip.speaker, clip.language) == (f"s{i % 2}", "de" if i else None)
        assert clip.transcript == f"wört {i}"
        assert clip.rate == (16000 if i == 5 else 24000)  # what is real in it
        audio = read_audio(clip_source(clip.key))
        assert audio.seconds == pytest.approx(clip.seconds, abs=1e-4)
        assert audio.seconds == pytest.approx(0.5, abs=1e-3)
        assert hertz(audio.samples, audio.rate) == pytest.approx(400 + 100 * i, abs=3)


def test_flac_shards_are_lossless_to_16_bits(tmp_path):
    path = put(tmp_path / "a.wav", 440, 0.5, RATE)
    packed = pack([Source("a", [Clip(str(path), "s")])], tmp_path / "out", codec="flac", workers=0)
    [(_, data)] = read_shard(packed.shards[0])
    np.testing.assert_array_equal(read_audio(data).samples, read_audio(path).samples)


def test_a_shard_is_a_tar_of_audio_files_that_others_read(source, tmp_path):
    [shard] = pack([source], tmp_path / "out", codec="flac", workers=0).shards
    with tarfile.open(shard) as tar:
        names = tar.getnames()
        assert names[0] == "index.jsonl"
        members = [tar.extractfile(name).read() for name in names[1:]]
    assert members == [data for _, data in read_shard(shard)]
    assert members == [clip_source(clip.key) for clip in shard_clips(shard)]


def test_shards_keep_under_their_size_and_any_number_of_workers_writes_the_same(source, tmp_path):
    one = pack([source], tmp_path / "one", codec="flac", workers=0, max_shard_bytes=60_000)
    two = pack([source], tmp_path / "two", codec="flac", workers=2, max_shard_bytes=60_000)
    assert len(one.shards) > 1
    assert [p.read_bytes() for p in one.shards] == [p.read_bytes() for p in two.shards]
    for shard in one.shards:
        clips = list(shard_clips(shard))
        assert len(clips) == 1 or sum(len(clip_source(clip.key)) for clip in clips) <= 60_000


def test_an_interrupted_packing_goes_on_behind_the_last_whole_shard(source, tmp_path, monkeypatch):
    options = {"codec": "flac", "workers": 0, "max_shard_bytes": 20_000}
    whole = pack([source], tmp_path / "whole", **options)
    assert len(whole.shards) >= 3
    monkeypatch.setattr(shards_module, "_CHUNK", 1)
    inner, encoded = shards_module._pieces, []

    def stopping(clip, *rest):
        encoded.append(Path(clip.key).name)
        if len(encoded) == 5:
            raise KeyboardInterrupt
        return inner(clip, *rest)

    monkeypatch.setattr(shards_module, "_pieces", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack([source], tmp_path / "cut", **options)
    before = sorted((tmp_path / "cut").iterdir())
    assert before
    assert [p.suffix for p in before] == [".tar"] * len(before)
    again = pack([source], tmp_path / "cut", **options)
    assert [p.read_bytes() for p in again.shards] == [p.read_bytes() for p in whole.shards]
    assert "0.wav" not in encoded[5:]
    done = len(encoded)
    pack([source], tmp_path / "cut", **options)
    assert len(encoded) == done


def test_shards_of_other_clips_or_settings_are_not_mixed(source, tmp_path):
    pack([source], tmp_path / "out", codec="flac", workers=0)
    for other in ({"codec": "opus"}, {"codec": "flac", "rate": 16000}):
        with pytest.raises(DataError, match="holds shards of other clips or settings"):
            pack([source], tmp_path / "out", workers=0, **other)


def test_a_recording_over_a_minute_is_packed_in_pieces_that_together_are_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_PIECE", 1.0)
    long = np.concatenate([tone(300 + 100 * k, 0.5, RATE) for k in range(5)])
    from revox.speech import Audio, write_audio

    write_audio(tmp_path / "long.wav", Audio(long, RATE))
    clip = Clip(str(tmp_path / "long.wav"), "s", None, "all the words", 2.5)
    [shard] = pack([Source("l", [clip])], tmp_path / "out", codec="flac", workers=0).shards
    pieces = list(shard_clips(shard))
    assert len(pieces) == 3
    assert all(piece.transcript is None for piece in pieces)
    assert max(piece.seconds for piece in pieces) < 0.9
    back = np.concatenate([read_audio(clip_source(piece.key)).samples for piece in pieces])
    np.testing.assert_allclose(back, long, atol=1 / 32768)


def test_a_shard_cut_short_is_listed_as_broken_and_the_others_serve(source, tmp_path):
    out = tmp_path / "out"
    packed = pack([source], out, codec="flac", workers=0, max_shard_bytes=60_000)
    last = packed.shards[-1]
    clips = len(list(shard_clips(last)))
    last.write_bytes(last.read_bytes()[:2048])
    put(out / "plain.wav")
    with tarfile.open(out / "other.tar", "w") as tar:
        tar.add(out / "plain.wav", "plain.wav")  # anybody's tar is left alone
    [found] = find_sources([str(out)], cache=tmp_path / "cache", workers=0)
    assert len(found.clips) == 5 - clips + 1
    assert [(Path(key).name, "no whole shard" in reason) for key, reason in found.broken] == [
        (last.name, True)
    ]
