"""The first hour: every step once, failures reported, nothing personal, and it goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from revox.cli.main import build_app
from revox.demo.demo import CONSENT, EXAMPLES, REFERENCE
from revox.doctor import first_hour as module
from revox.doctor.first_hour import FirstHour, first_hour
from revox.marking import verify_file

pytestmark = pytest.mark.usefixtures("one_thread")


def hour_of(folder: Path) -> FirstHour:
    return FirstHour(
        folder, "a checkpoint", EXAMPLES / REFERENCE, CONSENT, sentences=8, steps=4, minutes=0.5, device="cpu"
    )


@pytest.fixture
def quick(monkeypatch) -> list[str]:
    """Stands in for the long steps; notes which were taken."""
    taken: list[str] = []

    def doctor(self) -> dict:
        taken.append("doctor")
        heard = self.request.recognizer == "none" and self.request.dtype is None
        return {"verdict": "pass" if heard else "fail", "checks": {}}

    def student(self) -> dict:
        taken.append("student")
        if taken.count("student") == 1:
            raise ValueError(f"the student learned too little in {self.out}")
        return {"agreement": 0.5}

    monkeypatch.setattr(module._Hour, "doctor", doctor)
    monkeypatch.setattr(module._Hour, "student", student)
    return taken


def test_a_step_that_fails_is_reported_and_is_all_that_is_done_again(
    tiny_checkpoint_with_encoder, tmp_path, quick
):
    out = tmp_path / "hour"
    report, failed = first_hour(hour_of(tiny_checkpoint_with_encoder), out)
    assert failed == ["student"]
    facts = json.loads((out / "first-hour.json").read_text())["stages"]
    assert [name for name, step in facts.items() if not step["done"]] == ["student"]
    assert facts["inspect"]["encoder"] == "complete"
    spoken = facts["clone and speak"]
    assert spoken["method"] == "encoder"
    assert len(spoken["spoken"]) == 4
    assert verify_file(out / "decoded.wav").state == "marked"
    assert not any(path.suffix in (".safetensors", ".pt") for path in out.rglob("*"))
    text = report.read_text() + (out / "first-hour.json").read_text()
    assert "the student learned too little" in text
    assert str(tmp_path) not in text
    assert str(tiny_checkpoint_with_encoder.parent) not in text

    assert first_hour(hour_of(tiny_checkpoint_with_encoder), out)[1] == []
    assert quick == ["doctor", "student", "student"]
    assert all(step["done"] for step in json.loads((out / "first-hour.json").read_text())["stages"].values())


def test_the_command_says_what_it_will_take(tiny_checkpoint_with_encoder, tmp_path, quick):
    out = tmp_path / "hour"
    given = [
        "doctor",
        str(tiny_checkpoint_with_encoder),
        "--first-hour",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    failed = CliRunner().invoke(build_app(), [*given, "--sentences", "8"])
    assert failed.exit_code == 1  # its first student fails
    assert "failed: student" in failed.output
    done = CliRunner().invoke(build_app(), [*given, "--sentences", "8"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "for the student here" in done.output
    assert (out / "first-hour.md").read_text().startswith("# The first hour with checkpoint")


def test_another_checkpoint_or_recognizer_is_examined_anew_and_a_later_student_clones_anew(
    tiny_checkpoint_with_encoder, tmp_path, quick
):
    folder, out = tmp_path / "checkpoint", tmp_path / "hour"
    shutil.copytree(tiny_checkpoint_with_encoder, folder)
    request = hour_of(folder)
    assert first_hour(request, out)[1] == ["student"]
    (out / "decoded.wav").unlink()
    assert first_hour(request, out)[1] == []
    assert (out / "decoded.wav").is_file(), "cloned again, by the student"
    assert quick == ["doctor", "student", "student"]
    assert first_hour(request, out)[1] == []
    clip = tmp_path / "other.flac"
    shutil.copy(next(path for path in EXAMPLES.glob("*.flac") if path.name != REFERENCE), clip)
    (out / "decoded.wav").unlink()
    assert first_hour(replace(request, clip=clip), out)[1] == []
    assert (out / "decoded.wav").is_file(), "another clip is cloned"
    assert quick == ["doctor", "student", "student"], "and nothing else is done again"
    (folder / "tekken.json").write_text((folder / "tekken.json").read_text() + "\n")
    first_hour(request, out)
    first_hour(replace(request, recognizer="pocketsphinx"), out)
    assert quick == ["doctor", "student", "student"] + ["doctor", "student"] * 2


def test_a_check_that_fails_is_a_failed_command_and_options_are_passed_on(
    tiny_checkpoint_with_encoder, tmp_path, quick, monkeypatch
):
    quick.append("student")  # the next one does not fail
    given = [
        "doctor",
        str(tiny_checkpoint_with_encoder),
        "--first-hour",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    done = CliRunner().invoke(build_app(), [*given, "--out", str(tmp_path / "hour")])
    assert done.exit_code == 1, (done.output, done.exception)
    assert "failed: doctor (a check failed)" in done.output
    for option in (["--sounds"], ["--seed", "1"]):
        refused = CliRunner().invoke(build_app(), [*given, *option, "--out", str(tmp_path / "hour")])
        assert "leave --voices, --sounds and --seed out" in str(refused.exception)
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(build_app(), given)  # without --out a folder that is the same tomorrow
    assert (tmp_path / f"revox-doctor-{tiny_checkpoint_with_encoder.name}" / "first-hour.json").is_file()
