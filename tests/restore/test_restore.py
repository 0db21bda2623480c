"""A miniature restored in one command: every stage once, failures reported, and on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import preset_codes, tiny_model, write_speakers
from lab.recover_arms import GOALS_FOR, arm_named
from revox.checkpoint.inspect import inspect
from revox.checkpoint.load import load_model
from revox.checkpoint.tensors import ENCODER_WEIGHTS, WEIGHTS
from revox.checkpoint.voices import add_voice, load_voice
from revox.cli.main import build_app
from revox.cloning.consent import provenance
from revox.doctor.findings import CheckResult, DoctorReport, Verdict
from revox.evaluation.cloning_table import CLONED, DECODED, PRESET
from revox.evaluation.tables import Cell, Row, Table
from revox.marking import verify_file
from revox.model.voxtral import tensor_name
from revox.progress import Progress
from revox.restore import plan as plan_module
from revox.restore import restore as module
from revox.restore.request import QUICK_TRAINING, RestoreRequest
from revox.restore.rule import wants_adaptation
from revox.training.adapt import Decision, Guard
from revox.training.restore import TRAINING
from revox.training.settings import EncoderTraining

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = ["plan", "train", "measure", "adapt", "inject", "doctor", "clone and speak"]
CONFIG = (
    "{steps: 4, clips: 1, pairs: 1, seconds: 0.64, sentences: 0, resolutions: [[256, 20]], report_every: 1, "
    "validate_every: 2, save_every: 2, likelihood: false}"
)


class Miniature:
    """A restoration of the tiny checkpoint, by the command line, into one folder."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint, self.folder, self.out = checkpoint, folder, folder / "out"
        (folder / "speech").mkdir()
        write_speakers(folder / "speech", 16000)
        (folder / "config.yaml").write_text(CONFIG)

    def run(self, *more: object, code: int = 0) -> str:
        given = (
            "restore", self.checkpoint, "--data", self.folder / "speech", "--config",
            self.folder / "config.yaml", "--out", self.out, "--workers", 0, "--device", "cpu", *more,
        )  # fmt: skip
        found = CliRunner().invoke(build_app(), [str(one) for one in given])
        assert found.exit_code == code, (found.output, found.exception)
        return " ".join(found.output.split())

    def fails(self, *more: object) -> str:
        """The sentence of a mistake, for which nothing is computed."""
        before = sorted(self.out.rglob("*"))
        given = ["restore", "--out", str(self.out), *map(str, more)]
        found = CliRunner().invoke(build_app(), given)
        assert isinstance(found.exception, ValueError), (found.output, found.exception)
        assert sorted(self.out.rglob("*")) == before
        return str(found.exception)

    def facts(self) -> dict[str, dict]:
        return json.loads((self.out / "restore.json").read_text())["stages"]


@pytest.fixture
def miniature(tiny_checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Miniature:
    """Few presets, one table of one text; the doctor, which knows random weights, finds them well."""
    few = list(preset_codes().values())[:3]
    for room in ("training.restore", "coding.presets"):
        monkeypatch.setattr(f"revox.{room}.preset_codes", lambda *_, **__: few)
    monkeypatch.setattr("revox.evaluation.acceptance_table.MAX_PRESETS", 1)
    monkeypatch.setattr("revox.evaluation.evaluate.DEFAULT_TEXTS", ("Good day.",))
    monkeypatch.setattr("revox.evaluation.acceptance_table.DRAWS", 1)
    for room in ("restore", "report"):
        monkeypatch.setattr(f"revox.restore.{room}.KINDS", ("cloning",))
    monkeypatch.setattr(RestoreRequest, "seeds", 1)
    monkeypatch.setattr("revox.doctor.trial.longest_reading", lambda text: 0.6)
    monkeypatch.setenv("REVOX_CACHE", str(tmp_path / "cache"))
    healthy = DoctorReport("tiny", {}, [CheckResult(Verdict.PASS, "All there.", name="inventory")])
    monkeypatch.setattr(module, "examine", lambda *_, **__: healthy)
    return Miniature(tiny_checkpoint_copy, tmp_path)


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Notes each call of those functions of the room."""
    calls: list[str] = []

    def watched(name: str, function: Callable) -> Callable:
        return lambda *given, **options: (calls.append(name), function(*given, **options))[1]

    for name in names:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    return calls


def test_a_checkpoint_becomes_one_that_clones_and_nothing_is_done_twice(miniature, monkeypatch):
    codes = preset_codes()["casual_male"]
    own = load_model(miniature.checkpoint).mm_audio_embeddings.voice_embedding(codes)
    add_voice(miniature.checkpoint, "ada", own, codes, provenance("Ada, who agreed", "inversion"))
    said = miniature.run("--adapt", "never")
    assert "timed here over a few and extrapolated" in said
    assert said.index("timed here") < said.index("step 4 of 4")  # the plan comes first
    facts = miniature.facts()
    assert list(facts) == STAGES
    assert all(one["done"] for one in facts.values())
    assert {one["stage"] for one in facts["plan"]["estimates"]} == {*STAGES} - {"plan", "adapt"}
    assert all(one["seconds"] > 0 for one in facts["plan"]["estimates"])
    assert facts["train"]["valid_mel"] > 0
    assert facts["adapt"]["adapted"] is False

    restored = miniature.out / "checkpoint"
    assert inspect(restored).encoder == "complete"
    assert (restored / WEIGHTS).read_bytes() == (miniature.checkpoint / WEIGHTS).read_bytes()
    voice = load_voice(restored, "ada")
    assert torch.equal(voice.embedding, own)
    assert voice.provenance["consent"]["statement"] == "Ada, who agreed"
    assert facts["clone and speak"]["method"] == "encoder"
    assert "LibriSpeech" in facts["clone and speak"]["provenance"]["consent"]["statement"]
    for file in ("decoded.wav", "clone-0.wav"):
        assert verify_file(miniature.out / "sounds" / file).state == "marked"

    text, page = ((miniature.out / f"report.{end}").read_text() for end in ("md", "html"))
    assert "**Done.**" in text
    assert "### Cloning: all clips (2 clips)" in text
    assert '<audio controls preload="none" src="sounds/decoded.wav"></audio>' in page
    assert '<img src="training.png"' in page
    for picture in ("training.png", "mel.png"):
        assert (miniature.out / picture).stat().st_size > 5000
    for file in ("report.md", "report.html", "restore.json"):
        assert str(miniature.folder) not in (miniature.out / file).read_text(), file
    assert not (miniature.out / "timed").exists()

    calls = counted(monkeypatch, "restore_encoder", "evaluate", "inject", "examine", "plan_restore")
    assert "train: done before" in miniature.run("--adapt", "never")
    assert calls == []
    assert "begun with other clip and consent" in miniature.fails(
        miniature.checkpoint, "--data", miniature.folder / "speech", "--config",
        miniature.folder / "config.yaml", "--clip", next((miniature.folder / "speech").rglob("*.flac")),
        "--consent", "nobody's voice",
    )  # fmt: skip


def stopping(function: Callable, when: Callable[[Progress], bool]) -> Callable:
    """`function` with Ctrl-C at the first progress of its options for which `when` holds."""

    def stopped(*given: Any) -> Any:
        progress = given[-1].progress

        def watch(at: Progress) -> None:
            progress(at)
            if when(at):
                os.kill(os.getpid(), signal.SIGINT)

        given[-1].progress = watch
        return function(*given)

    return stopped


def raising(error: BaseException, after: Callable | None = None) -> Callable:
    """A function that raises, after a call of another."""

    def function(*given: Any, **options: Any) -> None:
        if after is not None:
            after(*given, **options)
        raise error

    return function


def test_stopped_and_killed_it_goes_on_and_a_failed_stage_is_exit_code_1(miniature, monkeypatch):
    train, write = module.restore_encoder, module.inject
    timed = {"seconds": 1.0, "cpu_seconds": 1.0, "memory": 1e9}
    monkeypatch.setattr(plan_module, "timed_step", lambda *_: timed)
    monkeypatch.setattr(
        module, "restore_encoder", stopping(train, lambda at: at.what == TRAINING and at.done == 2)
    )
    assert "stopped; the same command goes on" in miniature.run("--adapt", "never", code=130)
    assert miniature.facts()["train"]["error"] == "stopped"
    assert "**Not done: train, measure" in (miniature.out / "report.md").read_text()

    monkeypatch.setattr(module, "restore_encoder", train)
    monkeypatch.setattr(module, "evaluate", raising(RuntimeError("out of memory")))
    said = miniature.run("--adapt", "never", code=1)
    assert "continuing from step 2" in said
    assert "not done: measure, adapt, inject, doctor, clone and speak" in said
    assert miniature.facts()["measure"]["error"] == "out of memory"
    assert miniature.facts()["inject"]["error"] == "waits for: adapt"

    # Killed when the folder was there and its record was not.
    monkeypatch.setattr(module.Restoration, "measure", lambda self: {"try": False, "why": "near enough"})
    monkeypatch.setattr(module, "inject", raising(KeyboardInterrupt(), after=write))
    monkeypatch.setattr("revox.restore.report.KINDS", ())
    miniature.run(code=130)
    assert inspect(miniature.out / "checkpoint").encoder == "complete"
    broken = DoctorReport("tiny", {}, [CheckResult(Verdict.FAIL, "Not there.", name="inventory")])
    monkeypatch.setattr(module, "examine", lambda *_, **__: broken)
    monkeypatch.setattr(module, "inject", write)
    assert "not done: doctor; the same command tries again" in miniature.run(code=1)
    assert miniature.facts()["adapt"]["why"] == "near enough"
    text = (miniature.out / "report.md").read_text()
    assert "**Not done: doctor.**" in text
    assert "checks that failed: inventory" in text
    assert miniature.facts()["clone and speak"]["done"]


@pytest.mark.parametrize("accepted", [True, False])
def test_an_adaptation_that_its_guard_accepts_is_merged_and_another_leaves_the_model(
    miniature, monkeypatch, accepted
):
    wanted = {"try": True, "why": "no sentence ended", "nll_cloned": None}
    encoder = miniature.folder / "encoder.safetensors"
    name = "layers.0.attention.wq.weight"
    changed = 2 * load_file(miniature.checkpoint / WEIGHTS)[name]
    asked = []

    def adapted(checkpoint, out, request):
        asked.append((checkpoint, request.encoder, request.training.objective))
        out.mkdir()
        save_file({name: changed}, out / "adaptation.safetensors")
        decision = Decision(1.0, Guard(0.99, 0.01), 2.0, 1.0, 1.5, 0.1, {})
        return decision, out / "adaptation.safetensors" if accepted else None

    def trained(self) -> dict:
        self.encoder.parent.mkdir(exist_ok=True)
        shutil.copy(encoder, self.encoder)
        return {"steps": 4}

    state = tiny_model(with_encoder=True).audio_tokenizer.state_dict()
    save_file(
        {
            tensor_name(f"audio_tokenizer.{k}"): v.bfloat16().contiguous()
            for k, v in state.items()
            if k.startswith(("input_proj", "encoder_blocks"))
        },
        encoder,
    )
    steps = {"steps": 4, "estimates": []}
    monkeypatch.setattr(module, "plan_restore", lambda *_: steps)
    for stage, found in (
        ("train", trained),
        ("measure", lambda self: wanted),
        ("clone_and_speak", lambda self: {}),
    ):
        monkeypatch.setattr(module.Restoration, stage, found)
    monkeypatch.setattr(module, "write_report", lambda *_: None)
    monkeypatch.setattr("revox.cli.restore_command._print_plan", lambda *_: None)
    monkeypatch.setattr(module, "adapt_model", adapted)
    miniature.run()
    assert asked == [(miniature.checkpoint, miniature.out / "encoder" / "encoder.safetensors", "distill")]
    facts = miniature.facts()["adapt"]
    assert (facts["tried"], facts["adapted"]) == (True, accepted)
    assert facts["presets_agreement"] == 0.99
    folder = miniature.out / "checkpoint"
    assert inspect(folder).encoder == "complete"
    assert (folder / ENCODER_WEIGHTS).exists() is not accepted
    weight = load_file(folder / WEIGHTS)[name]
    assert torch.equal(weight, changed if accepted else changed / 2)
    given = ("--data", miniature.folder / "speech", "--config", miniature.folder / "config.yaml")
    sentence = miniature.fails(miniature.checkpoint, *given, "--device", "cpu", "--adapt", "never")
    assert "past the adaptation, with --adapt auto" in sentence


def test_a_plan_alone_trains_nothing_and_one_that_fails_is_exit_code_1(miniature, monkeypatch):
    calls = counted(monkeypatch, "restore_encoder")
    monkeypatch.setattr(plan_module, "timed_step", raising(RuntimeError("out of memory")))
    for more in ((), ("--plan",)):
        said = miniature.run(*more, code=1)
        assert "plan: out of memory" in said
        assert "not done: plan; the same command tries again" in said
    timed = {"seconds": 2.0, "cpu_seconds": 1.0, "memory": None}
    monkeypatch.setattr(plan_module, "timed_step", lambda *_: timed)
    assert "4 steps of 2 s (1 s of the processor), timed here" in miniature.run("--plan")
    assert list(miniature.facts()) == ["plan"]
    estimates = {one["stage"]: one for one in miniature.facts()["plan"]["estimates"]}
    assert estimates["train"]["seconds"] == pytest.approx(8, abs=0.01)
    assert estimates["adapt"]["seconds"] > estimates["inject"]["seconds"]
    weights = (miniature.checkpoint / WEIGHTS).stat().st_size
    assert weights < estimates["inject"]["disk"] < 2 * weights
    assert calls == []


def test_mistakes_are_sentences_before_anything_is_computed(
    miniature, tiny_checkpoint_with_encoder, tmp_path, monkeypatch
):
    speech, there = miniature.folder / "speech", miniature.checkpoint
    data = ("--data", speech, "--device", "cpu")
    assert "--adapt always is not offered" in miniature.fails(there, *data, "--adapt", "always")
    assert "consent is required" in miniature.fails(there, *data, "--clip", speech / "speaker00" / "a.flac")
    assert "leave --config and --steps out" in miniature.fails(there, *data, "--quick", "--steps", 3)
    assert "--steps or --minutes" in miniature.fails(there, *data, "--minutes", 1, "--steps", 3)
    assert "has an encoder already (complete)" in miniature.fails(tiny_checkpoint_with_encoder, *data)
    assert "is not a folder" in miniature.fails(there, "--data", tmp_path / "none", "--device", "cpu")
    (tmp_path / "few").mkdir()
    shutil.copytree(speech / "speaker00", tmp_path / "few" / "speaker00")
    few = ("--data", tmp_path / "few", "--device", "cpu")
    assert "name other speech with --validation" in miniature.fails(there, *few)
    copy = Path(shutil.copytree(there, miniature.out / "checkpoint"))
    assert "would change the checkpoint itself" in miniature.fails(copy, *data)
    shutil.rmtree(miniature.out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "accelerate launch" in miniature.fails(there, *data)


def test_quick_is_the_labs_recipe_in_as_many_steps_as_fit():
    arm = arm_named(GOALS_FOR).settings(1000, 0)
    request = RestoreRequest(
        Path("c"), "c", ("speech",), EncoderTraining.model_validate(QUICK_TRAINING), Path("clip"), "mine",
        minutes=10.0, quick=True,
    )  # fmt: skip
    assert request.fitting(0.5) == 1200
    assert request.fitting(1000.0) == 10
    own = request.scheduled(1000)
    free = {"discriminator", "report_every", "validate_every", "save_every"}  # of which none is used there
    assert own.model_dump(exclude=free) == arm.model_dump(exclude=free)
    assert not own.weights.feature
    assert own.steps % own.validate_every == 0
    assert own.validate_every % own.report_every == 0
    long = RestoreRequest(Path("c"), "c", ("speech",), EncoderTraining(), Path("clip"), "mine")
    assert long.scheduled(long.fitting(1.0)) == EncoderTraining()


@pytest.mark.parametrize(
    ("cloned", "nll", "asks"),
    [(0.82, 0.55, False), (0.75, 0.55, True), (0.82, 0.65, True), (0.82, None, True)],
)
def test_the_rule_asks_for_an_adaptation_where_clones_fall_behind(cloned, nll, asks):
    def row(name: str, **values: float | None) -> Row:
        cells = {key: Cell(x, x, x, 2) for key, x in values.items() if x is not None}
        return Row(name, "subject", cells)

    rows = [row(DECODED, similarity=0.9), row(CLONED, similarity=cloned, nll=nll), row(PRESET, nll=0.5)]
    found = wants_adaptation(Table("Cloning", [], rows))
    assert found["try"] is asks
    assert ("near enough" in found["why"]) is not asks
