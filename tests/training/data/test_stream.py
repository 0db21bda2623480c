"""Datasets that are streamed: read on exactly where they were, shared out, mixed with folders."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import put

from revox.training.data import Clip, ClipSampler, DataError, Source, clip_batches, find_sources, pack
from revox.training.data.stream import ClipStream

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


def small_blocks(source: Source) -> Source:
    """The same stream, shuffled in blocks of 4."""
    return Source(source.name, ClipStream(source.clips.name, source.clips.opened, block=4))


def words(sampler, count: int) -> list[str]:
    return [draw.clip.transcript for draw in islice(sampler, count)]


def test_a_dataset_is_streamed_with_what_its_columns_say_and_decoded(hub):
    [source] = find_sources([f"hf:{hub}"])
    clips = list(source.clips)
    assert len(clips) == 20
    assert (clips[7].speaker, clips[7].language, clips[7].transcript) == (f"hf:{hub}/1", "nl", "words 1 2")
    with clip_batches(ClipSampler([source], seed=0), seconds=1, rate=24000, batch=4, workers=0) as loader:
        assert loader.__next__().lengths.tolist() == [7200] * 4


def test_a_round_has_every_clip_once_shuffled_in_blocks_and_the_next_another_order(hub):
    sampler = ClipSampler([small_blocks(find_sources([f"hf:{hub}"])[0])], seed=1)
    stored = [f"words {part} {i}" for part in range(4) for i in range(5)]
    first, second = words(sampler, 20), words(sampler, 20)
    assert sorted(first) == sorted(second) == stored
    assert first != stored
    assert first != second
    assert [sorted(first[k : k + 4]) for k in range(0, 20, 4)] == [stored[k : k + 4] for k in range(0, 20, 4)]


@pytest.mark.parametrize("drawn", [0, 3, 4, 18, 23])
def test_a_resumed_stream_goes_on_with_the_very_same_clips(hub, drawn):
    source = small_blocks(find_sources([f"hf:{hub}"])[0])
    sampler = ClipSampler([source], seed=1)
    words(sampler, drawn)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = words(sampler, 30)
    resumed = ClipSampler([source], seed=1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert words(resumed, 30) == expected


def test_processes_read_disjoint_parts(hub):
    source = small_blocks(find_sources([f"hf:{hub}"])[0])
    parts = [words(ClipSampler([source], seed=1, rank=r, world=2), 10) for r in range(2)]
    assert len({*parts[0], *parts[1]}) == 20


def test_a_stream_beside_a_folder_gets_its_turn(hub, tmp_path):
    own = Source("own", [Clip(str(put(tmp_path / f"{i}.wav")), "me", "en", "mine", 1.0) for i in range(3)])
    sampler = ClipSampler([own, small_blocks(find_sources([f"hf:{hub}"])[0])], seed=1)
    said = words(sampler, 24)
    assert [one == "mine" for one in said] == [True, False] * 12
    state = sampler.state_dict()
    expected = words(sampler, 9)
    sampler.load_state_dict(state)
    assert words(sampler, 9) == expected


def test_a_stream_is_packed_into_shards(hub, tmp_path):
    packed = pack(find_sources([f"hf:{hub}"]), tmp_path / "out", codec="flac", workers=0)
    assert packed.clips == 20
    [found] = find_sources([str(tmp_path / "out")], cache=tmp_path / "cache", workers=0)
    assert [clip.transcript for clip in found.clips][:6] == [f"words {k // 5} {k % 5}" for k in range(6)]


def test_what_cannot_be_opened_is_a_sentence(tmp_path, hub):
    with pytest.raises(DataError, match=r"cannot be opened .*; check the name, the split and the connection"):
        find_sources([f"hf:{tmp_path / 'nowhere'}"])
    with pytest.raises(DataError, match="cannot be opened"):
        find_sources([f"hf:{hub}:test"])
    with pytest.raises(DataError, match="names no dataset"):
        find_sources(["hf:"])
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "set" / "train.parquet"))
    with pytest.raises(DataError, match="has no column of type Audio"):
        find_sources([f"hf:{tmp_path / 'set'}"])
