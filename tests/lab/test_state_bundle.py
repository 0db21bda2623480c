"""States of a build in small files."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from lab import LabError, state_bundle
from lab.__main__ import app
from lab.state_bundle import restore_bundles, write_bundles


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A build that has states of some size, logs, and much that can be made again."""
    monkeypatch.setattr(state_bundle, "PART_BYTES", 1000)
    folder = tmp_path / "run"
    rng = np.random.default_rng(0)
    for name, size in (
        ("teacher/teacher-state.pt", 2500), ("teacher/teacher-log.jsonl", 70),
        ("decoder/decoder-state.pt", 3000), ("decoder/decoder-log.jsonl", 0),
        ("teacher/features-human-train.npy", 5000), ("teacher/codes-human-train.cache", 5000),
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(size))
    return folder


BUNDLED = {
    "teacher/teacher-state.pt", "teacher/teacher-log.jsonl", "decoder/decoder-state.pt",
    "decoder/decoder-log.jsonl",
}  # fmt: skip


def test_states_go_through_small_files_to_the_byte(run, tmp_path):
    made = write_bundles(run, tmp_path / "state")
    assert set(made) == set((tmp_path / "state").iterdir())
    assert max(path.stat().st_size for path in made) <= 1000
    assert len(made) == 3 + 1 + 3 + 1  # parts and an index for each stage
    there = tmp_path / "there"
    assert restore_bundles(tmp_path / "state", there) == ["teacher", "decoder"]
    for name in BUNDLED:
        assert (there / name).read_bytes() == (run / name).read_bytes()
    assert {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()} == BUNDLED


def test_the_last_state_is_bundled_and_an_existing_one_is_left_alone(run, tmp_path):
    write_bundles(run, tmp_path / "state")
    (run / "decoder" / "decoder-state.pt").write_bytes(b"later")
    write_bundles(run, tmp_path / "state", ["decoder"])
    there = tmp_path / "there"
    (there / "teacher").mkdir(parents=True)
    (there / "teacher" / "teacher-state.pt").write_bytes(b"gone on with")
    assert restore_bundles(tmp_path / "state", there) == ["decoder"]
    assert [path.name for path in (there / "teacher").iterdir()] == ["teacher-state.pt"]
    assert (there / "teacher" / "teacher-state.pt").read_bytes() == b"gone on with"
    assert (there / "decoder" / "decoder-state.pt").read_bytes() == b"later"
    assert len(list((tmp_path / "state").glob("decoder.*.*"))) == 1
    assert len(list((tmp_path / "state").glob("teacher.*.*"))) == 3


@pytest.mark.parametrize("harm", ["missing", "changed", "short"])
def test_a_damaged_part_is_reported_and_nothing_is_restored(run, tmp_path, harm):
    write_bundles(run, tmp_path / "state")
    part = sorted((tmp_path / "state").glob("teacher.*.001"))[0]
    whole = part.read_bytes()
    if harm == "missing":
        part.unlink()
    else:
        part.write_bytes(whole[:-1] if harm == "short" else b"x" + whole[1:])
    with pytest.raises(LabError, match="teacher"):
        restore_bundles(tmp_path / "state", tmp_path / "there")
    assert not (tmp_path / "there" / "teacher").exists()


@pytest.mark.parametrize(
    "index",
    [
        "no json",
        "[]",
        json.dumps({"files": {"../teacher-state.pt": 0}, "sha256": "", "parts": []}),
        json.dumps({"files": {"teacher-state.pt": 1}, "sha256": "", "parts": ["../../secret"]}),
        json.dumps({"files": {"teacher-state.pt": 1}, "sha256": "", "parts": ["/etc/passwd"]}),
        json.dumps({"files": {"teacher-state.pt": -1}, "sha256": "", "parts": []}),
        json.dumps({"files": ["teacher-state.pt"], "sha256": "", "parts": []}),
        json.dumps({"files": {"teacher-state.pt": 1}, "parts": []}),
    ],
)
def test_an_invalid_index_is_refused_before_anything_is_written(tmp_path, index):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "teacher.json").write_text(index)
    with pytest.raises(LabError, match="is not the index of a state bundle"):
        restore_bundles(tmp_path / "state", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_the_command_says_what_it_wrote_and_what_it_cannot_do(run, tmp_path):
    done = CliRunner().invoke(app, ["state", str(run), "--stage", "decoder"])
    assert done.exit_code == 0, done.output
    assert len(list((run / "state").iterdir())) == 4
    assert re.search(r"4 files, 0\.0 MB", done.stderr + done.stdout)
    for arguments, sentence in (
        (
            [str(run), "--stage", "speech"],
            "decoder, finish, language, tune: 'speech' is not one of them",
        ),
        ([str(run), "--stage", "guide"], "'guide' is now 'teacher'"),
        ([str(run), "--stage", "language"], "holds no state yet"),
        ([str(tmp_path / "nowhere")], "holds no state yet"),
    ):
        failed = CliRunner().invoke(app, ["state", *arguments]).exception
        assert isinstance(failed, LabError)
        assert sentence in str(failed)
    assert not (tmp_path / "nowhere").exists()
