"""Datasets that are streamed: read on exactly where they were, shared out, mixed with folders."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest
from lhotse import CutSet

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import clip, put, source

from revox.training.data import (
    ClipBatches,
    ClipSampler,
    DataError,
    SpeechSource,
    find_sources,
    sampling,
)

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A dataset of 20 clips in 4 files, as the hub has them: parquet with audio inside."""
    folder = tmp_path_factory.mktemp("hub")
    data = put(folder / "tone.wav", 500, 0.3).read_bytes()
    for part in range(4):
        rows = {
            "audio": [{"bytes": data, "path": f"{part}-{i}.wav"} for i in range(5)],
            "speaker_id": [part] * 5,
            "text": [f"words {part} {i}" for i in range(5)],
            "lang": ["nl"] * 5,
        }
        whole = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
        whole.to_parquet(str(folder / "set" / f"train-{part:05d}-of-00004.parquet"))
    return folder / "set"


def sampler_of(*sources: SpeechSource, **options) -> ClipSampler:
    return ClipSampler(sources, seconds=1.0, batch=4, seed=1, **options)


def words(sampler, count: int) -> list[str]:
    return [cut.supervisions[0].text for cut in islice(sampler, count)]


def test_a_dataset_is_streamed_with_what_its_columns_say_and_decoded(hub):
    [stream] = find_sources([f"hf:{hub}"])
    cuts = list(stream.cuts)
    assert len(cuts) == 20
    said = cuts[7].supervisions[0]
    assert (said.speaker, said.language, said.text) == (f"hf:{hub}/1", "nl", "words 1 2")
    assert cuts[7].duration == pytest.approx(0.3)
    with ClipBatches(sampler_of(stream), 24000, workers=0) as loader:
        assert next(loader).lengths.tolist() == [7200] * 4


def test_a_block_has_every_clip_of_the_stream_alike_in_another_order(hub, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 20)
    sampler = sampler_of(*find_sources([f"hf:{hub}"]))
    stored = [f"words {part} {i}" for part in range(4) for i in range(5)]
    first, second = words(sampler, 20), words(sampler, 20)
    assert sorted(first) == sorted(second) == stored
    assert first != stored
    assert first != second


@pytest.mark.parametrize("drawn", [0, 3, 8, 18, 31])
def test_a_resumed_stream_continues_with_the_very_same_clips(hub, monkeypatch, drawn):
    monkeypatch.setattr(sampling, "BLOCK", 8)
    [stream] = find_sources([f"hf:{hub}"])
    sampler = sampler_of(stream)
    words(sampler, drawn)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = words(sampler, 30)
    resumed = sampler_of(stream)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert words(resumed, 30) == expected


def test_processes_read_disjoint_parts(hub, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 10)
    [stream] = find_sources([f"hf:{hub}"])
    parts = [words(sampler_of(stream, rank=r, world=2), 10) for r in range(2)]
    assert len({*parts[0], *parts[1]}) == 20


def test_a_stream_beside_a_folder_gets_every_second_draw(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 12)
    own = source("own", [clip(put(tmp_path / f"{i}.wav"), "me", "en", "mine", 1.0) for i in range(3)])
    sampler = sampler_of(own, *find_sources([f"hf:{hub}"]))
    said = words(sampler, 12)
    assert said.count("mine") == 6
    assert set(said) - {"mine"} == {f"words {k // 5} {k % 5}" for k in range(6)}
    state = sampler.state_dict()
    expected = words(sampler, 9)
    sampler.load_state_dict(state)
    assert words(sampler, 9) == expected


def test_a_stream_is_packed_into_shards(hub, tmp_path):
    (tmp_path / "out").mkdir()
    [stream] = find_sources([f"hf:{hub}"])
    CutSet(stream.cuts).to_shar(tmp_path / "out", {"recording": "flac"})
    [found] = find_sources([str(tmp_path / "out")], cache=tmp_path / "cache", workers=0)
    assert sorted(found.cuts.texts()) == sorted(f"words {part} {i}" for part in range(4) for i in range(5))


def test_what_cannot_be_opened_is_a_sentence(tmp_path, hub):
    with pytest.raises(DataError, match=r"cannot be opened .*; check the name, the split and the connection"):
        find_sources([f"hf:{tmp_path / 'nowhere'}"])
    with pytest.raises(DataError, match="cannot be opened"):
        find_sources([f"hf:{hub}:test"])
    with pytest.raises(DataError, match="does not name a dataset"):
        find_sources(["hf:"])
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "set" / "train.parquet"))
    with pytest.raises(DataError, match="has no column of type Audio"):
        find_sources([f"hf:{tmp_path / 'set'}"])
