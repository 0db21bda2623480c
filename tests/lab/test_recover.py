"""The recovery experiment in miniature: guards, equal time, resuming, scores, goals."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import preset_codes, tiny_model, write_checkpoint
from lab import __main__ as lab_command
from lab import recover_scores, recover_tables
from lab.data import write_set
from lab.errors import LabError
from lab.recover import (
    LOG_FILE,
    MEASURED_STEPS,
    Experiment,
    Log,
    Plan,
    _clock,
    _Recovery,
    process_command,
    process_environment,
    recover,
)
from lab.recover_arms import (
    ARMS,
    DISCRIMINATOR_WEIGHTS,
    GOALS_FOR,
    SOFT_WEIGHTS,
    Arm,
    ArmSchedule,
    ablations,
    arm_named,
    chosen_arms,
    parse_arm,
    student_variants,
)
from lab.recover_guard import identity
from lab.recover_tables import GOALS, curve, goals_table, write_tables
from lab.sources import SPEECH
from lab.speech.plan import read_plan
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.coding.find import find_codes
from revox.coding.invert import InversionConfig, invert
from revox.coding.regularizers import Regularizers
from revox.progress import Progress

TRAINING: dict[str, Any] = {
    "clips": 1, "pairs": 1, "seconds": 0.32, "sentences": 0, "resolutions": [[256, 20]],
    "weights": {"diversity": 0.1},
}  # fmt: skip
MIXED = Arm(name="pairs-and-human", title="mixed", by="encoder", training=TRAINING)
ORIGINAL = Arm(name="original", title="the original", by="original")
CEILING = Arm(name="ceiling", title="the original on decoded sound", by="ceiling")
REFINED = Arm(name="refined", title="refined", by="refinement", of="pairs-and-human", steps=2)
RANDOM = Arm(name="random", title="random", by="random")
FOUR = [ORIGINAL, RANDOM, MIXED, REFINED]  # curves, which take long to draw, are there from the third on
TEXT = "eleven"


def _speech(seed: int, seconds: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 24000)) / 24000
    pitch = 90 + 12 * seed
    wave = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 12)) * (1 + np.sin(2 * np.pi * 3 * t))
    return ((0.06 * wave + 0.003 * rng.standard_normal(len(t))) * 32767).astype(np.int16)


def _parts(kind: str, speakers: range, text: str | None):
    for i in speakers:
        samples = _speech(i, 1.3)
        who = {"speaker": f"{kind}-{i}", "sex": "F", "preset": None, "text": text, "samples": len(samples)}
        yield samples, [who]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint, its reference encoder, and speech."""
    root = tmp_path_factory.mktemp("lab")
    checkpoint = write_checkpoint(root / "checkpoint", tiny_model(with_encoder=True))
    tensors = load_file(checkpoint / "consolidated.safetensors")
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER_PREFIXES)}
    save_file({k: v for k, v in tensors.items() if k not in encoder}, checkpoint / "consolidated.safetensors")
    (root / "reference").mkdir()
    save_file(encoder, root / "reference" / "encoder.safetensors")
    data = root / "data"
    data.mkdir()
    write_set(data, "human-train", _parts("train", range(10), None))
    write_set(data, "human-heldout", _parts("human", range(20, 23), None))
    write_set(data, "synthetic-heldout", _parts("synthetic", range(30, 33), TEXT))
    return {"checkpoint": checkpoint, "encoder": root / "reference" / "encoder.safetensors", "data": data}


def test_a_held_out_speaker_is_scored_on_a_sentence_that_the_recognizers_grammar_has(tmp_path: Path):
    plan = read_plan(SPEECH / "plan.tsv")
    sentence, free = (next(item.written for item in plan if item.kind == kind) for kind in ("plan", "free"))
    for kind in ("synthetic", "human"):
        who = {"speaker": "a", "sex": "F", "preset": None}
        said = [(0.5, sentence), (0.4, sentence), (1.5, free)]
        parts = [(_speech(i, seconds), text) for i, (seconds, text) in enumerate(said)]
        made = ((wave, [{**who, "text": text, "samples": len(wave)}]) for wave, text in parts)
        write_set(tmp_path, f"{kind}-heldout", made)
    (clip,) = recover_scores.held_out_clips(tmp_path, "synthetic", 0.2, 1920)
    assert (clip.text, len(clip.samples)) == (sentence, 6 * 1920)
    (clip,) = recover_scores.held_out_clips(tmp_path, "human", 0.2, 1920)
    assert (clip.text, len(clip.samples)) == (None, 2 * 1920)
    (clip,) = recover_scores.held_out_clips(tmp_path, "human", 0.6, 1920)  # the longest that is not cut
    assert (clip.text, len(clip.samples)) == (sentence, 6 * 1920)


def experiment(lab: dict[str, Path], out: Path, **changes: Any) -> Experiment:
    plain = Experiment(
        out=out, minutes=0.015, seeds=1, clips=1, seconds=1.0, evaluations=2,
        data=lab["data"], checkpoint=lab["checkpoint"], encoder=lab["encoder"],
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def done(lab: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment of four arms that went through at once."""
    out = tmp_path_factory.mktemp("done") / "out"
    with pytest.MonkeyPatch.context() as patch:
        in_little(patch)
        recover(experiment(lab, out), FOUR)
    return out


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    in_little(monkeypatch)


def in_little(patch: pytest.MonkeyPatch) -> None:
    """One text, and a recognizer that always hears the same: the tiny model babbles."""
    patch.setattr(recover_scores, "TEXTS", (TEXT,))
    patch.setattr(recover_scores.Scoring, "recognizer", Deaf())
    # At hand, so that they need not be recovered from their rows each time.
    patch.setattr("revox.coding.presets.preset_codes", lambda *_, **__: list(preset_codes().values()))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No curves: `done` has some."""
    monkeypatch.setattr(recover_tables, "draw_curves", lambda *_: True)


class Deaf:
    def transcribe(self, audio: object) -> str:
        return "seven"


def lines_of(out: Path, what: str, arm: str) -> list[dict[str, Any]]:
    return [line for line in Log(out / LOG_FILE).lines if line["what"] == what and line["arm"] == arm]


# The guards


ATTEMPTS = """
import json, os, subprocess, sys
from pathlib import Path
from lab.recover_guard import confine, forbid, identity
how, path, link = sys.argv[1:]
import numpy, safetensors.numpy
if how == "hook":
    forbid([identity(path)])
else:
    assert confine(Path(link).parent)
from safetensors import safe_open

def rust(name):
    with safe_open(name, framework="np") as file:
        return list(file.keys())

def other_process(name):
    subprocess.run(["cat", name], check=True, capture_output=True)

def scoring(name):
    import revox.evaluation.reference_encoder

attempts = {
    "open": lambda: open(path, "rb"), "os.open": lambda: os.open(path, os.O_RDONLY),
    "link": lambda: open(link, "rb"), "relative": lambda: open(os.path.relpath(path), "rb"),
    "bytes": lambda: open(os.fsencode(path), "rb"), "safetensors": lambda: rust(path),
    "safetensors.numpy": lambda: safetensors.numpy.load_file(path),
    "numpy": lambda: numpy.fromfile(path, dtype="u1"),
    "memmap": lambda: numpy.memmap(path), "another process": lambda: other_process(path),
}
if how == "hook":
    attempts["scoring"] = lambda: scoring(path)
found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "read"
    except TypeError:  # bf16, which numpy does not know: so it was read
        found[name] = "read"
    except Exception as error:
        found[name] = type(error).__name__
open(Path(link).parent / "own.txt", "w").write("mine")
os.link(Path(link).parent / "own.txt", Path(link).parent / "sub" / "linked.txt")
found["own"] = open(Path(link).parent / "sub" / "linked.txt").read()
print(json.dumps(found))
"""


def attempts(how: str, encoder: Path, folder: Path) -> dict[str, str]:
    (folder / "own" / "sub").mkdir(parents=True)
    (folder / "own" / "link.safetensors").symlink_to(encoder)
    (folder / "attempts.py").write_text(ATTEMPTS)
    result = subprocess.run(
        [sys.executable, folder / "attempts.py", how, encoder, folder / "own" / "link.safetensors"],
        env=process_environment(1, folder), capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_hook_refuses_the_reference_encoder_under_every_name_and_the_module_that_reads_it(
    lab: dict[str, Path], tmp_path: Path
):
    found = attempts("hook", lab["encoder"], tmp_path)
    assert found.pop("own") == "mine"
    assert found.pop("another process") == "read"  # that is the kernel's business
    assert set(found.values()) == {"ForbiddenError"}, found


def test_the_kernel_refuses_it_to_this_process_and_its_children_and_leaves_its_own_files(
    lab: dict[str, Path], tmp_path: Path
):
    pytest.importorskip("fcntl")
    if not _has_landlock():
        pytest.skip("this kernel has no Landlock")
    found = attempts("kernel", lab["encoder"], tmp_path)
    assert found.pop("own") == "mine"
    assert "read" not in found.values(), found


def _has_landlock() -> bool:
    import ctypes

    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 2


def test_a_restoring_process_that_tries_is_stopped_and_is_told_no_name_to_try(
    lab: dict[str, Path], tmp_path: Path
):
    work = _Recovery(experiment(lab, tmp_path / "out"), [MIXED])
    work.prepare()
    task = work.task("train", work.out / "run", MIXED.settings(10, 0).model_dump(mode="json"), 0)
    text = task.model_dump_json()
    assert str(lab["encoder"]) not in text
    assert str(lab["data"]) not in text
    assert identity(lab["encoder"]) in task.forbidden
    (work.out / "task.json").write_text(text)
    code = TRIES.format(encoder=str(lab["encoder"]), speech=str(next(lab["data"].glob("human-heldout*.npy"))))
    told_to_stop, keep = os.pipe()  # a pipe that stays open, as from a process that lives
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, work.out / "task.json"], env=process_environment(1, work.out),
            capture_output=True, text=True, cwd=work.out, check=False, stdin=told_to_stop,
        )  # fmt: skip
    finally:
        os.close(told_to_stop)
        os.close(keep)
    assert result.stdout.splitlines()[1:] == ["refused"] * 3
    assert result.returncode not in (0, 3, 4)
    assert "ForbiddenError" in result.stderr.splitlines()[-1], result.stderr


TRIES = """
import sys
import revox.training.restore as restore
from lab.recover_guard import ForbiddenError

def tries(*_):
    for attempt in (lambda: open({encoder!r}, "rb"), lambda: __import__("revox.evaluation.reference_encoder"),
                    lambda: open({speech!r}, "rb")):
        try:
            attempt()
            print("read")
        except ForbiddenError:
            print("refused")
    open({encoder!r}, "rb")

restore.restore_encoder = tries
from lab.recover_process import main
sys.exit(main(sys.argv[1:]))
"""


def test_restoring_hears_the_training_split_of_human_speech_and_nothing_else(
    lab: dict[str, Path], tmp_path: Path
):
    work = _Recovery(experiment(lab, tmp_path / "out"), [MIXED])
    work.prepare()
    speakers = {path.parent.name for path in work.speech.rglob("*.flac")}
    assert speakers == {f"train-{i}" for i in range(10)}


def test_an_encoder_that_restoring_could_read_is_refused(lab: dict[str, Path], tmp_path: Path):
    inside = tmp_path / "out" / "encoder.safetensors"
    inside.parent.mkdir()
    shutil.copy(lab["encoder"], inside)
    with pytest.raises(LabError, match="can read: move it"):
        recover(experiment(lab, tmp_path / "out", encoder=inside), [MIXED])
    with pytest.raises(LabError, match="is missing"):
        recover(experiment(lab, tmp_path / "out", encoder=tmp_path / "none"), [MIXED])


# Equal time


def test_steps_fill_the_time_also_where_discriminators_begin_on_the_way():
    assert Plan(0.5, 0.5).steps(60.0, None) == 120
    # A quarter of the steps at 1 s, the others at 3 s: 2.5 s on average.
    assert Plan(1.0, 3.0).steps(100.0, 0.25) == 40
    assert Plan(1.0, 3.0).steps(100.0, 0.0) == 33
    assert Plan(10.0, 10.0).steps(1.0, None) == 10  # a run is never empty


def test_a_run_takes_the_steps_that_its_measured_pace_allows(done: Path):
    [trained] = lines_of(done, "trained", MIXED.name)
    [plan] = (done / "plans").glob("*.json")
    pace = json.loads(plan.read_text())["before"]
    assert trained["steps"] == max(10, int(trained["budget"] / pace))
    assert trained["budget"] == pytest.approx(0.9)
    assert 0 < trained["cpu_seconds"] < 60
    settings = json.loads((_run(done) / "settings.json").read_text())
    assert settings["steps"] == trained["steps"]
    assert settings["decay_steps"] == round(0.5 * trained["steps"])
    assert MEASURED_STEPS % 2 == 0


def _run(out: Path) -> Path:
    [run] = (out / "runs").iterdir()
    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], int]]:
    """What the restoring process would be told: title, settings, seed. It answers with a clock in which a
    step takes 0.5 s, with discriminators 2 s, of CPU time (others pass ten times as fast), and the first few
    far longer; and the sentences that it said are its seed's."""
    heard: list[tuple[str, dict[str, Any], int]] = []

    def work(
        self: _Recovery, title: str, folder: Path, settings: dict[str, Any], seed: int, what: str = "train"
    ):
        heard.append((title, settings, seed))
        folder.mkdir(parents=True, exist_ok=True)
        start, time, lines = settings["discriminator"]["start"], 0.0, []
        for step in range(1, settings["steps"] + 1):
            time += (0.5 if step <= start else 2.0) + (30.0 if step <= 4 else 0.0)
            lines.append(json.dumps({"step": step, "cpu_seconds": time, "seconds": 10 * time}))
        (folder / "clock.jsonl").write_text("\n".join(lines))
        if not (folder / "spoken").exists():
            (folder / "spoken").mkdir()
            (folder / "spoken" / "000000.safetensors").write_text(f"said by {title}")
        return {"done": True, "confined": True}

    monkeypatch.setattr(_Recovery, "_work", work)
    return heard


def test_each_row_and_seed_gets_the_steps_of_its_own_pace_its_own_seed_and_the_seeds_sentences(
    lab: dict[str, Path], tmp_path: Path, asked: list[tuple[str, dict[str, Any], int]]
):
    judged = Arm(
        name="published",
        title="judged",
        by="encoder",
        schedule={"discriminators": 0.5},
        training=TRAINING | {"weights": DISCRIMINATOR_WEIGHTS},
    )
    work = _Recovery(experiment(lab, tmp_path / "out", minutes=1.0), [judged, MIXED])
    work.prepare()
    for arm in (judged, MIXED):
        for seed in (0, 1):
            work._train(arm, seed)
    # Half of the steps at 0.5 s and half at 2 s are 48 in a minute, all at 0.5 s 120; each is timed once.
    assert work._plan(judged) == Plan(0.5, 2.0)
    assert work._plan(MIXED) == Plan(0.5, 0.5)
    runs = [
        (settings["steps"], settings["seed"], seed) for title, settings, seed in asked if "train" in title
    ]
    assert runs == [(48, 0, 0), (48, 1, 1), (120, 0, 0), (120, 1, 1)]
    assert [title for title, *_ in asked if "timing" in title] == ["judged: timing a step"] * 2 + [
        "mixed: timing a step"
    ]
    for line in work.log.lines:
        said = (work._run(judged, line["seed"]).parent / work._run(MIXED, line["seed"])).name
        assert line["budget"] == 60.0
        spoken = (work.out / "runs" / said / "spoken" / "000000.safetensors").read_text()
        assert spoken == f"said by judged, seed {line['seed']}: training"  # the same for all arms of a seed


def test_steps_that_a_killed_run_took_twice_count_once(tmp_path: Path):
    steps = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5), (3, 3.5)]  # killed after 3, saved at 1
    lines = [json.dumps({"step": step, "cpu_seconds": at, "seconds": 9 * at}) for step, at in steps]
    (tmp_path / "clock.jsonl").write_text("\n".join([*lines, '{"step": 4, "cpu']))
    assert [_clock(tmp_path, "cpu_seconds")(step) for step in (0, 1, 2, 3)] == [0.0, 1.0, 2.5, 3.5]
    assert _clock(tmp_path, "seconds")(3) == 31.5


def test_rows_at_equal_time_hear_as_many_stretches_a_step_of_one_length():
    settings_of = {
        name: arm_named(name).settings(10, 0) for name in ("reconstruction", "pairs", "pairs-and-human")
    }
    assert {settings.seconds for settings in settings_of.values()} == {1.6}
    pairs, both = settings_of["pairs"], settings_of["pairs-and-human"]
    assert pairs.pairs == both.pairs
    assert pairs.pair == both.pair
    assert (pairs.sentences, pairs.interpolated) == (both.sentences, both.interpolated)
    assert settings_of["reconstruction"].clips == both.clips + both.pairs
    assert len({arm_named(name).schedule for name in settings_of}) == 1


# Resuming


@pytest.mark.slow
@pytest.mark.usefixtures("little")
def test_stopped_in_the_middle_of_a_run_it_goes_on_to_the_same_encoder(
    lab: dict[str, Path], done: Path, tmp_path: Path
):
    out = tmp_path / "out"
    shutil.copytree(done / "plans", out / "plans")
    steps = lines_of(done, "trained", MIXED.name)[0]["steps"]

    def stop(at: Progress) -> None:
        if at.what.endswith("training") and at.done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(experiment(lab, out, progress=stop), [MIXED])
    assert not (out / LOG_FILE).exists()
    first = _steps(out)
    assert 3 <= first[-1] < steps
    again = _Recovery(experiment(lab, out), [MIXED])
    again.prepare()
    again._train(MIXED, 0)
    assert _steps(out) == list(range(1, steps + 1))  # none was taken twice
    whole, resumed = (load_file(_run(one) / "encoder.safetensors") for one in (done, out))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _steps(out: Path) -> list[int]:
    text = (_run(out) / "clock.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


@pytest.mark.usefixtures("little", "undrawn")
def test_what_is_there_is_not_done_again_and_a_line_cut_short_is(
    lab: dict[str, Path], done: Path, tmp_path: Path
):
    out = Path(shutil.copytree(done, tmp_path / "out"))
    before = (out / LOG_FILE).read_text().splitlines()
    reported: list[str] = []
    recover(experiment(lab, out, progress=lambda at: reported.append(at.what)), FOUR)
    assert not reported
    assert (out / LOG_FILE).read_text().splitlines() == before
    (out / LOG_FILE).write_text("\n".join(before[:-1]) + "\n" + before[-1][:40])
    recover(experiment(lab, out), FOUR)
    after = (out / LOG_FILE).read_text().splitlines()
    assert after[-2] == before[-1][:40]
    again, was = json.loads(after[-1]), json.loads(before[-1])
    for line in (again, was):
        del line["scores"]["coding_seconds"]
    assert again == was


def test_a_line_that_a_full_disk_cut_short_raises_and_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = Log(tmp_path / LOG_FILE)
    line = {"what": "score", "arm": "original", "clip": "a"}
    write = os.write

    def fill(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:-19])

    with monkeypatch.context() as full:
        full.setattr(os, "write", fill)
        with pytest.raises(OSError, match="No space left"):
            log.add(line)
    assert log.find(line) is None
    again = Log(tmp_path / LOG_FILE)
    again.add(line)
    assert Log(tmp_path / LOG_FILE).lines == [line]


def test_another_checkpoint_time_or_speech_is_another_experiment(
    lab: dict[str, Path], done: Path, tmp_path: Path
):
    out = Path(shutil.copytree(done, tmp_path / "out"))
    with pytest.raises(LabError, match="begun with other minutes"):
        recover(experiment(lab, out, minutes=2.0), [RANDOM])


@pytest.mark.parametrize("text", ["", "{", "1", "[1]", "null"])
def test_a_folder_that_does_not_say_what_it_was_begun_with_is_refused(
    lab: dict[str, Path], tmp_path: Path, text: str
):
    (tmp_path / "begun.json").write_text(text)
    with pytest.raises(LabError, match="is damaged"):
        recover(experiment(lab, tmp_path), [RANDOM])


@pytest.mark.usefixtures("little", "undrawn")
def test_an_arm_that_fails_is_named_after_the_others_went_on(
    lab: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[str] = []

    def arm(self: _Recovery, arm: Arm, seed: int) -> None:
        ran.append(arm.name)
        if arm is MIXED:
            raise LabError("mixed: the loss is nan")

    monkeypatch.setattr(_Recovery, "arm", arm)
    with pytest.raises(LabError, match=r"the loss is nan\. The other arms are in .*recovery\.md"):
        recover(experiment(lab, tmp_path / "out"), [MIXED, RANDOM])
    assert ran == [MIXED.name, RANDOM.name]


@pytest.mark.usefixtures("little")
def test_the_tables_hold_all_seeds_of_an_arm_also_after_a_command_with_fewer(
    lab: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work = _Recovery(experiment(lab, tmp_path / "out"), [RANDOM])
    work.prepare()
    clip = work.scoring.clips["human"][0].speaker
    for seed in range(2):
        work.log.add(_line(RANDOM.name, "human", clip, seed) | {"config": work.config(RANDOM)})
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(recover_tables, "write_tables", lambda _, arms, lines, __: found.extend(lines))
    work.write_tables()
    assert {line["seed"] for line in found} == {0, 1}


def test_a_row_that_was_told_otherwise_has_no_results_yet(lab: dict[str, Path], done: Path):
    work = _Recovery(experiment(lab, done), [MIXED])
    other = MIXED.model_copy(update={"training": TRAINING | {"seconds": 0.4}})
    assert work.config(MIXED) != work.config(other)
    # A refinement's results are those of the encoder that it begins with.
    assert work.config(REFINED) != _Recovery(experiment(lab, done), [other]).config(REFINED)


def test_a_row_in_other_hands_is_left_to_them(lab: dict[str, Path], done: Path):
    work, other = (_Recovery(experiment(lab, done), [MIXED, REFINED]) for _ in range(2))
    sentence = "another process is running the arm"
    with work.mine(MIXED), pytest.raises(LabError, match=sentence), other.mine(REFINED):
        pass
    with other.mine(REFINED):
        pass


@pytest.mark.usefixtures("little", "undrawn")
def test_lines_of_another_setting_or_clip_stay_out_of_the_tables(
    lab: dict[str, Path], done: Path, tmp_path: Path
):
    out = Path(shutil.copytree(done, tmp_path / "out"))
    log = Log(out / LOG_FILE)
    line = next(one for one in log.lines if one["what"] == "score" and one["arm"] == "original")
    for change in ({"config": "another"}, {"clip": "nobody"}):
        log.add(line | change | {"scores": line["scores"] | {"mel": 99.0}})
    before = (out / "recovery.md").read_text()
    work = _Recovery(experiment(lab, out), FOUR)
    work.prepare()
    work.write_tables()
    assert (out / "recovery.md").read_text() == before


@pytest.mark.usefixtures("little", "undrawn")
def test_the_tables_hold_what_other_commands_ran_in_the_folder(
    lab: dict[str, Path], done: Path, tmp_path: Path
):
    out = Path(shutil.copytree(done, tmp_path / "out"))
    work = _Recovery(experiment(lab, out), FOUR)
    work.prepare()
    inverted, published = arm_named("inversion"), arm_named("published")
    for line in lines_of(out, "score", RANDOM.name):
        work.log.add(line | {"arm": inverted.name, "config": work.config(inverted)})
        work.log.add(line | {"arm": published.name, "config": "another"})
    text = work.write_tables().read_text()
    places = [text.index(f"| {arm.title}") for arm in (ORIGINAL, MIXED, REFINED, inverted, RANDOM)]
    assert places == sorted(places)
    assert published.title not in text


@pytest.mark.usefixtures("little", "undrawn")
def test_a_recognizer_of_all_words_counts_those_of_people_too(lab: dict[str, Path], tmp_path: Path):
    folders = {}
    for said in ("one", "other"):
        folders[said] = tmp_path / said
        folders[said].mkdir()
        (folders[said] / "model.bin").write_text(said)
    data = tmp_path / "data"
    shutil.copytree(lab["data"], data)
    write_set(data, "human-heldout", _parts("human", range(20, 23), TEXT))
    asked = experiment(lab, tmp_path / "out", data=data, seconds=3.0, recognizer=folders["one"])
    text = recover(asked, [RANDOM]).read_text()
    assert text.count("word errors (%)") == 4  # of decoded and of cloned speech, of both kinds
    [human] = [one["scores"] for one in lines_of(asked.out, "score", RANDOM.name) if one["kind"] == "human"]
    assert human["words"] == len(TEXT.split())
    assert human["clip_nll"] > 0
    for changes in ({"recognizer": folders["other"]}, {"recognizer": None}):
        with pytest.raises(LabError, match="begun with other recognizer"):
            recover(replace(asked, **changes), [RANDOM])
    with pytest.raises(LabError, match="holds no Whisper of CTranslate2"):
        recover(replace(asked, recognizer=data), [RANDOM])


# Scores


@pytest.fixture(scope="module")
def scoring(lab: dict[str, Path]) -> recover_scores.Scoring:
    with pytest.MonkeyPatch.context() as patch:
        in_little(patch)
        return recover_scores.Scoring(lab["checkpoint"], lab["encoder"], lab["data"], 1.0)


def test_inversion_is_the_search_from_afar_and_random_codes_are_each_seeds_and_clips_own(
    scoring: recover_scores.Scoring,
):
    arm = Arm(name="inversion", title="inversion", by="inversion", steps=3)
    found = scoring.codes(arm, "human", 0, 5)
    # As `revox clone --steps 3` has it: the local search shortened in proportion.
    config = InversionConfig(steps=3, local_search_rounds=0)
    terms = Regularizers(scoring.coder.prior())
    plain = invert(
        scoring.original, scoring.clips["human"][0].samples, config=config, regularizers=terms, seed=5
    )
    assert torch.equal(found, plain.codes)
    drawn = [scoring.codes(RANDOM, "human", i, seed) for i in (0, 1) for seed in (0, 1)]
    assert all(codes.shape == found.shape for codes in drawn)
    assert len({tuple(codes.flatten().tolist()) for codes in drawn}) == 4


def test_the_time_of_the_original_is_that_of_encoding_also_where_its_codes_are_known(
    scoring: recover_scores.Scoring, monkeypatch: pytest.MonkeyPatch
):
    known = scoring.truth("human", 0)
    encoded = []

    def counted(*arguments: Any, **named: Any) -> Any:
        encoded.append(arguments)
        return find_codes(*arguments, **named)

    monkeypatch.setattr(recover_scores, "find_codes", counted)
    assert torch.equal(scoring.codes(ORIGINAL, "human", 0, 0), known)
    assert len(encoded) == 1


@pytest.mark.parametrize("clips", [1, 3, 5, 10, 20, 40])
def test_a_look_is_at_clips_that_are_scored(lab: dict[str, Path], tmp_path: Path, clips: int):
    work = _Recovery(experiment(lab, tmp_path / "out", clips=clips), [MIXED])
    work.__dict__["scoring"] = SimpleNamespace(clips={"synthetic": range(21), "human": range(38)})
    scored, evaluated = work._places(), work._places(4)
    assert len(scored) == min(clips, 21) + min(clips, 38)
    assert len(evaluated) == 2 * min(clips, 4)
    assert set(evaluated) <= set(scored)


def test_the_original_is_its_own_ceiling_and_random_codes_are_the_floor(done: Path):
    for kind in ("synthetic", "human"):
        [original] = [one["scores"] for one in lines_of(done, "score", "original") if one["kind"] == kind]
        [random] = [one["scores"] for one in lines_of(done, "score", "random") if one["kind"] == kind]
        assert original["semantic_agreement"] == 1
        assert original["acoustic_level_error"] == 0
        assert original["row_cosine"] == pytest.approx(1, abs=1e-4)
        assert random["semantic_agreement"] < 0.2
        # Two independent uniform levels of 21 are (21^2 - 1) / (3 * 21) apart; the encoder's are not uniform.
        assert 4 < random["acoustic_level_error"] < 9
        assert ("word_errors" in original) == (kind == "synthetic")


def test_a_restored_encoder_is_scored_by_its_codes_as_served(done: Path, lab: dict[str, Path]):
    """Against an oracle: the model with these tensors in it, its own encode_as_served, by hand."""
    from revox.model.voxtral import Voxtral, parameter_name

    model = tiny_model(with_encoder=True)
    assert isinstance(model, Voxtral)
    restored = {parameter_name(k): v for k, v in load_file(_run(done) / "encoder.safetensors").items()}
    wave = torch.from_numpy(_speech(30, 1.3)[: 16 * 1920].astype(np.float32) / 32768)[None]
    codes = []
    for state in ({}, restored):
        model.load_state_dict(model.state_dict() | state)
        served = model.audio_tokenizer.to(torch.bfloat16)
        codes.append(served.encode_as_served(wave.to(torch.bfloat16))[0])
        model = model.float()
    [scores] = [o["scores"] for o in lines_of(done, "score", MIXED.name) if o["clip"] == "synthetic-30"]
    assert scores["semantic"] == codes[1][0].tolist()
    assert scores["semantic_agreement"] == pytest.approx(float((codes[0][0] == codes[1][0]).float().mean()))
    assert scores["acoustic_level_error"] == pytest.approx(
        float((codes[0][1:] - codes[1][1:]).abs().float().mean()), abs=1e-4
    )


def test_refined_codes_begin_at_the_trained_encoders(done: Path):
    mixed = {one["clip"]: one["scores"] for one in lines_of(done, "score", MIXED.name)}
    for line in lines_of(done, "score", REFINED.name):
        same = np.mean(np.equal(line["scores"]["semantic"], mixed[line["clip"]]["semantic"]))
        assert same > 0.5  # two steps do not go far


STUDENT = Arm(
    name="student", title="student", by="student",
    training={"sentences": 0, "training": {"width": 16, "blocks": 1, "batch": 2, "frames": 8}},
)  # fmt: skip
BEAM = Arm(name="student-beam", title="beam", by="refinement", of="student", steps=0, beam=2)
TRANSPOSED = Arm(name="transposed", title="transposed", by="transposed")
DISTILLED = Arm(
    name="distilled", title="distilled", by="encoder",
    training=TRAINING | {"students": 1, "student_steps": 2, "student_width": 16, "weights": SOFT_WEIGHTS},
)  # fmt: skip
AGAIN = DISTILLED.model_copy(update={"name": "distilled-again", "of": "distilled"})


@pytest.mark.slow
@pytest.mark.usefixtures("little", "undrawn")
def test_students_ensembles_and_what_nothing_is_trained_for_are_scored(lab: dict[str, Path], tmp_path: Path):
    arms = [CEILING, STUDENT, BEAM, DISTILLED, AGAIN, TRANSPOSED]
    work = _Recovery(experiment(lab, tmp_path / "out"), arms)
    work.prepare()
    (work.out / "plans").mkdir()
    for arm in (STUDENT, DISTILLED, AGAIN):  # measured before: ten steps fit
        plan = work.out / "plans" / f"{arm.name}-{work.config(arm)}.json"
        plan.write_text('{"before": 0.08, "after": 0.08}')
    for arm in (CEILING, STUDENT, BEAM, AGAIN, TRANSPOSED):
        work.arm(arm, 0)
    work.write_tables()
    scored = {arm.name: lines_of(tmp_path / "out", "score", arm.name) for arm in arms}
    assert {len(lines) for name, lines in scored.items() if name != "distilled"} == {2}
    [student] = lines_of(tmp_path / "out", "trained", "student")
    assert student["steps"] >= 10
    assert lines_of(tmp_path / "out", "trained", "distilled")  # first, for the one after
    [run] = (tmp_path / "out" / "runs").glob("distilled-again-*")
    used = json.loads((run / "settings.json").read_text())["encoders"]
    assert [Path(path).parent.name.rsplit("-", 2)[0] for path in used] == ["distilled"]
    for one, other in zip(scored["student"], scored["student-beam"], strict=True):
        assert one["scores"]["acoustic_level_error"] == other["scores"]["acoustic_level_error"]
    text = (tmp_path / "out" / "recovery.md").read_text()
    assert "the original on decoded sound (ceiling)" in text


def test_a_whisper_is_put_where_restoring_can_read_it_and_asked_for_where_it_is_needed(
    lab: dict[str, Path], tmp_path: Path
):
    taught = arm_named("published-whisper")
    with pytest.raises(LabError, match="name its folder with --whisper"):
        _Recovery(experiment(lab, tmp_path / "out"), [taught]).prepare()
    with pytest.raises(LabError, match="holds no Whisper"):
        _Recovery(experiment(lab, tmp_path / "out", whisper=tmp_path), [taught]).prepare()
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "config.json").write_text("{}")
    work = _Recovery(experiment(lab, tmp_path / "out", whisper=tmp_path / "whisper"), [taught])
    work.prepare()
    settings = work._settings(taught, 10, 0)
    assert settings["whisper"] == str(tmp_path / "out" / "whisper")
    assert (tmp_path / "out" / "whisper" / "config.json").read_text() == "{}"


def test_an_experiment_has_one_whisper(lab: dict[str, Path], tmp_path: Path):
    whispers = [tmp_path / "one", tmp_path / "two"]
    for folder in whispers:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(folder.name)
    out = tmp_path / "out"

    def begin(whisper: Path | None) -> None:
        _Recovery(experiment(lab, out, whisper=whisper), [RANDOM]).prepare()

    for whisper in (None, whispers[0], whispers[0], None):  # other arms need none
        begin(whisper)
    with pytest.raises(LabError, match="another whisper"):
        begin(whispers[1])
    before = json.loads((out / "begun.json").read_text())
    del before["whisper"]
    (out / "begun.json").write_text(json.dumps(before))  # as folders were begun before
    begin(whispers[0])
    with pytest.raises(LabError, match="another whisper"):
        begin(whispers[1])
    shutil.rmtree(whispers[0])
    begin(whispers[0])  # the experiment has a copy


# Tables


def _line(arm: str, kind: str, clip: str, seed: int, **scores: Any) -> dict[str, Any]:
    full = {
        "mel": 1.0, "similarity": 0.9, "row_cosine": 0.9, "semantic_agreement": 0.5, "rank": 1, "stft": 1.0,
        "acoustic_level_error": 1.0, "cloned_similarity": 0.8, "cloned_word_errors": 1, "cloned_words": 10,
        "semantic": [1, 2], "coding_seconds": 0.1,
    }  # fmt: skip
    return {"what": "score", "arm": arm, "kind": kind, "clip": clip, "seed": seed, "scores": full | scores}


def _goal_cells(tmp_path: Path, lab: dict[str, Path], **restored: float) -> dict[tuple[str, str], str]:
    lines = []
    for kind in ("synthetic", "human"):
        for clip in "ab":
            words = {"word_errors": 1, "words": 10, "clip_nll": 2.0} if kind == "synthetic" else {}
            lines.append(_line("original", kind, clip, 0, **words))
            lines.append(_line("ceiling", kind, clip, 0, row_cosine=0.8, acoustic_level_error=0.5))
            known = {k: v for k, v in restored.items() if k in words or k not in ("word_errors", "clip_nll")}
            lines.append(_line(MIXED.name, kind, clip, 0, **words | known))
    path = write_tables(tmp_path / "t.md", [ORIGINAL, CEILING, MIXED], lines, experiment(lab, tmp_path))
    found = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for goal in GOALS:
            if cells[0] == goal.title:
                found[goal.key, cells[1]] = cells[3]
    assert len(found) == 2 * len(GOALS)
    return found


def test_a_goal_is_reached_at_its_bound_and_not_beyond(tmp_path: Path, lab: dict[str, Path]):
    # The ceiling's cosine is 0.8, its level error 0.5 and its agreement 0.5; the most frequent code is right
    # in half of the frames.
    at = {"mel": 1.05, "similarity": 0.871, "row_cosine": 0.705, "semantic_agreement": 1.0, "clip_nll": 3.0,
          "acoustic_level_error": 0.8, "cloned_similarity": 0.771, "cloned_word_errors": 1.3,
          "word_errors": 1.5}  # fmt: skip
    beyond = {"mel": 1.06, "similarity": 0.86, "row_cosine": 0.65, "semantic_agreement": 0.26,
              "clip_nll": 3.1, "acoustic_level_error": 1.06, "cloned_similarity": 0.76,
              "cloned_word_errors": 1.4, "word_errors": 1.6}  # fmt: skip
    unknown = {("word_errors", "human"), ("clip_nll", "human")}  # nobody knows what they say
    reached, missed = _goal_cells(tmp_path, lab, **at), _goal_cells(tmp_path, lab, **beyond)
    for place in reached.keys() - unknown:
        assert reached[place].endswith(", reached"), place
        assert missed[place].endswith("not reached"), place
    assert {reached[place] for place in unknown} == {"–"}
    between = _goal_cells(tmp_path, lab, semantic_agreement=0.3, row_cosine=0.68, acoustic_level_error=0.9)
    for key, kind in (("semantic_agreement", "synthetic"), ("row_cosine", "human"),
                      ("acoustic_level_error", "human")):  # fmt: skip
        other = "human" if kind == "synthetic" else "synthetic"
        assert between[key, kind].endswith(", reached")
        assert between[key, other].endswith("not reached")


def test_without_the_original_a_goal_beside_it_is_left_open():
    table = goals_table([MIXED], {(MIXED.name, "human", "mel"): 0.5})
    assert "0.500, nothing to compare with" in table


def test_a_tables_figure_is_the_median_over_clips_of_the_mean_over_seeds(
    tmp_path: Path, lab: dict[str, Path]
):
    lines = [
        _line("original", "human", clip, seed, mel=mel)
        for clip, values in {"a": (1.0, 3.0), "b": (5.0, 5.0), "c": (9.0, 10.0)}.items()
        for seed, mel in enumerate(values)
    ]
    path = write_tables(tmp_path / "t.md", [ORIGINAL], lines, experiment(lab, tmp_path))
    codec = path.read_text().split("## Codec: human")[1]
    assert re.search(r"\| the original \(ceiling\) \| 5\.000 \[2\.000, 9\.500\]", codec)
    assert "Goals" in path.read_text()


def test_the_table_has_the_agreement_of_always_predicting_the_most_common_code(
    tmp_path: Path, lab: dict[str, Path]
):
    codes_of = {"a": [7, 7, 7, 1], "b": [7, 2, 3, 4], "c": [7, 7, 5, 6]}
    lines = [_line("original", "human", clip, 0, semantic=codes) for clip, codes in codes_of.items()]
    lines += [_line(MIXED.name, "human", clip, 0, semantic=[9] * 4) for clip in codes_of]
    path = write_tables(tmp_path / "t.md", [ORIGINAL, MIXED], lines, experiment(lab, tmp_path))
    codes_table = path.read_text().split("## Codes: human")[1].split("##")[0]
    assert "would be right in 0.500 of the frames" in codes_table


def test_a_curve_has_a_point_for_each_look_over_its_clips_and_seeds():
    lines = [
        {"what": "evaluation", "arm": "x", "kind": "human", "clip": clip, "seed": seed, "step": step,
         "seconds": 60.0 * step + 12 * seed, "scores": {"mel": mel + seed}}
        for step, clip, mel in ((1, "a", 4.0), (1, "b", 6.0), (2, "a", 1.0), (2, "b", 2.0))
        for seed in (0, 1)
    ]  # fmt: skip
    np.testing.assert_allclose(curve(lines, "x", "human", "mel"), [(1.1, 5.5), (2.1, 2.0)])


def test_the_experiments_folder_holds_tables_of_each_kind_goals_and_curves(done: Path):
    text = (done / "recovery.md").read_text()
    for title in ("Codec", "Codes", "Cloning"):
        for kind in ("synthetic", "human"):
            assert f"## {title}: {kind} speakers" in text
    assert "## Goals" in text
    assert "## Time" in text
    assert (done / "curves.png").read_bytes()[:4] == b"\x89PNG"
    evaluations = {line["step"] for line in lines_of(done, "evaluation", MIXED.name)}
    steps = lines_of(done, "trained", MIXED.name)[0]["steps"]
    assert evaluations == {-(-steps // 2), steps}


# The arms


def test_every_row_of_the_issue_is_there_and_the_published_one_says_what_it_lacks():
    arms = chosen_arms()
    assert [arm.name for arm in arms] == list(ARMS)
    assert arms[0].kind == "ceiling"
    assert arms[-1].kind == "floor"
    published = arm_named("published")
    settings = published.settings(1000, 0)
    assert (settings.clips, settings.pairs, settings.seconds) == (4, 0, 4.0)
    assert settings.betas == (0.8, 0.99)
    assert settings.learning_rate == 3e-4
    assert len(settings.discriminator.n_ffts) == 8
    assert settings.discriminator.start == 300
    assert settings.discriminator.every == 2
    weights = settings.weights
    assert (weights.mel, weights.waveform, weights.stft, weights.feature) == (4, 1, 1, 2)
    assert any("Whisper" in caveat for caveat in published.caveats)
    taught = arm_named("published-whisper").settings(1000, 0)
    assert taught.weights.distillation == 1
    same = {"weights", "whisper"}
    assert taught.model_dump(exclude=same) == settings.model_dump(exclude=same)
    assert [arm.name for arm in arms if arm.needs_whisper] == ["published-whisper"]
    for name in ("student", "student-beam", "distilled", "distilled-again"):
        own = [arm_named(name), *(one for one in arms if one.name == arm_named(name).of)]
        assert any("teacher codec" in caveat for one in own for caveat in one.caveats), name
    only_pairs = arm_named("pairs").settings(10, 0)
    assert only_pairs.clips == 0
    reconstruction = arm_named("reconstruction").settings(10, 0)
    assert reconstruction.pairs == 0
    assert reconstruction.weights.commitment == reconstruction.weights.diversity == 0


BASE = arm_named(GOALS_FOR)
JUDGED = BASE.model_copy(
    update={
        "name": "judged",
        "schedule": ArmSchedule(discriminators=0.5),
        "training": BASE.training | {"weights": BASE.training["weights"] | DISCRIMINATOR_WEIGHTS},
    }
)


def test_an_ablation_changes_one_loss_and_nothing_else():
    base = arm_named(GOALS_FOR)
    plain = base.settings(100, 0).model_dump()
    seen = set()
    for arm in ablations(base):
        changed = arm.settings(100, 0).model_dump()
        weights = {k for k in plain["weights"] if changed["weights"][k] != plain["weights"][k]}
        others = {k for k in plain if k != "weights" and changed[k] != plain[k]}
        settings = {
            "with-speaker": {"verifier"},
            "with-discriminators": {"discriminator"},
            "no-all-pass": {"pair"},
            "with-average": {"average"},
            "with-pseudo-labels": {"pseudo_labels", "pseudo_labeled", "inversion_steps"},
            "with-distillation": {"whisper"},
            "with-student": {"students"},
            "with-muon": {"optimizer"},
            "with-transposed": {"start"},
            "with-scale": {"scaled_start"},
            "with-augmentation": {"augmentation"},
        }
        which = arm.name.removeprefix(f"{GOALS_FOR}-")
        assert others == settings.get(which, set()), arm.name
        none = (
            "no-all-pass",
            "with-average",
            "with-pseudo-labels",
            "with-muon",
            "with-transposed",
            "with-scale",
        )
        alone = dict.fromkeys((*none, "with-augmentation"), 0) | {"with-student": 2}
        assert len(weights) == alone.get(which, 1), arm.name
        assert arm.name not in seen
        seen.add(arm.name)
    on = {name for name, weight in plain["weights"].items() if weight > 0}
    assert {f"{GOALS_FOR}-no-{name}" for name in on} <= seen
    assert {"semantic", "acoustic", "mel", "stft", "waveform"} <= on
    beside = ("with-discriminators", "with-speaker", "no-all-pass", "with-average", "with-pseudo-labels")
    assert {f"{GOALS_FOR}-{which}" for which in beside} <= seen
    # The student has the teacher codec's features and network: its arm says so.
    assert [arm.name for arm in ablations(base) if any("teacher codec" in one for one in arm.caveats)] == [
        f"{GOALS_FOR}-with-student",
        f"{GOALS_FOR}-with-pseudo-labels",
    ]
    judged = {arm.name: arm.settings(100, 0).weights for arm in ablations(JUDGED)}
    assert judged["judged-no-feature"].feature == 0
    assert "judged-with-discriminators" not in judged


def test_a_variant_of_the_student_changes_one_setting():
    base = arm_named("student")

    def settings(arm: Arm) -> dict[str, Any]:
        found = arm.student_settings(100, 0).model_dump()
        return found.pop("training") | found

    plain = settings(base)
    for arm in student_variants(base):
        assert sum(plain[name] != value for name, value in settings(arm).items()) == 1, arm.name
        assert arm.caveats == base.caveats


def test_discriminators_cost_time_only_where_they_judge():
    assert arm_named("pairs").discriminators_from is None
    assert arm_named("published").discriminators_from == 0.3
    off = {arm.name: arm for arm in ablations(JUDGED)}
    assert off["judged-no-reconstruction"].discriminators_from is None
    assert off["judged-no-feature"].discriminators_from is None
    on = {arm.name: arm for arm in ablations(arm_named(GOALS_FOR))}
    assert on[f"{GOALS_FOR}-with-discriminators"].discriminators_from == 0.5
    assert on[f"{GOALS_FOR}-no-mel"].discriminators_from is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("title: a\nby: encoder", "training belongs"),
        ("title: a\nby: encoder\ntraining: {pairs: 0, clips: 0}", "nothing to learn from"),
        ("title: a\nby: encoder\ntraining: {steps: 5}", "follows from the time"),
        ("title: a\nby: encoder\ntraining: {color: 5}", "color"),
        ("title: a\nby: refinement\nsteps: 3", "`of` names the arm"),
        ("title: a\nby: inversion", "steps belong"),
        ("- 1", "cannot be read"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_row_that_will_not_do_is_a_sentence(text: str, sentence: str):
    with pytest.raises(LabError, match=sentence):
        parse_arm("mine", text)


def test_no_rows_at_all_is_a_sentence():
    with pytest.raises(LabError, match="no arm is named"):
        chosen_arms([])


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ([], "begun with other minutes"),  # which is evaluated at after the arms
        (["--arms", "original, pairs-and-human-no-mel"], "begun with other minutes"),
        (["--arms", "pairs"], "no arm 'pairs' to ablate: the arms are original, pairs-and-human, "),
        (["--rows", "pairs"], "no arm 'pairs' to ablate: the arms are original, pairs-and-human, "),
        (["--arms", ","], "no arm is named: the arms are original, pairs-and-human, "),
    ],
)
def test_an_ablation_takes_the_arms_that_are_named(
    lab: dict[str, Path], tmp_path: Path, named: list[str], sentence: str
):
    _Recovery(experiment(lab, tmp_path / "out"), [MIXED]).prepare()
    places = ["--data", lab["data"], "--encoder", lab["encoder"], "--checkpoint", lab["checkpoint"]]
    asked = ["recover", "--out", tmp_path / "out", *places, "--ablate", *named]
    result = CliRunner().invoke(lab_command.app, [str(argument) for argument in asked])
    assert isinstance(result.exception, LabError)
    assert re.search(sentence, str(result.exception))
    assert ("--rows is now --arms" in result.output) == ("--rows" in named)


@pytest.mark.parametrize("name", ["none", "../lists", "original.yaml", ""])
def test_an_unknown_arm_is_a_sentence_with_the_known_ones(name: str):
    with pytest.raises(LabError, match="the arms are original"):
        arm_named(name)


def test_the_restoring_process_ends_and_saves_when_what_started_it_ends(lab: dict[str, Path], tmp_path: Path):
    work = _Recovery(experiment(lab, tmp_path / "out"), [MIXED])
    work.prepare()
    run = work.out / "run"
    run.mkdir()
    settings = MIXED.settings(10**6, 0, report_every=1).model_dump(mode="json")
    (run / "task.json").write_text(work.task("train", run, settings, 0).model_dump_json())
    process = subprocess.Popen(
        process_command(run / "task.json"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=process_environment(1, work.out), cwd=work.out,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    for line in process.stdout:
        if '"step"' in line:
            process.stdin.close()  # as when its owner is killed
            break
    process.stdout.read()
    assert process.wait(60) == 4
    state = torch.load(run / "encoder-state.pt", weights_only=True)
    assert state["step"] >= 1
