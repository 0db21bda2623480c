"""Datasets of the hub are sources like folders: indexed once, and read by row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import put

from revox.training.data import ClipBatches, ClipSampler, DataError, SpeechSource, find_sources

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


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def from_hub(hub, tmp_path) -> SpeechSource:
    [found] = find_sources([f"hf:{hub}"], cache=tmp_path / "cache", workers=0)
    return found


def test_a_dataset_is_a_source_with_what_its_columns_say_and_is_decoded(hub, tmp_path):
    found = from_hub(hub, tmp_path)
    assert found.name == f"hf:{hub}"
    said = {cut.supervisions[0].text: cut for cut in found.cuts}
    assert set(said) == {f"words {part} {i}" for part in range(4) for i in range(5)}
    one = said["words 1 2"]
    assert (one.supervisions[0].speaker, one.supervisions[0].language) == (f"hf:{hub}/1", "nl")
    assert one.duration == pytest.approx(0.3)
    sampler = ClipSampler([found], seconds=1.0, batch=4, seed=1)
    with ClipBatches(sampler, 24000, workers=0) as loader:
        assert next(loader).lengths.tolist() == [7200] * 4


def test_a_dataset_is_indexed_once(hub, tmp_path, monkeypatch):
    first = from_hub(hub, tmp_path)
    monkeypatch.setattr("revox.speech.audio_header", lambda source: pytest.fail("read again"))
    assert list(from_hub(hub, tmp_path).cuts) == list(first.cuts)


def test_a_row_without_audio_is_listed_as_broken(hub, tmp_path):
    rows = {"audio": [{"bytes": None, "path": None}, *([{"bytes": (hub.parent / "tone.wav").read_bytes()}])]}
    whole = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    whole.to_parquet(str(tmp_path / "set" / "train.parquet"))
    found = from_hub(tmp_path / "set", tmp_path)
    assert len(found.cuts) == 1
    assert [reason for _, reason in found.broken] == ["a row has no audio; remove it from the dataset"]


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
