"""States of a build in small files."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from lab import LabError, carried
from lab.__main__ import app
from lab.carried import carry_state, take_up_state


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A build that has states of some size, logs, and much that can be made again."""
    monkeypatch.setattr(carried, "PART_BYTES", 1000)
    folder = tmp_path / "run"
    rng = np.random.default_rng(0)
    for name, size in (
        ("guide/guide-state.pt", 2500), ("guide/guide-log.jsonl", 70), ("guide/phones.npz", 30),
        ("decoder/decoder-state.pt", 3000), ("decoder/phones-state.pt", 1), ("decoder/decoder-log.jsonl", 0),
        ("guide/features-human-train.npy", 5000), ("guide/codes-human-train.npz", 5000),
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(size))
    return folder


KEPT = {
    "guide/guide-state.pt", "guide/guide-log.jsonl", "guide/phones.npz", "decoder/decoder-state.pt",
    "decoder/phones-state.pt", "decoder/decoder-log.jsonl",
}  # fmt: skip


def test_states_go_through_small_files_to_the_byte(run, tmp_path):
    made = carry_state(run, tmp_path / "state")
    assert set(made) == set((tmp_path / "state").iterdir())
    assert max(path.stat().st_size for path in made) <= 1000
    assert len(made) == 3 + 1 + 4 + 1  # parts and an index for each stage
    there = tmp_path / "there"
    assert take_up_state(tmp_path / "state", there) == ["guide", "decoder"]
    for name in KEPT:
        assert (there / name).read_bytes() == (run / name).read_bytes()
    assert {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()} == KEPT


def test_what_is_carried_is_the_last_state_and_one_that_is_there_is_left_alone(run, tmp_path):
    carry_state(run, tmp_path / "state")
    (run / "decoder" / "decoder-state.pt").write_bytes(b"later")
    carry_state(run, tmp_path / "state", ["decoder"])
    there = tmp_path / "there"
    (there / "guide").mkdir(parents=True)
    (there / "guide" / "guide-state.pt").write_bytes(b"gone on with")
    assert take_up_state(tmp_path / "state", there) == ["decoder"]
    assert [path.name for path in (there / "guide").iterdir()] == ["guide-state.pt"]
    assert (there / "guide" / "guide-state.pt").read_bytes() == b"gone on with"
    assert (there / "decoder" / "decoder-state.pt").read_bytes() == b"later"
    assert len(list((tmp_path / "state").glob("decoder.*.*"))) == 1
    assert len(list((tmp_path / "state").glob("guide.*.*"))) == 3


@pytest.mark.parametrize("harm", ["missing", "changed", "short"])
def test_parts_that_are_not_what_they_were_are_told_and_leave_nothing(run, tmp_path, harm):
    carry_state(run, tmp_path / "state")
    part = sorted((tmp_path / "state").glob("guide.*.001"))[0]
    whole = part.read_bytes()
    if harm == "missing":
        part.unlink()
    else:
        part.write_bytes(whole[:-1] if harm == "short" else b"x" + whole[1:])
    with pytest.raises(LabError, match="guide"):
        take_up_state(tmp_path / "state", tmp_path / "there")
    assert not (tmp_path / "there" / "guide").exists()


@pytest.mark.parametrize(
    "index",
    [
        "no json",
        "[]",
        json.dumps({"files": {"../guide-state.pt": 0}, "sha256": "", "parts": []}),
        json.dumps({"files": {"guide-state.pt": 1}, "sha256": "", "parts": ["../../secret"]}),
        json.dumps({"files": {"guide-state.pt": 1}, "sha256": "", "parts": ["/etc/passwd"]}),
        json.dumps({"files": {"guide-state.pt": -1}, "sha256": "", "parts": []}),
        json.dumps({"files": ["guide-state.pt"], "sha256": "", "parts": []}),
        json.dumps({"files": {"guide-state.pt": 1}, "parts": []}),
    ],
)
def test_a_strange_index_is_refused_before_anything_is_written(tmp_path, index):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "guide.json").write_text(index)
    with pytest.raises(LabError, match="is no index of a carried state"):
        take_up_state(tmp_path / "state", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_the_command_says_what_it_made_and_what_it_cannot(run, tmp_path):
    done = CliRunner().invoke(app, ["state", str(run), "--stage", "decoder"])
    assert done.exit_code == 0, done.output
    assert len(list((run / "state").iterdir())) == 5
    assert re.search(r"5 files, 0\.0 MB", done.stderr + done.stdout)
    for arguments, sentence in (
        ([str(run), "--stage", "speech"], "has no state: the stages are guide"),
        ([str(run), "--stage", "language"], "holds no state yet"),
        ([str(tmp_path / "nowhere")], "holds no state yet"),
    ):
        failed = CliRunner().invoke(app, ["state", *arguments]).exception
        assert isinstance(failed, LabError)
        assert sentence in str(failed)
    assert not (tmp_path / "nowhere").exists()
