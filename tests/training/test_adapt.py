"""An adaptation learns, leaves the presets as they are or is refused, and can be merged."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import tiny_model
from revox.checkpoint.encoder_file import check_adaptation
from revox.checkpoint.load import load_model
from revox.checkpoint.params import read_params
from revox.checkpoint.release import expected_tensors
from revox.cli import train_command
from revox.synthesis.prompt import Prompter
from revox.training.adapt import AdaptData, AdaptItem, AdaptTrainer, AdaptTraining, Guard, decide
from revox.training.deltas import PARTS, Deltas
from revox.training.errors import TrainingError

TEXTS = ("one two three", "four five six")


def codes_of(frames: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.cat(
        (torch.randint(512, (1, frames), generator=rng), torch.randint(21, (36, frames), generator=rng))
    )


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def data(model) -> AdaptData:
    def items(first: int) -> list[AdaptItem]:
        return [
            AdaptItem(text, codes_of(6, first + i), codes_of(5, first + 10 + i),
                      model.mm_audio_embeddings.voice_embedding(codes_of(5, 90 + i)))
            for i, text in enumerate(TEXTS)
        ]  # fmt: skip

    return AdaptData(items(0), items(20), items(0), items(40))


def trained(model, data, tiny_checkpoint, folder, **changes) -> AdaptTrainer:
    settings = AdaptTraining(steps=12, warmup=1, decay_steps=2, learning_rate=1e-4, **changes)
    run = AdaptTrainer(model, Prompter(tiny_checkpoint), settings, data, folder)
    run.run(lambda row: None, report_every=100, validate_every=100)
    return run


@pytest.mark.parametrize("part", PARTS)
def test_changes_begin_at_nothing_scale_merge_and_come_off(model, part):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    deltas = Deltas.on(model, part, rank=2)
    names = set(deltas.modules)
    assert names
    assert names <= {k.removeprefix("backbone.") for k in before}
    assert all(
        torch.equal(t, before[_own(before, n)].bfloat16()) for n, t in deltas.merged(model, 1.0).items()
    )
    with torch.no_grad():
        for parameter in deltas.parameters():
            parameter.add_(0.1)
    half, whole = (deltas.merged(model, scale) for scale in (0.5, 1.0))
    name = sorted(names)[0]
    base = before[_own(before, name)]
    torch.testing.assert_close(
        2 * (half[name].float() - base), whole[name].float() - base, atol=0.02, rtol=0.05
    )
    assert not torch.equal(whole[name].float(), base)
    if part in ("lora", "attention"):
        assert int(torch.linalg.matrix_rank(deltas.modules[name].change())) <= 2
    deltas.remove(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in model.parameters())


def _own(names, tensor: str) -> str:
    return tensor if tensor in names else f"backbone.{tensor}"


@pytest.mark.parametrize("objective", ["distill", "speech"])
def test_it_learns_its_objective_and_the_untouched_model_is_still_there(
    model, data, tiny_checkpoint, tmp_path, objective
):
    run = trained(model, data, tiny_checkpoint, tmp_path, objective=objective, part="layers")
    item = data.items[0]
    measure = (
        (lambda: run.distillation(item, False, 0)) if objective == "distill" else (lambda: run.cost(item, 0))
    )
    with torch.no_grad():
        after = float(measure())
        with run.deltas.scaled(0.0):
            before = float(measure())
    assert after < 0.95 * before
    assert run.guard(0.0) == Guard(1.0, 0.0)


def test_replaying_a_preset_beside_the_untouched_model_costs_nothing_at_first(
    model, data, tiny_checkpoint, tmp_path
):
    run = AdaptTrainer(model, Prompter(tiny_checkpoint), AdaptTraining(), data, tmp_path)
    with torch.no_grad():
        assert float(run.distillation(data.replay[0], True, 3)) == pytest.approx(0.0, abs=1e-5)


def test_a_change_that_harms_the_presets_is_never_merged(model, data, tiny_checkpoint, tmp_path):
    run = AdaptTrainer(model, Prompter(tiny_checkpoint), AdaptTraining(part="layers"), data, tmp_path)
    assert run.largest_scale()[0] == 1.0
    with torch.no_grad():
        for parameter in run.deltas.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    scale, guard = run.largest_scale()
    assert scale == 0.0
    assert guard.agreement < 0.98


def test_what_gains_no_more_than_its_control_leaves_the_model_alone(model, data, tiny_checkpoint, tmp_path):
    def trainer(settings: AdaptTraining, name: str) -> AdaptTrainer:
        return AdaptTrainer(model, Prompter(tiny_checkpoint), settings, data, tmp_path / name)

    reported: list[str] = []
    still = AdaptTraining(steps=2, warmup=1, decay_steps=1, learning_rate=0.0, save_every=1)
    decision = decide(trainer, still, 2, lambda run, row: reported.append(run))
    assert not decision.adapt
    assert decision.tensors == {}
    assert decision.after == decision.control == decision.before
    assert decision.spread == 0
    gains = dataclasses.replace(decision, after=decision.control - 0.1, spread=0.05)
    assert gains.adapt
    assert not dataclasses.replace(gains, spread=0.2).adapt
    assert not dataclasses.replace(gains, scale=0.0).adapt
    with pytest.raises(TrainingError, match="too little speech"):
        AdaptTrainer(model, Prompter(tiny_checkpoint), still, dataclasses.replace(data, items=()), tmp_path)


def test_a_run_that_was_stopped_goes_on_where_it_was(data, tiny_checkpoint, tmp_path):
    settings = AdaptTraining(steps=4, warmup=1, decay_steps=1, save_every=2, part="lora", rank=2)
    ends = []
    for stops in ((4,), (2, 4)):
        for stop in stops:
            run = AdaptTrainer(
                tiny_model(), Prompter(tiny_checkpoint), settings, data, tmp_path / str(len(stops))
            )
            run.resume()
            while run.step_count < stop:
                run.step()
            run.save()
        ends.append(run.deltas.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_the_command_writes_what_inject_takes_or_says_to_leave_the_model_alone(
    tiny_checkpoint_with_encoder, tmp_path, monkeypatch
):
    given = ["adapt", "-c", str(tiny_checkpoint_with_encoder), "--out", str(tmp_path / "run"), "--steps", "2",
             "--sentences", "3", "--seeds", "1", "--device", "cpu", "--rank", "2",
             "--adapt", "lora"]  # fmt: skip
    from revox.training import adapt, spoken

    # The tiny model babbles, all of it.
    monkeypatch.setattr(spoken, "clear_speech", lambda frames, characters, nll: [True] * len(frames))
    monkeypatch.setattr(adapt.Decision, "adapt", property(lambda self: True))
    monkeypatch.setattr(adapt.Guard, "holds", lambda self, settings: True)
    done = CliRunner().invoke(train_command.app, given)
    assert done.exit_code == 0, (done.output, done.exception)
    path = tmp_path / "run" / "adaptation.safetensors"
    expected = expected_tensors(read_params(tiny_checkpoint_with_encoder).voxtral_config())
    assert set(check_adaptation(path, expected)) == set(load_file(path))
    adapter = tmp_path / "run" / "adapter"
    adapted = load_model(tiny_checkpoint_with_encoder, dtype=torch.float32, adapter=adapter).state_dict()
    assert all(torch.equal(adapted[_own(adapted, n)].bfloat16(), t) for n, t in load_file(path).items())

    failed = CliRunner().invoke(train_command.app, [*given[:-1], "everything"])
    assert isinstance(failed.exception, TrainingError)

    monkeypatch.setattr(adapt.Decision, "adapt", property(lambda self: False))
    done = CliRunner().invoke(train_command.app, given)  # the runs are there already
    assert done.exit_code == 1, (done.output, done.exception)
    assert "leave the model alone" in done.output
    assert not path.exists()
    assert not list(adapter.iterdir())
