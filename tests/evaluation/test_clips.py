from __future__ import annotations

import json
import os
import sys

import pytest

from revox.evaluation.clips import Clip, find_clips, partners
from revox.evaluation.errors import EvaluationError


@pytest.fixture
def folder(tmp_path):
    for name in ("human/b.flac", "human/a.wav", "synthetic/c.mp3", "d.flac", "notes.txt", ".hidden/e.wav"):
        path = tmp_path / "clips" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "clips"


def test_a_folder_gives_stems_as_speakers_and_subfolders_as_groups(folder):
    found = [(c.name, c.speaker, c.group) for c in find_clips(folder)]
    assert found == [
        ("d.flac", "d", ""),
        ("human/a.wav", "a", "human"),
        ("human/b.flac", "b", "human"),
        ("synthetic/c.mp3", "c", "synthetic"),
    ]


def test_a_limit_is_for_each_group(folder):
    assert [c.name for c in find_clips(folder, limit=1)] == ["d.flac", "human/a.wav", "synthetic/c.mp3"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_manifest_in_the_folder_is_followed(folder, ending):
    entries = [
        {"file": "d.flac", "speaker": "Ada", "group": "human", "text": "Hello, you."},
        {"file": "human/b.flac"},
    ]
    if ending == "csv":
        text = 'file,speaker,group,text\nd.flac,Ada,human,"Hello, you."\nhuman/b.flac,,,\n'
    else:
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / f"manifest.{ending}").write_text(text)
    found = {c.name: (c.speaker, c.group, c.text) for c in find_clips(folder)}
    assert found == {"d.flac": ("Ada", "human", "Hello, you."), "human/b.flac": ("b", "", None)}


def test_transcripts_are_found_by_file_name_or_stem(folder, tmp_path):
    lines = tmp_path / "said.txt"
    lines.write_text("a GOOD MORNING\nb.flac\tGood evening.\n\nnobody\n")
    texts = {c.name: c.text for c in find_clips(folder, transcripts=lines)}
    assert texts["human/a.wav"] == "GOOD MORNING"
    assert texts["human/b.flac"] == "Good evening."
    assert texts["d.flac"] is None


@pytest.mark.parametrize("name", ["../outside.wav", "inside.wav"])
def test_nothing_outside_the_folder_is_read(tmp_path, name):
    (tmp_path / "outside.wav").write_bytes(b"")
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "inside.wav").symlink_to(tmp_path / "outside.wav")
    (folder / "manifest.csv").write_text(f"file\n{name}\n")
    with pytest.raises(EvaluationError, match="leads out of"):
        find_clips(folder)


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        ("file\nmissing.wav\n", "which is not in"),
        ("speaker\nAda\n", "names no file"),
        ("file\nd.flac\nd.flac\n", "twice"),
        ("file\nd\0.flac\n", "names no file|cannot be read"),
    ],
)
def test_a_wrong_manifest_is_a_sentence(folder, manifest, complaint):
    (folder / "manifest.csv").write_text(manifest)
    with pytest.raises(EvaluationError, match=complaint):
        find_clips(folder)


def test_transcripts_in_another_encoding_are_a_sentence(folder, tmp_path):
    path = tmp_path / "said.txt"
    for encoding in ("latin-1", "utf-16"):
        path.write_text("d.flac café", encoding=encoding)
        with pytest.raises(EvaluationError, match=r"said\.txt cannot be read .*not UTF-8 text"):
            find_clips(folder, transcripts=path)
    with pytest.raises(EvaluationError, match="Is a directory"):
        find_clips(folder, transcripts=tmp_path)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"file": "d.flac", "text": "\\ud800"}', '{"file": "d\\u0000"}', "7"]
)
def test_hostile_lines_of_a_manifest_are_a_sentence(folder, line):
    (folder / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(EvaluationError, match=r"manifest\.jsonl"):
        find_clips(folder)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_a_name_that_is_no_text_can_be_written_into_a_report(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.wav")).touch()
    (tmp_path / os.fsdecode(b"caf\xe8.wav")).touch()
    clips = find_clips(tmp_path)
    assert [clip.name for clip in clips] == ["caf\\xe8.wav", "caf\\xe9.wav"]
    assert all(clip.path.is_file() for clip in clips)


def test_a_folder_without_clips_is_a_sentence(tmp_path):
    with pytest.raises(EvaluationError, match="holds no audio files"):
        find_clips(tmp_path)
    with pytest.raises(EvaluationError, match="is not a folder"):
        find_clips(tmp_path / "nowhere")


def test_a_partner_is_another_speaker_of_the_same_group_if_there_is_one(tmp_path):
    def clip(name, speaker, group):
        return Clip(tmp_path / name, name, speaker, group)

    clips = [clip("1", "a", "x"), clip("2", "a", "x"), clip("3", "b", "y"), clip("4", "c", "x")]
    found = {name: other and other.name for name, other in partners(clips).items()}
    assert found == {"1": "4", "2": "4", "3": "4", "4": "1"}
    assert partners(clips[:2]) == {"1": None, "2": None}
