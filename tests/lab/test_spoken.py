"""Codes of speech in small files."""

import json

import numpy as np
import pytest

from lab import spoken
from lab.errors import LabError
from lab.sources import SPEECH
from lab.speech.kokoro import remaining
from lab.speech.plan import read_plan


def codes(seed: int, frames: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, 512, (1, frames)), rng.integers(0, 21, (36, frames)))
    return np.concatenate(drawn).astype(np.int16)


@pytest.fixture(scope="module")
def plan():
    return read_plan(SPEECH / "plan.tsv")[:6]


def test_codes_come_back_as_they_were_and_more_can_be_added(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(spoken, "_PER_FILE", 8)
    assert spoken.add_codes(tmp_path, "0a0a0a0a", [(i, codes(i.number), 0.4) for i in plan[:3]]) == (3, 3)
    again = [(i, codes(i.number + 100), 0.4) for i in plan[2:5]]  # what is there stays
    assert spoken.add_codes(tmp_path, "0a0a0a0a", again) == (2, 5)
    found = spoken.read_codes(tmp_path, "0a0a0a0a")
    assert sorted(found) == sorted(i.number for i in plan[:5])
    for n, item in enumerate(plan[:5]):
        assert found[item.number].dtype == np.int16
        assert np.array_equal(found[item.number], codes(item.number + (0 if n < 3 else 100)))
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_the_synthesizer_leaves_out_what_has_codes(plan, tmp_path):
    spoken.add_codes(tmp_path, "0a0a0a0a", [(i, codes(i.number), 0.4) for i in plan[:4]])
    assert remaining(plan, [spoken.read_index(tmp_path)], tmp_path / "out") == plan[4:]


def test_codes_of_another_encoder_are_not_read_and_not_overwritten(plan, tmp_path):
    spoken.add_codes(tmp_path, "0a0a0a0a", [(i, codes(i.number), 0.4) for i in plan[:4]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert spoken.read_codes(tmp_path, "0b0b0b0b") == {}
    with pytest.raises(LabError, match="another encoder"):
        spoken.add_codes(tmp_path, "0b0b0b0b", [(plan[5], codes(1), 0.4)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    lines = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [item.file for item in plan[:4]]


def test_a_damaged_file_gets_a_sentence(plan, tmp_path):
    spoken.add_codes(tmp_path, "0a0a0a0a", [(plan[0], codes(1), 0.4)])
    path = tmp_path / "0a0a0a0a.000.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LabError, match="does not hold codes"):
        spoken.read_codes(tmp_path, "0a0a0a0a")
