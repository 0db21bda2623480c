"""Clips that lhotse packed into Shar shards, as docs/data.md shows, are a source like any other."""

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

from revox.speech import Audio, read_audio, write_audio
from revox.training.data import SpeechSource, find_sources
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


def export(speech: SpeechSource, folder: Path, window: float = 60.0, **options) -> None:
    folder.mkdir()
    cuts = CutSet(speech.cuts).cut_into_windows(window)
    cuts.to_shar(folder, {"recording": "flac"}, fault_tolerant=True, **options)


def found_in(folder: Path, tmp_path: Path) -> list[MonoCut]:
    [found] = find_sources([str(folder)], cache=tmp_path / "cache", workers=0)
    return sorted(found.cuts, key=lambda cut: cut.supervisions[0].text or cut.id)


def hertz(samples: np.ndarray, rate: int) -> float:
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * rate / len(samples)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_packed_comes_back_as_a_source(six, tmp_path, jobs):
    export(six, tmp_path / "out", shard_size=4, num_jobs=jobs)
    for i, cut in zip((0, 1, 3, 4, 5), found_in(tmp_path / "out", tmp_path), strict=True):
        said = cut.supervisions[0]
        assert (said.speaker, said.language, said.text) == (f"s{i % 2}", "de" if i else None, f"wört {i}")
        audio = read_audio(audio_source(cut_source(cut)))
        assert audio.rate == cut.recording.sampling_rate == (16000 if i == 5 else 48000)
        assert audio.seconds == pytest.approx(cut.duration, abs=1e-3)
        assert audio.seconds == pytest.approx(0.5, abs=1e-3)
        assert hertz(audio.samples, audio.rate) == pytest.approx(400 + 100 * i, abs=3)


def test_flac_shards_are_lossless_to_16_bits(tmp_path):
    path = put(tmp_path / "a.wav", 440, 0.5, RATE)
    export(source("a", [clip(path, seconds=0.5, rate=RATE)]), tmp_path / "out")
    [cut] = found_in(tmp_path / "out", tmp_path)
    np.testing.assert_array_equal(read_audio(audio_source(cut_source(cut))).samples, read_audio(path).samples)


def test_a_long_recording_is_packed_in_pieces_that_together_are_all_of_it_without_its_text(tmp_path):
    long = np.concatenate([tone(300 + 100 * k, 0.5, RATE) for k in range(5)])
    write_audio(tmp_path / "long.wav", Audio(long, RATE))
    one = clip(tmp_path / "long.wav", "s", None, "all the words", 2.5, RATE)
    export(source("l", [one]), tmp_path / "out", window=1.0)
    pieces = found_in(tmp_path / "out", tmp_path)
    assert [piece.duration for piece in pieces] == [1.0, 1.0, 0.5]
    assert all(piece.supervisions[0].text is None for piece in pieces)
    assert {piece.supervisions[0].speaker for piece in pieces} == {"s"}
    back = np.concatenate([read_audio(audio_source(cut_source(piece))).samples for piece in pieces])
    np.testing.assert_allclose(back, long, atol=1 / 32768)


def test_a_shard_cut_short_is_listed_as_broken_and_the_others_serve(six, tmp_path):
    out = tmp_path / "out"
    export(six, out, shard_size=2)
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
    export(six, out)
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
