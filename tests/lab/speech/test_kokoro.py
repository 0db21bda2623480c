from __future__ import annotations

import json

import numpy as np
import pytest

from lab.speech.kokoro import RATE, Spoken, generate, read_index, remaining
from lab.speech.plan import PlannedUtterance, Speaker

SPEAKERS = {"a": Speaker("a", "train", False, {"af_x": 1.0}, 1.0, 1.0)}
PLAN = [PlannedUtterance(n, "a", written) for n, written in enumerate(["One two.", "Three.", "Four."])]


def _speak(speaker: Speaker, written: str) -> Spoken:
    return Spoken(np.zeros(RATE * len(written.split()), np.float32), written.lower())


def _write(path, samples):
    path.write_bytes(b"sound")


def _run(out, items):
    return list(generate(items, SPEAKERS, _speak, _write, out))


def test_each_utterance_has_a_file_and_a_line_of_the_index(tmp_path):
    assert _run(tmp_path, PLAN) == [2.0, 1.0, 1.0]
    index = read_index(tmp_path)
    assert index[0] == {
        "file": "00000.opus",
        "speaker": "a",
        "text": "one two",
        "written": "One two.",
        "phonemes": "one two.",
        "seconds": 2.0,
        "kind": "plan",
    }
    assert sorted(path.name for path in (tmp_path / "audio").iterdir()) == [
        line["file"] for line in index.values()
    ]


def test_a_stopped_run_resumes_with_what_its_index_lacks(tmp_path):
    made = generate(PLAN, SPEAKERS, _speak, _write, tmp_path)
    next(made)
    made.close()
    left = remaining(PLAN, [read_index(tmp_path)], tmp_path)
    assert left == PLAN[1:]
    _run(tmp_path, left)
    assert remaining(PLAN, [read_index(tmp_path)], tmp_path) == []


def test_speech_of_another_folder_is_not_made_again(tmp_path):
    _run(tmp_path / "first", PLAN[:2])
    indices = [read_index(tmp_path / "second"), read_index(tmp_path / "first")]
    assert remaining(PLAN, indices, tmp_path / "second") == PLAN[2:]


def test_a_line_that_is_cut_off_is_not_read_and_the_file_stays_as_its_writer_left_it(tmp_path):
    _run(tmp_path, PLAN[:2])
    path = tmp_path / "index.jsonl"
    cut = path.read_bytes()[:-10]
    path.write_bytes(cut)
    assert list(read_index(tmp_path)) == [0]
    assert path.read_bytes() == cut


def test_the_utterance_of_a_line_that_was_cut_off_is_made_again(tmp_path):
    _run(tmp_path, PLAN[:2])
    path = tmp_path / "index.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    left = remaining(PLAN, [read_index(tmp_path)], tmp_path)
    assert left == PLAN[1:]
    _run(tmp_path, left)
    assert [json.loads(line)["file"] for line in path.read_text().splitlines()] == [
        item.file for item in PLAN
    ]


def test_a_folder_of_another_plan_is_refused(tmp_path):
    _run(tmp_path, PLAN[:1])
    other = [PlannedUtterance(0, "a", "Another.")]
    with pytest.raises(ValueError, match=r"utterance 0 is 'Another.' by a in the plan and 'One two.' by a"):
        remaining(other, [read_index(tmp_path)], tmp_path)
