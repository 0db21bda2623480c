"""`revox train encoder` as people start it: in processes of its own, several at once, ended by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import write_speakers
from revox.checkpoint.encoder_file import read_record

pytestmark = pytest.mark.slow  # seven processes that each import torch: most of a minute of one core
PATIENCE = 240.0  # seconds, on a machine with other work
COMMAND = ("-m", "revox.cli", "train", "encoder")
LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
          "--main_process_port", "0")  # fmt: skip
SETTINGS: dict[str, Any] = {
    "clips": 2, "pairs": 2, "seconds": 0.64, "save_every": 1000, "report_every": 1, "validate_every": 1000,
    "resolutions": [[256, 20]], "sentences": 0, "decay_steps": 1, "warmup": 2,
    "weights": {"waveform": 1.0, "feature": 2.0, "adversarial": 1.0},
    "discriminator": {"start": 1, "n_ffts": [256], "channels": 4, "every": 1, "seconds": 0.3},
}  # fmt: skip


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty speakers of one clip each, all longer than what is cut from them."""
    return write_speakers(tmp_path_factory.mktemp("speech"), 24000)


@pytest.fixture
def arguments(tiny_checkpoint: Path, speech: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SETTINGS))
    return ["--checkpoint", str(tiny_checkpoint), "--data", str(speech), "--config", str(config),
            "--device", "cpu", "--workers", "0"]  # fmt: skip


def environment(tmp_path: Path) -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    own = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "REVOX_CACHE": str(tmp_path / "cache")}
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | own


@contextmanager
def started(tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The process, ended with all of its own if the test leaves it running."""
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment(tmp_path), cwd=tmp_path, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finished(tmp_path: Path, *arguments: str) -> str:
    """What it said when it had ended well."""
    with started(tmp_path, *arguments) as process:
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, said
    return said


def log(run: Path) -> list[dict[str, float]]:
    path = run / "encoder-log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_two_processes_of_accelerate_launch_get_the_losses_of_one(arguments: list[str], tmp_path: Path):
    steps = ("--steps", "3")
    finished(tmp_path, *COMMAND, *arguments, *steps, "--out", str(tmp_path / "one"))
    finished(tmp_path, *LAUNCH, *COMMAND, *arguments, *steps, "--out", str(tmp_path / "two"))
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3]
    for mine, theirs in zip(one, two, strict=True):
        for name in ("semantic", "acoustic", "agreement", "commitment", "diversity", "mel", "waveform"):
            assert theirs[name] == pytest.approx(mine[name], rel=2e-3, abs=1e-5), (name, mine["step"])
    assert two[2]["discriminator"] == pytest.approx(one[2]["discriminator"], rel=2e-3)


def test_sigterm_saves_and_exits_with_0_and_resume_ends_where_an_uninterrupted_run_does(
    arguments: list[str], tmp_path: Path
):
    run, deadline = tmp_path / "run", time.monotonic() + PATIENCE
    endless = (*COMMAND, *arguments, "--steps", "1000000", "--out", str(run))
    with started(tmp_path, *endless) as process:
        while len(log(run)) < 2:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no step was taken"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0, said
    assert "--resume" in said
    assert "Traceback" not in said
    taken = read_record(run / "encoder.safetensors")["steps"]
    assert taken >= 2
    steps = ("--steps", str(taken + 2))
    said = finished(tmp_path, *COMMAND, *arguments, *steps, "--out", str(run), "--resume")
    assert f"continuing from step {taken}" in said
    finished(tmp_path, *COMMAND, *arguments, *steps, "--out", str(tmp_path / "whole"))
    ours, whole = log(run), log(tmp_path / "whole")
    assert [row["step"] for row in ours] == [row["step"] for row in whole] == list(range(1, taken + 3))
    for mine, theirs in zip(ours, whole, strict=True):
        assert {k: mine[k] for k in ("loss", "mel", "norm")} == {
            k: theirs[k] for k in ("loss", "mel", "norm")
        }
    encoder = "encoder.safetensors"
    assert (run / encoder).read_bytes() == (tmp_path / "whole" / encoder).read_bytes()
