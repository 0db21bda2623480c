"""Packed clips are the clips, in Shar shards that lhotse reads."""

from __future__ import annotations

import gzip
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, MonoCut

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import clip, put, source, tone

import revox.training.data.packing as pack_module
from revox.speech import Audio, read_audio, write_audio
from revox.training.data import DataError, SpeechSource, find_sources, pack
from revox.training.data.locate import audio_source
from revox.training.data.manifest import cut_source

RATE = 24000


@pytest.fixture
def six(tmp_path) -> SpeechSource:
    """Six clips of half a second, the third of which is no audio."""
    clips = []
    for i in range(6):
        rate = 16000 if i == 5 else 48000
        path = put(tmp_path / "in" / f"{i}.wav", 400 + 100 * i, 0.5, rate)
        clips.append(clip(path, f"s{i % 2}", "de" if i else None, f"wört {i}", 0.5, rate))
    (tmp_path / "in" / "2.wav").write_text("no audio")
    return source("six", clips)


def found_in(folder: Path, tmp_path: Path) -> list[MonoCut]:
    [found] = find_sources([str(folder)], cache=tmp_path / "cache", workers=0)
    return sorted(found.cuts, key=lambda cut: cut.supervisions[0].text or cut.id)


def hertz(samples: np.ndarray, rate: int) -> float:
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * rate / len(samples)


def content(folder: Path) -> dict[str, bytes]:
    """The shards as bytes; gzip puts the time into its header, which is left out."""
    return {
        path.name: gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_what_is_packed_comes_back_as_a_source(six, tmp_path, codec):
    skipped = pack([six], tmp_path / "out", codec=codec, workers=0)
    assert [Path(cut_id).name for cut_id, _ in skipped] == ["2.wav"]
    for i, cut in zip((0, 1, 3, 4, 5), found_in(tmp_path / "out", tmp_path), strict=True):
        said = cut.supervisions[0]
        assert (said.speaker, said.language, said.text) == (f"s{i % 2}", "de" if i else None, f"wört {i}")
        assert cut.custom["origin_rate"] == (16000 if i == 5 else 24000)  # what is real in it
        audio = read_audio(audio_source(cut_source(cut)))
        assert audio.seconds == pytest.approx(cut.duration, abs=1e-3)
        assert audio.seconds == pytest.approx(0.5, abs=1e-3)
        assert hertz(audio.samples, audio.rate) == pytest.approx(400 + 100 * i, abs=3)


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_lhotse_reads_the_shards(six, tmp_path, codec):
    pack([six], tmp_path / "out", codec=codec, workers=0, clips_per_shard=4)
    cuts = list(CutSet.from_shar(in_dir=tmp_path / "out"))
    assert [cut.supervisions[0].text for cut in cuts] == [f"wört {i}" for i in (0, 1, 3, 4, 5)]
    for i, cut in zip((0, 1, 3, 4, 5), cuts, strict=True):
        assert hertz(cut.load_audio()[0], RATE) == pytest.approx(400 + 100 * i, abs=3)


def test_flac_shards_are_lossless_to_16_bits(tmp_path):
    path = put(tmp_path / "a.wav", 440, 0.5, RATE)
    pack([source("a", [clip(path)])], tmp_path / "out", codec="flac", workers=0)
    [cut] = found_in(tmp_path / "out", tmp_path)
    np.testing.assert_array_equal(read_audio(audio_source(cut_source(cut))).samples, read_audio(path).samples)


def test_any_number_of_workers_writes_the_same_shards(six, tmp_path):
    pack([six], tmp_path / "one", codec="flac", workers=0, clips_per_shard=2)
    pack([six], tmp_path / "two", codec="flac", workers=2, clips_per_shard=2)
    assert len(content(tmp_path / "one")) == 6
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("after", [1, 3, 4, 5])
def test_an_interrupted_packing_continues_with_the_shard_it_was_writing(six, tmp_path, monkeypatch, after):
    options = {"codec": "flac", "workers": 0, "clips_per_shard": 2}
    pack([six], tmp_path / "whole", **options)
    inner, encoded = pack_module._pieces, []

    def stopping(codec, rate, facts, audio):
        encoded.append(Path(facts["cut_id"]).name)
        if len(encoded) == after:
            raise KeyboardInterrupt
        return inner(codec, rate, facts, audio)

    monkeypatch.setattr(pack_module, "_pieces", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack([six], tmp_path / "cut", **options)
    encoded[:] = encoded[:after] + [""] * (6 - after)
    done = len(encoded)
    pack([six], tmp_path / "cut", **options)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    if after > 4:
        assert "0.wav" not in encoded[done:]


def test_shards_of_other_clips_or_settings_are_not_mixed(six, tmp_path):
    pack([six], tmp_path / "out", codec="flac", workers=0)
    for other in ({"codec": "opus"}, {"codec": "flac", "rate": 16000}):
        with pytest.raises(DataError, match="holds shards of other clips or settings"):
            pack([six], tmp_path / "out", workers=0, **other)


def test_a_recording_over_a_minute_is_packed_in_pieces_that_together_are_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "_PIECE", 1.0)
    long = np.concatenate([tone(300 + 100 * k, 0.5, RATE) for k in range(5)])
    write_audio(tmp_path / "long.wav", Audio(long, RATE))
    one = clip(tmp_path / "long.wav", "s", None, "all the words", 2.5)
    pack([source("l", [one])], tmp_path / "out", codec="flac", workers=0)
    pieces = found_in(tmp_path / "out", tmp_path)
    assert len(pieces) == 3
    assert all(piece.supervisions[0].text is None for piece in pieces)
    assert max(piece.duration for piece in pieces) < 0.9
    back = np.concatenate([read_audio(audio_source(cut_source(piece))).samples for piece in pieces])
    np.testing.assert_allclose(back, long, atol=1 / 32768)


def test_a_shard_cut_short_is_listed_as_broken_and_the_others_serve(six, tmp_path):
    out = tmp_path / "out"
    pack([six], out, codec="flac", workers=0, clips_per_shard=2)
    last = out / "recording.000002.tar"
    last.write_bytes(last.read_bytes()[:2048])
    put(out / "plain.wav")
    with tarfile.open(out / "other.tar", "w") as tar:
        tar.add(out / "plain.wav", "plain.wav")  # anybody's tar is left alone
    [found] = find_sources([str(out)], cache=tmp_path / "cache", workers=0)
    names = [cut.id.rpartition("/")[2] for cut in found.cuts]
    assert "plain.wav" in names
    assert 4 <= len(names) <= 5  # of the damaged shard, what is whole may serve
    assert [(Path(name).name, "not a whole Shar shard" in reason) for name, reason in found.broken] == [
        ("cuts.000002.jsonl.gz", True)
    ]


def test_a_manifest_from_elsewhere_cannot_name_commands_or_files(six, tmp_path):
    out, touched = tmp_path / "out", tmp_path / "touched"
    pack([six], out, codec="flac", workers=0)
    path = out / "cuts.000000.jsonl.gz"
    cuts = list(map(json.loads, gzip.decompress(path.read_bytes()).splitlines()))
    evil = {"type": "command", "channels": [0], "source": f"touch {touched}"}
    for cut in cuts:
        cut["recording"] |= {"sources": [evil]}
    path.write_bytes(gzip.compress(b"".join(json.dumps(cut).encode() + b"\n" for cut in cuts)))
    found = found_in(out, tmp_path)
    assert len(found) == 5
    for cut in found:
        assert cut.recording.sources[0].type == "file"
        assert cut_source(cut).startswith(f"{out}/recording.000000.tar@")
    assert not touched.exists()


def test_shards_of_revox_0_1_are_named_with_what_to_do(tmp_path):
    put(tmp_path / "in" / "a.wav")
    (tmp_path / "in" / "revox-00000.tar").write_bytes(bytes(1024))
    [found] = find_sources([str(tmp_path / "in")], cache=tmp_path / "cache", workers=0)
    [(_, reason)] = found.broken
    assert "is a shard of revox 0.1; pack the original speech again" in reason
