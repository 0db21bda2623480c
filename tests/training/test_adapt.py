"""An adaptation learns, leaves the presets as they are or is refused, and can be merged."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import revox
from conftest import TINY, tiny_model
from revox.checkpoint.adapter import read_adapter
from revox.checkpoint.encoder_file import check_adaptation
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.load import load_model
from revox.checkpoint.params import read_params
from revox.checkpoint.release import EMBEDDING_TABLE, ENCODER_PREFIXES, expected_tensors
from revox.checkpoint.tensors import WEIGHTS
from revox.checkpoint.voice_map import MAP_FILE, VoiceMap
from revox.checkpoint.voices import add_voice, load_voice
from revox.cli import train_command, voice_command
from revox.cloning.consent import provenance
from revox.cloning.errors import CloneError
from revox.coding import Coder
from revox.coding.student import StudentEncoder
from revox.demo import checkpoint_folder
from revox.metrics.voice_embeddings import table_deviation
from revox.model.layers import rotate_interleaved, rotation
from revox.model.voxtral import Voxtral
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio, AudioError, write_audio
from revox.synthesis.prompt import Prompter
from revox.training import adapt_data
from revox.training.adapt import (
    SCALES,
    AdaptData,
    AdaptItem,
    AdaptTrainer,
    AdaptTraining,
    Decision,
    Guard,
    decide,
)
from revox.training.adapt_data import (
    AdaptSpeech,
    chosen_cuts,
    clip_items,
    divided,
    reference_codes,
    stamp_of_items,
)
from revox.training.data import find_sources
from revox.training.deltas import PARTS, Deltas
from revox.training.errors import TrainingError
from revox.training.speaker import SpeakerLoss

TEXTS = ("one two three", "four five six")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS_OF_A_STEP = ("weights", "learned", "kept", "matrix")


@pytest.fixture
def run_on_lab(tmp_path):
    """A run of two layers of the lab on what two presets say, each after its voice. Nothing is learned."""
    lab = revox.load(checkpoint_folder(), "cpu")
    items = []
    for name, text in (
        ("casual_female", "We will be back on Thursday."),
        ("casual_male", "Call me on Sunday."),
    ):
        voice = lab.voice(name)
        first, second = (lab.synthesize(text, voice, seed=seed, max_seconds=3.0).codes for seed in range(2))
        items.append(AdaptItem(text, first, second, voice.embedding))
    settings = AdaptTraining(part="layers", agreement=0.0, nats=100.0)
    return AdaptTrainer(lab.model, lab.prompter, settings, AdaptData(items, items, items, items), tmp_path)


def test_speech_that_no_longer_says_its_text_is_refused(run_on_lab):
    run = run_on_lab
    assert 0 < run.new_speech(0.0).nats < 5
    assert run.guard(1.0) == Guard(1.0, 0.0, 0.0)
    with torch.no_grad():
        for parameter in run.deltas.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    run._spoken.clear()
    assert run.guard(1.0).spoken > 2
    asked = []
    assert run.largest_scale(lambda at: asked.append((at.done, at.total)))[0] < 1
    assert asked[0] == (0, len(SCALES))


class Spectrum(torch.nn.Module):
    """A verifier that hears which frequencies up to 400 Hz are loud."""

    rate = 24_000

    def forward(self, waveforms, lengths):
        return torch.fft.rfft(waveforms, n=24_000).abs()[:, 60:400].unflatten(1, (34, 10)).mean(-1)


def test_speech_in_another_voice_is_refused_by_a_verifier_only(run_on_lab, monkeypatch):
    run, prompt = run_on_lab, run_on_lab._prompt
    one, other = run.data.held_out_items

    def exchanged(item, own):
        changed = run.deltas.scale[0] == 1
        return prompt(replace(item, voice=(other if item is one else one).voice) if changed else item, own)

    monkeypatch.setattr(run, "_prompt", exchanged)
    settings = replace(run.settings, spoken=100.0)
    assert run.guard(1.0).similarity == 0.0
    assert run.guard(1.0).holds(settings)
    run._spoken.clear()
    run.verifier = SpeakerLoss(Spectrum())
    assert run.guard(1.0).similarity < -0.05
    assert not run.guard(1.0).holds(settings)
    assert run.guard(0.5).holds(settings)


def test_a_voice_is_as_long_as_a_reference_and_never_the_clip_itself():
    clips = [torch.full((37, 3), i) for i in range(4)]
    assert reference_codes(clips, 2, 100)[0].tolist() == [3, 3, 3, 0, 0, 0, 1, 1, 1]
    assert reference_codes(clips, 0, 4)[0].tolist() == [1, 1, 1, 2]
    assert reference_codes(clips[:1], 0, 100)[0].tolist() == [0, 0, 0]  # a preset of one sentence


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


@pytest.mark.parametrize("part", [part for part in PARTS if part != "map"])
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
    gains = replace(decision, after=decision.control - 0.1, spread=0.05)
    assert gains.adapt
    assert not replace(gains, spread=0.2).adapt
    assert not replace(gains, scale=0.0).adapt
    with pytest.raises(TrainingError, match="too little speech"):
        AdaptTrainer(model, Prompter(tiny_checkpoint), still, replace(data, items=()), tmp_path)


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


MAP = {"part": "map", "objective": "speech", "rank": 2}


def test_a_map_learns_and_the_weights_and_presets_stay_bit_identical(model, data, tiny_checkpoint, tmp_path):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = AdaptData(data.items, (), data.held_out_items, ())  # nothing to replay
    settings = AdaptTraining(**MAP, steps=12, warmup=1, decay_steps=2, learning_rate=0.02, spoken=100.0)
    run = AdaptTrainer(model, Prompter(tiny_checkpoint), settings, given, tmp_path)
    run.run(lambda row: None, report_every=100, validate_every=100)
    assert run.held_out_cost(1.0) < run.held_out_cost(0.5) < run.held_out_cost(0.0)
    scale, guard = run.largest_scale()
    assert (scale, guard.agreement, guard.nats) == (1.0, 1.0, 0.0)
    assert run.deltas.merged(model, 1.0) == {}
    assert run.deltas.adapter(1.0) is None
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    item = data.items[0]
    assert torch.equal(run._voice(item, True), item.own)
    assert not torch.equal(run._voice(item, False)[:-1], run._voice(item, True)[:-1])


def test_a_voice_is_baked_as_the_map_read_it_in_training(model):
    deltas = Deltas.on(model, "map", rank=2)
    rows = model.mm_audio_embeddings.voice_embedding(codes_of(7, 3)).bfloat16()
    assert torch.equal(deltas.mapped(rows.float()), rows.float())  # B is zero at first
    with torch.no_grad():
        for parameter in deltas.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    b, a = (factor.detach() for factor in deltas.modules["voice_map"].factors)
    unit = table_deviation(model)
    for scale in (1.0, 0.5):
        expected = rows.float() + scale * unit * (rows.float() / unit @ a.T @ b.T)
        expected[-1] = rows[-1].float()
        up, down = deltas.voice_map(scale)
        baked = VoiceMap(up.detach(), down.detach(), {}, "").applied(rows)
        torch.testing.assert_close(baked.float(), expected, rtol=2**-7, atol=1e-4)
        with deltas.scaled(scale):
            assert torch.equal(deltas.mapped(rows.float()).bfloat16(), baked)
    with deltas.scaled(0.0):
        assert torch.equal(deltas.mapped(rows.float()), rows.float())


def test_the_control_of_a_map_is_the_model_as_it_is(model, data, tiny_checkpoint, tmp_path):
    def trainer(settings: AdaptTraining, name: str) -> AdaptTrainer:
        return AdaptTrainer(model, Prompter(tiny_checkpoint), settings, data, tmp_path / name)

    settings = AdaptTraining(**MAP, steps=6, warmup=1, decay_steps=1, learning_rate=0.02)
    decision = decide(trainer, settings, 1, lambda run, row: None)
    assert decision.control == decision.before > decision.after
    assert decision.adapt
    assert [len(factor) for factor in decision.voice_map] == [256, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapt-0"]


def write_clips(folder: Path) -> None:
    """Two tones of a second with transcripts for each of four speakers."""
    for speaker in range(4):
        for clip in range(2):
            place = folder / f"speaker{speaker}"
            place.mkdir(parents=True, exist_ok=True)
            t = np.arange(24000) / 24000
            wave = 0.2 * np.sin(2 * np.pi * (150 + 60 * speaker + 9 * clip) * t)
            write_audio(place / f"{clip}.flac", Audio(wave.astype(np.float32), 24000))
            (place / f"{clip}.txt").write_text(TEXTS[clip])


def items_coded_by(
    model: Voxtral, clips: Path, cache: Path, progress: ProgressCallback = ignore_progress
) -> list[AdaptItem]:
    speech = AdaptSpeech((), cache, sources=find_sources([str(clips)]))
    return [item for _, item in clip_items(Coder(model.audio_tokenizer), speech, progress=progress)]


def test_another_encoder_codes_the_clips_anew(tmp_path):
    write_clips(tmp_path / "clips")
    model, cache = tiny_model(with_encoder=True), tmp_path / "cache"
    first = items_coded_by(model, tmp_path / "clips", cache)
    again = items_coded_by(tiny_model(with_encoder=True), tmp_path / "clips", cache)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        for parameter in model.audio_tokenizer.input_proj.parameters():
            parameter.mul_(-3)
    other = items_coded_by(model, tmp_path / "clips", cache)
    fresh = items_coded_by(model, tmp_path / "clips", tmp_path / "fresh")
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(other, fresh, strict=True))
    assert any(not torch.equal(a.codes, b.codes) for a, b in zip(first, other, strict=True))
    assert stamp_of_items(first) == stamp_of_items(again) != stamp_of_items(other)


def test_a_recording_that_is_replaced_is_coded_anew_and_a_damaged_one_is_left_out(tmp_path, monkeypatch):
    write_clips(tmp_path / "clips")
    model, cache, first = tiny_model(with_encoder=True), tmp_path / "cache", tmp_path / "clips" / "speaker0"
    before = items_coded_by(model, tmp_path / "clips", cache)
    noise = np.random.default_rng(0).normal(0, 0.2, 24000)
    write_audio(first / "0.flac", Audio(noise.clip(-1, 1).astype(np.float32), 24000))
    os.utime(first / "0.flac", (1, 1))
    after = items_coded_by(model, tmp_path / "clips", cache)
    changed = [not torch.equal(a.codes, b.codes) for a, b in zip(before, after, strict=True)]
    assert sum(changed) == 1
    decode = adapt_data.decode_cut

    def damaged(source, *given):
        if source == str(first / "0.flac"):
            raise AudioError("is damaged")
        return decode(source, *given)

    monkeypatch.setattr(adapt_data, "decode_cut", damaged)
    seen: list[Progress] = []
    left = items_coded_by(model, tmp_path / "clips", tmp_path / "fresh", seen.append)
    assert len(left) == 6  # and the speaker's other clip, which has no voice to follow
    assert seen[-1].facts == {"damaged": 1}


def test_clips_are_of_many_speakers_and_sources_and_whole_speakers_are_held_out(tmp_path):
    for name in ("one", "two"):
        write_clips(tmp_path / name)
    (tmp_path / "one" / "speaker0" / "1.txt").unlink()
    sources = find_sources([str(tmp_path / "one"), str(tmp_path / "two")])
    chosen = chosen_cuts(AdaptSpeech((), tmp_path, sources=sources, clips=8))
    speakers = [speaker for speaker, _ in chosen]
    assert {speaker[:2] for speaker in speakers} == {"0/", "1/"}
    assert "0/speaker0" not in speakers  # nothing of theirs could be the voice
    assert all(speakers.count(speaker) == 2 for speaker in speakers)
    item = AdaptItem("one", codes_of(4, 0), codes_of(4, 1))
    many = divided([], [(f"speaker{i // 3}", replace(item, text=str(i // 3))) for i in range(12)])
    assert {one.text for one in many.held_out_items} == {"3"}
    assert "3" not in {one.text for one in many.items}
    two = divided([], [(f"speaker{i % 2}", item) for i in range(8)])
    assert len(two.held_out_items) == 2


def test_a_release_without_an_encoder_is_adapted_by_its_student(tiny_checkpoint_copy, tmp_path, monkeypatch):
    from revox.coding import find
    from revox.training import adapt, adapt_model, spoken

    monkeypatch.setattr(spoken, "MAX_FRAMES", 40)
    monkeypatch.setattr(adapt, "SCALES", (1.0,))
    for path in sorted((tiny_checkpoint_copy / "voice_embedding").iterdir())[3:]:
        path.unlink()
    write_clips(tmp_path / "clips")
    given = ["adapt", "-c", str(tiny_checkpoint_copy), "--steps", "1", "--sentences", "4",
             "--device", "cpu", "--out"]  # fmt: skip
    refused = CliRunner().invoke(train_command.app, [*given, str(tmp_path / "none")])
    assert "train a student" in str(refused.exception)
    students = []

    def student(checkpoint, codec):
        students.append(StudentEncoder.for_codec(codec, width=32, blocks=1).eval())
        return students[-1]

    monkeypatch.setattr(adapt_model, "has_trained_student", lambda checkpoint: True)
    monkeypatch.setattr(adapt_model, "trained_student", student)
    monkeypatch.setattr(find, "invert", None)  # nothing is searched for
    monkeypatch.setattr(spoken, "clear_speech", lambda frames, characters, nll: [True] * len(frames))
    speech = ["--objective", "speech", "--data", str(tmp_path / "clips"), "--consent", "Ada, who agreed"]
    for run, more in (("speech", speech), ("distill", [])):
        done = CliRunner().invoke(train_command.app, [*given, str(tmp_path / run), *more])
        assert (tmp_path / run / "adaptation.json").is_file(), (done.output, done.exception)
        assert ("give --verifier" in " ".join(done.output.split())) == (run == "speech")
    assert len(students) == 2


def test_a_map_is_learned_from_clips_and_given_to_a_voice(
    tiny_checkpoint_with_encoder, tmp_path, monkeypatch
):
    checkpoint = Path(shutil.copytree(tiny_checkpoint_with_encoder, tmp_path / "checkpoint"))
    weights = (checkpoint / WEIGHTS).read_bytes()
    write_clips(tmp_path / "clips")
    run, here = str(tmp_path / "run"), ["-c", str(checkpoint)]
    given = ["adapt", *here, "--out", run, "--adapt", "map", "--rank", "2", "--steps", "2",
             "--device", "cpu", "--consent", "Ada, who agreed"]  # fmt: skip
    invoke = CliRunner().invoke
    failed = invoke(train_command.app, [*given, "--objective", "distill", "--data", str(tmp_path / "clips")])
    assert isinstance(failed.exception, TrainingError)
    assert "objective speech" in str(failed.exception)
    assert "name them with --data" in str(invoke(train_command.app, given).exception)
    monkeypatch.setattr("revox.training.adapt.Decision.adapt", property(lambda self: True))
    done = invoke(train_command.app, [*given, "--data", str(tmp_path / "clips")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "cannot serve ref_audio" in " ".join(done.output.split())
    assert not (tmp_path / "run" / "adaptation.safetensors").exists()
    assert not (tmp_path / "run" / "spoken").exists()  # there are no presets to replay

    source = load_voice(checkpoint, "it_male")
    agreed = provenance("Ada, who agreed", "inversion", {})
    add_voice(checkpoint, "ada", source.embedding, codes_of(source.frames, 1), agreed)
    mapping = ["map", "ada2", "--from", "ada", "--map", run, *here]
    done = invoke(voice_command.app, mapping)
    assert done.exit_code == 0, (done.output, done.exception)
    made, factors = load_voice(checkpoint, "ada2"), load_file(tmp_path / "run" / MAP_FILE)
    rows = source.embedding.float()
    expected = rows + rows @ factors["down"].T @ factors["up"].T
    expected[-1] = rows[-1]
    assert torch.equal(made.embedding, expected.bfloat16())
    assert torch.equal(made.codes, codes_of(source.frames, 1))
    assert made.provenance["method"] == "mapped"
    assert made.provenance["settings"]["map"]["training"]["part"] == "map"
    assert len(made.provenance["settings"]["map_sha256"]) == 64
    assert "Ada, who agreed" in made.provenance["consent"]["statement"]
    assert made.provenance["from"] == [{"voice": "ada", "record": agreed}]
    assert torch.equal(load_voice(checkpoint, "it_male").embedding, source.embedding)
    assert (checkpoint / WEIGHTS).read_bytes() == weights

    def refused(sentence: str, *arguments: str) -> None:
        failed = invoke(voice_command.app, ["map", "ada3", *arguments, *here])
        assert isinstance(failed.exception, CheckpointError), failed.exception
        assert sentence in str(failed.exception)

    refused("is mapped already", "--from", "ada2", "--map", run)
    refused("is missing", "--from", "ada", "--map", str(tmp_path / "none"))
    refused("holds no map", "--from", "ada", "--map", str(checkpoint / WEIGHTS))
    state = load_file(checkpoint / WEIGHTS)
    state[EMBEDDING_TABLE][0] += 1
    save_file(state, checkpoint / WEIGHTS)
    refused("of another table of audio codes", "--from", "ada", "--map", run)


@pytest.fixture
def benchmark(monkeypatch):
    """The names of benchmarks/adaptation.py, whose `training` is the script there, not this room of tests."""
    script = importlib.util.spec_from_file_location("training", BENCHMARKS / "training.py")
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "training", module)
    return runpy.run_path(str(BENCHMARKS / "adaptation.py"))


def test_the_benchmark_measures_a_step_and_counts_the_releases(tiny_checkpoint, benchmark):
    options = argparse.Namespace(
        checkpoint=tiny_checkpoint, layers=1, device="cpu", dtype="float32", objective="distill", rank=4,
        seconds=0.4, steps=1,
    )  # fmt: skip
    measured = benchmark["measure"](options, "attention")
    # wq, wk, wv and wo of the one layer left, each of (rows + columns) x rank.
    assert measured["learned"] == 4 * (2 * (256 + 128) + 2 * (256 + 64))
    assert measured["layers"] == 1
    assert measured["seconds"] > 0
    assert measured["peak_gb"] >= measured["loaded_gb"] > 0
    counted = {part: benchmark["count"](options, part) for part in ("attention", "embeddings")}
    assert counted["attention"]["learned"] == 26 * 4 * (2 * (3072 + 4096) + 2 * (3072 + 1024))
    assert counted["embeddings"]["learned"] == 9088 * 3072
    assert counted["attention"]["weights_gb"] == pytest.approx(8.3, abs=0.01)
    assert "map" in benchmark["PARTS"]
    assert benchmark["count"](options, "map")["matrix_gb"] == 0  # it has none
    tuning = benchmark["measure"](options, "tune")
    assert tuning["learned"] == 100 * 256  # 8 s of a voice, the end frame excepted
    assert tuning["seconds"] > 0
    assert benchmark["count"](options, "tune")["learned"] == 100 * 3072
    for one in counted.values():
        assert one["gb"] == pytest.approx(sum(one[f"{part}_gb"] for part in PARTS_OF_A_STEP))
        # More than the inputs of the layers, and less than a layer's every intermediate in all layers.
        assert 2 * 26 * 3072 * one["positions"] / 1e9 < one["kept_gb"] < 2
    settings = vars(options) | {"checkpoint": str(options.checkpoint)}
    found = {
        "date": "today", "machine": "here", "settings": settings,
        "rows": {"attention": {"measured": measured, "counted": counted["attention"]}},
    }  # fmt: skip
    row = benchmark["as_markdown"](found).splitlines()[-3]
    assert row.startswith(f"| attention | {measured['learned']:,} | ")
    assert f"{counted['attention']['gb']:.1f} GB |" in row


def test_the_benchmark_has_the_published_teacher_faults_and_leaves_nothing_of_them(
    model, data, tiny_checkpoint, tmp_path, benchmark
):
    # The other layout is the same rotation of other pairs.
    x, turn = torch.randn(1, 3, 2, 8), rotation(torch.rand(1, 3, 4))
    paired = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
    expected = rotate_interleaved(paired, turn).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(benchmark["rotate_halves"](x, turn), expected)

    trainer = benchmark["PublishedTrainer"]
    run = trainer(model, Prompter(tiny_checkpoint), AdaptTraining(part="attention"), data, tmp_path)
    item = data.replay[0]
    outputs = run._outputs(item, True)[1]

    def cost(*faults: str) -> float:
        trainer.faults = faults
        with torch.no_grad():
            return float(run.distillation(item, True, 0))

    assert cost() == cost("adapter") == pytest.approx(0.0, abs=1e-5)
    assert cost("layout") > 5e-4  # little here, where attention is weak: another model all the same
    with torch.no_grad():
        for parameter in run.deltas.parameters():
            parameter.add_(0.05)
    assert cost() > 0.001
    assert cost("adapter") == pytest.approx(0.0, abs=1e-5)  # whatever it does to the presets
    with run.deltas.scaled(0.0):
        torch.testing.assert_close(run._outputs(item, True)[1], outputs)


def test_the_benchmark_runs_the_published_adaptation_and_leaves_its_adapter(
    tiny_checkpoint_with_encoder, data, tmp_path, monkeypatch, benchmark
):
    spoken = [
        (f"preset{i % 2}", replace(item, text=f"{item.text} {i}")) for i, item in enumerate(4 * data.items)
    ]
    monkeypatch.setattr("revox.training.adapt_model.spoken_presets", lambda *_: [])
    monkeypatch.setattr("revox.training.adapt_model.preset_items", lambda *_: spoken)
    options = argparse.Namespace(
        checkpoint=tiny_checkpoint_with_encoder, run=tmp_path / "run", published="adapter,layout", steps=1,
        device="cpu", dtype="float32",
    )  # fmt: skip
    found = benchmark["published"](options)
    about = json.loads((options.run / "adaptation.json").read_text())
    assert about["guard"]["agreement"] == found.guard.agreement
    assert (about["training"]["rank"], about["training"]["replay"]) == (8, 0)
    adapter = read_adapter(options.run / "published", expected_tensors(TINY))
    assert set(adapter.factors) == {f"layers.{i}.attention.w{m}.weight" for i in range(2) for m in "qkvo"}
    assert all(up.abs().max() > 0 for up, _ in adapter.factors.values())


def test_a_checkpoint_without_an_encoder_is_adapted_to_that_of_a_file(
    tiny_checkpoint_with_encoder, tmp_path, monkeypatch
):
    from revox.training import adapt_model, spoken

    monkeypatch.setattr(spoken, "clear_speech", lambda frames, characters, nll: [True] * len(frames))
    tensors = load_file(tiny_checkpoint_with_encoder / WEIGHTS)
    released = shutil.copytree(tiny_checkpoint_with_encoder, tmp_path / "released")
    (tmp_path / "run").mkdir()
    for path, wanted in ((tmp_path / "run" / "encoder.safetensors", True), (released / WEIGHTS, False)):
        save_file({k: v for k, v in tensors.items() if k.startswith(ENCODER_PREFIXES) is wanted}, path)
    found = []

    def divided(presets, items):
        found.append([item for _, item in presets])
        return AdaptData((), (), (), ())

    monkeypatch.setattr(adapt_model, "divided", divided)
    nothing = Decision(0.0, Guard(1.0, 0.0), 1.0, 1.0, 1.0, 0.0, {})
    monkeypatch.setattr(adapt_model, "decide", lambda *_: nothing)
    request = adapt_model.AdaptRequest(AdaptTraining(), sentences=1, consent="a voice of ours")
    with pytest.raises(TrainingError, match="--encoder"):
        adapt_model.adapt_model(released, tmp_path, request)
    adapt_model.adapt_model(tiny_checkpoint_with_encoder, tmp_path, request)
    request = replace(request, encoder=tmp_path / "run")
    adapt_model.adapt_model(released, tmp_path, request)
    inside, from_file = found
    assert inside
    assert all(torch.equal(a.voice, b.voice) for a, b in zip(inside, from_file, strict=True))
    assert json.loads((tmp_path / "adaptation.json").read_text())["consent"] == "a voice of ours"


def test_the_command_writes_what_inject_takes_or_says_to_leave_the_model_alone(
    tiny_checkpoint_with_encoder, tmp_path, monkeypatch
):
    given = ["adapt", "-c", str(tiny_checkpoint_with_encoder), "--out", str(tmp_path / "run"), "--steps", "2",
             "--sentences", "3", "--device", "cpu", "--rank", "2",
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

    of_somebody = CliRunner().invoke(train_command.app, [*given, "--data", str(tmp_path)])
    assert isinstance(of_somebody.exception, CloneError)
    assert "consent is required" in str(of_somebody.exception)

    somebody = ["--data", str(tmp_path), "--consent", "Ada, who agreed"]
    for refused in ([*somebody, "--objective", "distill"], somebody[2:]):
        assert "leave" in str(CliRunner().invoke(train_command.app, [*given, *refused]).exception)

    monkeypatch.setattr(adapt.Decision, "adapt", property(lambda self: False))
    done = CliRunner().invoke(train_command.app, given)  # the runs are there already
    assert done.exit_code == 1, (done.output, done.exception)
    assert "leave the model alone" in done.output
    assert not path.exists()
    assert not list(adapter.iterdir())
