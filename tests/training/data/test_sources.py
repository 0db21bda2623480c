"""Folders of every layout become clips; an index reads each header once."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, MonoCut

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import clip, put

import revox.training.data.sources as sources_module
from revox.training.data import DataError, Manifest, find_sources
from revox.training.data.manifest import cut_source
from revox.training.errors import TrainingError

REAL = Path(__file__).parent.parent.parent / "speech" / "clips"


def clips_of(folder: Path, cache: Path) -> dict[str, MonoCut]:
    source = find_sources([str(folder)], cache=cache, workers=0)[0]
    return {os.path.relpath(cut_source(cut), folder): cut for cut in source.cuts}


def facts(cut: MonoCut) -> tuple:
    said = cut.supervisions[0]
    return said.speaker, said.language, said.text


def test_a_plain_folder_takes_the_folder_above_or_the_stem_as_speaker_and_the_words_beside(tmp_path):
    root = tmp_path / "mine"
    put(root / "ada" / "1.wav")
    (root / "ada" / "1.txt").write_text("one\n two ")
    put(root / "cy" / "long" / "2.flac", seconds=0.5, rate=16000)
    (root / "cy" / "long" / "2.lab").write_text("three")
    put(root / "bob-001.wav")
    (root / "notes.txt").write_text("not a clip")
    (root / ".hidden").mkdir()
    put(root / ".hidden" / "3.wav")
    found = clips_of(root, tmp_path / "cache")
    assert {key: facts(cut) for key, cut in found.items()} == {
        "ada/1.wav": ("mine/ada", None, "one two"),
        "cy/long/2.flac": ("mine/cy/long", None, "three"),
        "bob-001.wav": ("mine/bob", None, None),
    }
    assert found["cy/long/2.flac"].duration == pytest.approx(0.5)
    assert found["cy/long/2.flac"].sampling_rate == 16000


def test_libri_layouts_give_readers_and_words_and_one_reader_is_one_speaker_in_both(tmp_path):
    root = tmp_path / "all"
    chapter = root / "LibriSpeech" / "dev" / "84" / "121"
    put(chapter / "84-121-0000.flac")
    put(chapter / "84-121-0001.flac")
    (chapter / "84-121.trans.txt").write_text("84-121-0000 GO DO YOU HEAR\n84-121-0001 IT'S SO\n")
    libritts = root / "LibriTTS_R" / "dev" / "84" / "121"
    put(libritts / "84_121_000007_000000.wav")
    (libritts / "84_121_000007_000000.original.txt").write_text("Nr. 5, he said.")
    (libritts / "84_121_000007_000000.normalized.txt").write_text("Number five, he said.")
    found = clips_of(root, tmp_path / "cache")
    assert {Path(key).name: facts(cut) for key, cut in found.items()} == {
        "84-121-0000.flac": ("librispeech-84", "en", "go do you hear"),
        "84-121-0001.flac": ("librispeech-84", "en", "it's so"),
        "84_121_000007_000000.wav": ("librispeech-84", "en", "Number five, he said."),
    }


def test_flat_clips_of_librispeech_have_their_readers(tmp_path):
    found = clips_of(REAL, tmp_path)
    assert facts(found["103-1240-0000.flac"])[0] == "librispeech-103"
    assert found["103-1240-0000.flac"].sampling_rate == 16000


def test_a_corpus_like_libri_in_another_language_keeps_reader_but_not_english(tmp_path):
    put(tmp_path / "mls_german" / "audio" / "10148" / "10119" / "10148_10119_000000.opus", rate=48000)
    [cut] = clips_of(tmp_path / "mls_german", tmp_path / "cache").values()
    assert facts(cut)[:2] == ("mls_german/audio/10148", None)


def test_common_voice_gives_what_its_list_of_valid_clips_says(tmp_path):
    root = tmp_path / "cv" / "de"
    for name in ("a.mp3", "b.mp3", "bad.mp3"):
        put(root / "clips" / name, seconds=0.3)
    head = "client_id\tpath\tsentence\tup_votes\tlocale\n"
    (root / "validated.tsv").write_text(
        head + f'{"f" * 100}1\ta.mp3\tEr sagte "ja".\t2\tde\n{"0" * 100}\tb.mp3\tNein.\t2\tde\n'
    )
    (root / "train.tsv").write_text(head + "x\tbad.mp3\tnicht\t0\tde\n")
    assert {key: facts(cut) for key, cut in clips_of(root.parent, tmp_path / "cache").items()} == {
        "de/clips/a.mp3": (f"commonvoice-{'f' * 16}", "de", 'Er sagte "ja".'),
        "de/clips/b.mp3": (f"commonvoice-{'0' * 16}", "de", "Nein."),
    }


def test_layouts_side_by_side_are_combined_and_circles_of_links_end(tmp_path):
    root = tmp_path / "mix"
    put(root / "plain" / "x.wav")
    put(root / "libri" / "1" / "2" / "1-2-0003.flac")
    put(root / "cv" / "clips" / "c.mp3")
    (root / "cv" / "train.tsv").write_text("client_id\tpath\tsentence\tlocale\nz\tc\tHi.\tcy\n")
    (root / "plain" / "again").symlink_to(root)
    speakers = {facts(cut)[0] for cut in clips_of(root, tmp_path / "cache").values()}
    assert speakers == {"mix/plain", "librispeech-1", "commonvoice-z"}


def test_broken_files_are_listed_with_a_reason_and_do_not_stop_the_rest(tmp_path):
    root = tmp_path / "speech"
    put(root / "good.wav")
    (root / "text.wav").write_text("this is no audio")
    (root / "empty.flac").write_bytes(b"")
    (root / "gone.mp3").symlink_to(root / "nowhere.mp3")
    for _ in range(2):
        [source] = find_sources([str(root)], cache=tmp_path / "cache", workers=0)
        assert [cut.id for cut in source.cuts] == ["speech/good.wav"]
        reasons = {Path(path).name: reason for path, reason in source.broken}
        assert set(reasons) == {"text.wav", "empty.flac", "gone.mp3"}
        assert "is empty" in reasons["empty.flac"]
        assert "not an audio" in reasons["text.wav"]


def test_nothing_to_find_is_a_sentence(tmp_path):
    (tmp_path / "x.wav").write_text("no")
    with pytest.raises(DataError, match=r"holds no audio that can be used .1 files cannot be read"):
        find_sources([str(tmp_path)], cache=tmp_path / "cache", workers=0)
    with pytest.raises(DataError, match="is not a folder"):
        find_sources([str(tmp_path / "nowhere")], cache=tmp_path / "cache")
    with pytest.raises(DataError, match="no speech is named"):
        find_sources([])


def test_only_new_and_changed_files_are_read_again(tmp_path, monkeypatch):
    root, cache = tmp_path / "s", tmp_path / "cache"
    for i in range(4):
        put(root / "a" / f"{i}.wav")
    (root / "a" / "3.txt").write_text("before")
    read: list[str] = []
    inner = sources_module._read_one

    def counting(one):
        read.append(os.path.relpath(one.name, root))
        return inner(one)

    monkeypatch.setattr(sources_module, "_read_one", counting)
    clips_of(root, cache)
    assert len(read) == 4
    read.clear()
    assert len(clips_of(root, cache)) == 4
    assert read == []
    put(root / "a" / "1.wav", seconds=2.0)
    put(root / "b" / "new.wav")
    (root / "a" / "2.wav").unlink()
    (root / "a" / "3.txt").write_text("after it")
    found = clips_of(root, cache)
    assert sorted(read) == ["a/1.wav", "a/3.wav", "b/new.wav"]
    assert sorted(found) == ["a/0.wav", "a/1.wav", "a/3.wav", "b/new.wav"]
    assert found["a/1.wav"].duration == pytest.approx(2.0)
    assert facts(found["a/3.wav"])[2] == "after it"
    read.clear()
    clips_of(root, cache)
    assert read == []


def test_an_interrupted_index_goes_on_and_a_damaged_one_is_made_anew(tmp_path, monkeypatch):
    root, cache = tmp_path / "s", tmp_path / "cache"
    for i in range(6):
        put(root / f"{i}.wav", seconds=0.1)
    monkeypatch.setattr(sources_module, "_CHUNK", 2)
    inner, read = sources_module._read_one, []

    def stopped(one):
        read.append(Path(one.name).name)
        if len(read) == 5:
            raise KeyboardInterrupt
        return inner(one)

    monkeypatch.setattr(sources_module, "_read_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        clips_of(root, cache)
    assert len(clips_of(root, cache)) == 6
    assert read[5:] == ["4.wav", "5.wav"]  # the four before were kept
    [path] = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert len(clips_of(root, cache)) == 6


def test_an_interrupted_listing_forgets_nothing_that_was_known(tmp_path, monkeypatch):
    root, cache = tmp_path / "s", tmp_path / "cache"
    for i in range(6):
        put(root / f"{i}.wav", seconds=0.1)
    clips_of(root, cache)
    monkeypatch.setattr(sources_module, "_CHUNK", 2)

    def stop(progress):
        raise KeyboardInterrupt

    put(root / "new.wav", seconds=0.1)
    with pytest.raises(KeyboardInterrupt):
        find_sources([str(root)], cache=cache, workers=0, progress=stop)
    read = []
    inner = sources_module._read_one
    monkeypatch.setattr(sources_module, "_read_one", lambda one: read.append(one.name) or inner(one))
    assert len(clips_of(root, cache)) == 7
    assert [Path(name).name for name in read] == ["new.wav"]


def test_workers_find_what_one_process_finds_and_progress_is_told(tmp_path, monkeypatch):
    root = tmp_path / "s"
    for i in range(8):
        put(root / f"{i % 3}" / f"{i}.wav", seconds=0.1 + i / 10)
    monkeypatch.setattr(sources_module, "_CHUNK", 2)
    steps = []
    alone = find_sources([str(root)], cache=tmp_path / "one", workers=0, progress=steps.append)[0]
    assert [(step.what, step.done) for step in steps] == [("indexing s", n) for n in (2, 4, 6, 8)]
    shared = find_sources([str(root)], cache=tmp_path / "two", workers=2)[0]
    assert list(alone.cuts) == list(shared.cuts)


def test_the_order_of_a_folder_does_not_depend_on_what_was_indexed_before(tmp_path):
    root = tmp_path / "s"
    for i in range(4):
        put(root / f"b{i}" / "1.wav", seconds=0.1)
    clips_of(root, tmp_path / "grown")
    for i in range(4):
        put(root / f"a{i}" / "1.wav", seconds=0.1)
    [grown] = find_sources([str(root)], cache=tmp_path / "grown", workers=0)
    [fresh] = find_sources([str(root)], cache=tmp_path / "fresh", workers=0)
    assert list(grown.cuts) == list(fresh.cuts)
    assert grown.cuts.speakers == fresh.cuts.speakers
    assert (grown.cuts.rows["speaker"] == fresh.cuts.rows["speaker"]).all()


def test_lhotse_reads_the_index_and_the_audio_of_its_cuts(tmp_path):
    put(tmp_path / "s" / "ada" / "1.flac", seconds=0.5, rate=16000)
    (tmp_path / "s" / "ada" / "1.txt").write_text("hello")
    clips_of(tmp_path / "s", tmp_path / "cache")
    [index] = (tmp_path / "cache").iterdir()
    [cut] = CutSet.from_jsonl_lazy(index)
    assert facts(cut) == ("s/ada", None, "hello")
    assert cut.load_audio().shape == (1, 8000)


def test_without_lhotse_it_says_what_to_install(monkeypatch):
    manifest = Manifest.of([clip("/x/a.wav")])
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(TrainingError, match=r"needs the library `lhotse`; install it with `pip"):
        manifest[0]


def test_a_manifest_gives_back_the_cuts_it_was_made_of():
    clips = [
        clip("/x/é ü.wav", "s1", "de", "schön", 1.5, 24000),
        clip("/x/b.wav", "s2"),
        clip("/x/c.wav", "s1", "en", None, 0.0, 8000),
    ]
    manifest, cuts = Manifest.of(clips), [MonoCut.from_dict(Manifest.of([one])[0].to_dict()) for one in clips]
    assert list(manifest) == cuts
    assert manifest[-1] == cuts[-1]
    assert list(manifest.take(np.array([2, 0]))) == [cuts[2], cuts[0]]
    assert list(manifest.take(np.array([False, True, False]))) == [cuts[1]]
    assert list(manifest.texts()) == ["schön"]
    assert [manifest.speakers[i] for i in manifest.rows["speaker"]] == ["s1", "s2", "s1"]
    with pytest.raises(IndexError):
        manifest[3]


def test_a_common_voice_list_cannot_name_files_outside_its_clips(tmp_path):
    root = tmp_path / "cv"
    put(root / "clips" / "a.wav")
    put(tmp_path / "secret.wav")
    (root / "validated.tsv").write_text(
        f"client_id\tpath\tsentence\nx\ta.wav\t\nx\t../../secret.wav\t\nx\t{tmp_path / 'secret.wav'}\t\n"
    )
    assert list(clips_of(root, tmp_path / "cache")) == ["clips/a.wav"]


def test_a_saved_dataset_is_a_source_with_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(put(tmp_path / "files" / f"{i}.wav", 200 + 100 * i, 0.5)) for i in range(3)]
    rows = {"speech": files, "speaker_id": [7, 7, 9], "sentence": ["a", "b", None], "locale": ["cs"] * 3}
    data = datasets.Dataset.from_dict(rows).cast_column("speech", datasets.Audio(decode=False))
    embedded = data.map(
        lambda row: {"speech": {"bytes": Path(row["speech"]["path"]).read_bytes(), "path": None}}
    )
    datasets.DatasetDict(train=embedded).save_to_disk(str(tmp_path / "both" / "saved"))
    shutil.rmtree(tmp_path / "files")
    put(tmp_path / "both" / "plain" / "z.wav")
    found = clips_of(tmp_path / "both", tmp_path / "cache")
    rows = [cut for key, cut in sorted(found.items()) if "@row" in key]
    assert [facts(cut) for cut in rows] == [
        ("both/saved/train/7", "cs", "a"),
        ("both/saved/train/7", "cs", "b"),
        ("both/saved/train/9", "cs", None),
    ]
    assert [cut.duration for cut in rows] == pytest.approx([0.5] * 3)
    assert len(found) == 4

    from revox.training.data.loading import decode_cut
    from revox.training.data.locate import audio_source

    samples, whole, _ = decode_cut(audio_source(cut_source(rows[1])), 0.0, 0.5, 1.0, 24000)
    assert whole
    assert np.abs(np.fft.rfft(samples)).argmax() == pytest.approx(300 * 0.5, abs=1)
