"""A miniature build: every stage, resumed, to a folder in the release's format."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniature import SETTINGS, write_materials
from typer.testing import CliRunner, Result

from lab import build as lab_build
from lab import language_training
from lab.__main__ import app
from lab.build import (
    BuildRun,
    BuildSettings,
    Materials,
    build,
    encode_speech,
    encoded_language_data,
    encoder_identity,
    finish_decoder,
    finish_trainer,
    half_trainer,
    make_speech,
    pack_spoken,
    predicted_speech,
    train_half,
    train_teacher,
    trained_codec,
    trained_encoder,
    trained_teacher,
    utterance_codes,
    write_params,
)
from lab.codec_training import DecoderTrainer, ReferenceEncoderTrainer, predicted_values
from lab.data import SpeechSet
from lab.errors import LabError
from lab.language_data import TokenizedUtterance
from lab.language_training import LanguageTrainer
from lab.settings import read_settings
from lab.shards import pack
from lab.sizes import PRESETS
from lab.spoken import read_codes
from lab.state_bundle import restore_bundles, write_bundles
from revox import load
from revox.checkpoint.load import load_model
from revox.checkpoint.params import read_params
from revox.checkpoint.release import expected_tensors
from revox.checkpoint.tensors import WEIGHTS, read_header
from revox.checkpoint.voice_codes import recover_codes
from revox.checkpoint.voices import load_voice
from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.training.distill import WhisperTeacher
from revox.training.errors import TrainingError
from revox.training.initial import even_input, initialize, oscillators
from revox.training.quantize import quantize_acoustic
from revox.training.run import Run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAB = Path(__file__).parents[2] / "lab"
TEXT = "the train leaves at noon"
LATER = ("teacher", "encoder", "decoder", "finish", "language", "tune", "folder")


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    with pytest.MonkeyPatch.context() as patch:
        yield write_materials(tmp_path_factory.mktemp("materials"), patch)


@pytest.fixture(scope="module")
def built(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("build")
    encoder = root / "reference" / "encoder.safetensors"
    build(BuildRun(root / "run", SETTINGS), root / "checkpoint", encoder, materials)
    return root


def _copy(built: Path, folder: Path, *parts: str) -> Path:
    """The folders `parts` of the finished build in another build's folder."""
    for part in parts:
        shutil.copytree(built / "run" / part, folder / "run" / part)
    return folder


def _run(built: Path, settings: BuildSettings = SETTINGS) -> BuildRun:
    return BuildRun(built / "run", settings)


def _trainer(stage: str, run: BuildRun) -> ReferenceEncoderTrainer | DecoderTrainer:
    return finish_trainer(run) if stage == "finish" else half_trainer(stage, run)


def test_the_built_folder_has_the_releases_inventory_and_its_encoder_is_a_file_apart(built: Path):
    expected = expected_tensors(read_params(built / "checkpoint").voxtral_config())
    found = read_header(built / "checkpoint" / "consolidated.safetensors")
    reference = read_header(built / "reference" / "encoder.safetensors")
    encoder = {name for name, spec in expected.items() if spec.component == "codec_encoder"}
    assert set(found) == set(expected) - encoder
    assert set(reference) == encoder
    for name, header in {**found, **reference}.items():
        assert tuple(header.shape) == tuple(expected[name].shape), name
        assert header.dtype == "BF16"


def test_a_presets_embedding_is_the_sum_of_its_own_codes_under_the_reference_encoder(built: Path):
    folder = built / "checkpoint"
    model = load_model(folder)
    voice = load_voice(folder, PRESETS[3])
    recovered = recover_codes(
        voice.embedding, model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight, model.config
    )
    assert torch.equal(model.mm_audio_embeddings.voice_embedding(recovered.codes), voice.embedding)


def test_the_built_model_speaks(built: Path):
    import revox

    tts = revox.load(built / "checkpoint")
    audio = tts.speak(TEXT, PRESETS[0], max_seconds=0.4)
    assert audio.rate == 24000
    assert np.isfinite(audio.samples).all()


@pytest.mark.parametrize("stage", ["encoder", "decoder", "finish"])
def test_an_interrupted_run_goes_on_as_an_uninterrupted_one(built, tmp_path: Path, stage: str):
    def trainer(name: str):
        return _trainer(stage, _run(tmp_path / name))

    for name in ("a", "b"):
        _copy(built, tmp_path / name, "data", "teacher", "folder")
        if stage == "finish":
            _copy(built, tmp_path / name, "encoder", "decoder", "language")
    whole = trainer("a")
    expected = [whole.step()["loss"] for _ in range(4)]
    first = trainer("b")
    found = [first.step()["loss"] for _ in range(2)]
    first.save()
    second = trainer("b")
    assert second.step_count == 2
    found += [second.step()["loss"] for _ in range(2)]
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(second.state(), whole.state(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stage", "half"), [("encoder", "encoder"), ("finish", "decoder")])
def test_the_average_of_the_weights_is_validated_and_what_is_taken_from_a_run(
    built: Path, tmp_path: Path, stage: str, half: str
):
    longer: Any = {stage: replace(getattr(SETTINGS, stage), steps=8)}
    settings = replace(SETTINGS, **longer)
    trainer = _trainer(stage, _run(built, settings))
    names = trainer.codec.state_dict()
    name = next(k for k in names if k.startswith(half) and k.endswith("layers.0.attention.wq.weight"))
    expected = trainer.shipped.state_dict()[name].clone()
    for n in range(2):
        trainer.take_step()
        share = min(0.5, (5 + n) / (14 + n))  # the build took four steps before
        expected = share * expected + (1 - share) * trainer.codec.state_dict()[name]
        assert torch.allclose(trainer.shipped.state_dict()[name], expected, atol=1e-6)
    state = torch.load(built / "run" / stage / f"{stage}-state.pt", weights_only=True)
    average = state["averaged"][f"module.{name}"]
    assert not torch.equal(state["codec"][name], average)
    untuned = _run(_copy(built, tmp_path, "folder", "encoder", "finish"))
    assert torch.equal(trained_codec(untuned).state_dict()[name], average.bfloat16().float())
    evaluated = trainer.validate()
    with torch.no_grad():
        for p in trainer.codec.parameters():
            p.mul_(2)
    assert trainer.validate() == evaluated
    without: Any = {stage: replace(getattr(SETTINGS, stage), average=0.0)}
    plain = _trainer(stage, _run(built, replace(SETTINGS, **without)))
    assert plain.shipped is plain.codec


def test_the_shipped_model_speaks_with_the_average_of_its_weights(built: Path):
    state = torch.load(built / "run" / "language" / "language-state.pt", weights_only=True)
    name = next(k for k in state["model"] if k.endswith("layers.0.attention.wq.weight"))
    expected = state["averaged"][f"module.{name}"]
    assert not torch.equal(state["model"][name], expected)
    assert torch.equal(load_model(built / "checkpoint").state_dict()[name], expected.bfloat16())


def test_a_build_resumes_in_another_folder_from_its_state_bundles(
    built: Path, materials: Materials, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(Run, "step", lambda self: pytest.fail(f"{self.log_path.stem} took a step"))
    made = write_bundles(built / "run", tmp_path / "run" / "state")
    assert max(path.stat().st_size for path in made) < 16e6
    _copy(built, tmp_path, "data")
    out, encoder = tmp_path / "checkpoint", tmp_path / "encoder.safetensors"
    build(_run(tmp_path), out, encoder, materials, stages=LATER)
    for name in (WEIGHTS, "params.json", f"voice_embedding/{PRESETS[0]}.pt"):
        there, here = (folder / "checkpoint" / name for folder in (tmp_path, built))
        assert there.read_bytes() == here.read_bytes()


def test_a_build_goes_on_from_bundled_weights_alone(built: Path, tmp_path: Path):
    whole = sum(path.stat().st_size for path in write_bundles(built / "run", tmp_path / "whole"))
    _copy(built, tmp_path, "data", "folder", "language")
    made = write_bundles(built / "run", tmp_path / "run" / "state", weights=True)
    assert sum(path.stat().st_size for path in made) < whole / 3
    shutil.rmtree(tmp_path / "run" / "language")
    assert set(restore_bundles(tmp_path / "run" / "state", tmp_path / "run")) == set(LATER) - {"folder"}
    longer = replace(SETTINGS, finish=replace(SETTINGS.finish, steps=6), encoder=SETTINGS.encoder)
    run = _run(tmp_path, longer)
    for stage in ("encoder", "finish"):
        with run.state(stage) as slim, _run(built).state(stage) as state:
            averaged = {k.removeprefix("module."): v for k, v in state["averaged"].items()}
            assert all(
                torch.equal(v.float(), averaged[k].bfloat16().float()) for k, v in slim["codec"].items()
            )
    complete = (tmp_path / "run" / "finish" / "finish-state.pt").read_bytes()
    finish_decoder(_run(tmp_path))
    assert (tmp_path / "run" / "finish" / "finish-state.pt").read_bytes() == complete
    trainer = finish_trainer(run)
    assert trainer.step_count == SETTINGS.finish.steps
    for name, value in trainer.codec.state_dict().items():
        assert torch.equal(trainer.shipped.state_dict()[name], value), name
    trainer.step()
    language = LanguageTrainer(
        run.params.voxtral_config(), SETTINGS.language, encoded_language_data(run), run.folder / "language"
    )
    assert language.resume()
    assert language.step_count == SETTINGS.language.steps
    assert language.averaged is not None
    for name, value in language.model.state_dict().items():
        assert torch.equal(language.averaged.module.state_dict()[name], value), name
    language.step()


def test_a_state_holds_its_own_half_and_one_without_it_is_refused(built: Path):
    trainer = half_trainer("decoder", _run(built))
    state = trainer.state()
    for name in (*state["codec"], *state["averaged"]):
        assert not name.removeprefix("module.").startswith(("encoder_blocks.", "input_proj."))
    name = next(name for name in state["codec"] if name.startswith("decoder_blocks."))
    with pytest.raises(LabError, match=f"lacks {name}"):
        trainer.load_state(state | {"codec": {k: v for k, v in state["codec"].items() if k != name}})


def test_a_finished_stage_is_not_repeated(built: Path, materials: Materials, monkeypatch):
    monkeypatch.setattr(Run, "step", lambda self: pytest.fail(f"{self.log_path.stem} took a step"))
    monkeypatch.setattr(WhisperTeacher, "load", lambda folder: pytest.fail("its states are kept"))
    train_teacher(replace(_run(built), whisper=materials.whisper))
    for half in ("encoder", "decoder"):
        train_half(half, _run(built))
    finish_decoder(_run(built))
    longer = replace(SETTINGS, encoder=replace(SETTINGS.encoder, steps=5))
    with pytest.raises(pytest.fail.Exception, match="encoder-log took a step"):
        train_half("encoder", _run(built, longer))


def test_a_teacher_whose_steps_are_lowered_to_those_taken_gets_its_levels(built: Path, tmp_path: Path):
    run = _run(_copy(built, tmp_path, "data", "folder", "teacher"))
    path = run.folder / "teacher" / "teacher-state.pt"
    state = torch.load(path, weights_only=True)
    assert state.pop("leveled")  # as states were before
    torch.save(state, path)
    expected = trained_teacher(run).gain
    state["teacher"]["gain"] = torch.ones(36)
    torch.save(state | {"leveled": False}, path)
    with pytest.raises(LabError, match="run the stage `teacher` again"):
        trained_teacher(run)
    train_teacher(run)
    torch.testing.assert_close(trained_teacher(run).gain, expected)
    assert (expected != 1).any()


def test_semantic_codes_that_are_missing_are_made_by_the_stage_teacher(built: Path, tmp_path: Path):
    run = _run(_copy(built, tmp_path, "data", "folder", "teacher"))
    for path in (run.folder / "teacher").glob("semantic-*"):
        path.unlink()
    with pytest.raises(LabError, match="run the stage `teacher` again"):
        half_trainer("encoder", run)


def test_encoder_and_decoder_share_the_teachers_codebook(built: Path):
    teacher = torch.load(built / "run" / "teacher" / "teacher-state.pt", weights_only=True)["teacher"]
    codec = trained_codec(_run(built))
    assert torch.allclose(codec.quantizer.semantic_codebook.embedding, teacher["rows"], rtol=0.01, atol=0.01)


def test_training_one_half_leaves_the_other_alone(built: Path):
    settings = replace(SETTINGS, encoder=replace(SETTINGS.encoder, steps=8))
    trainer = half_trainer("encoder", _run(built, settings))
    before = {k: v.clone() for k, v in trainer.codec.state_dict().items()}
    trainer.step()
    changed = {k for k, v in trainer.codec.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith(("input_proj.", "encoder_blocks.")) for k in changed)


def test_the_encoder_learns_the_teachers_codes(built: Path):
    settings = replace(
        SETTINGS, encoder=replace(SETTINGS.encoder, steps=60, learning_rate=1e-3, decay_steps=1)
    )
    trainer = half_trainer("encoder", _run(built, settings))
    batch = trainer.batch()

    def cost() -> float:
        with torch.no_grad():
            losses = trainer.losses(trainer.codec, *batch)
        return float(losses["semantic"] + losses["acoustic"] + losses["deep"])

    first = cost()
    for _ in range(40):
        trainer.step()
    assert cost() < 0.95 * first


def test_the_encoder_starts_with_its_first_transformer_alone(built: Path, tmp_path: Path):
    run = _run(built, replace(SETTINGS, encoder=replace(SETTINGS.encoder, front_steps=2)))
    trainer = half_trainer(
        "encoder", replace(run, folder=_copy(built, tmp_path, "data", "teacher", "folder") / "run")
    )
    start = {k: v.clone() for k, v in trainer.codec.state_dict().items()}
    assert ["front" in trainer.step() for _ in range(2)] == [True, True]
    changed = {k for k, v in trainer.codec.state_dict().items() if not torch.equal(v, start[k])}
    assert changed
    assert all(k.startswith(("input_proj.", "encoder_blocks.0.")) for k in changed)
    assert "agreement" in trainer.step()


def test_the_discriminators_teach_the_decoder_from_a_chosen_step(built: Path, tmp_path: Path):
    _copy(built, tmp_path, "data", "teacher", "folder")
    trainer = half_trainer("decoder", _run(tmp_path))
    rows = [trainer.step() for _ in range(4)]
    assert ["adversarial" in row for row in rows] == [False, False, True, True]


def test_a_step_changes_only_the_discriminators_that_it_draws(built: Path, tmp_path: Path):
    _copy(built, tmp_path, "data", "teacher", "folder", "encoder", "language")
    once = replace(SETTINGS.finish, discriminated_at_once=1)
    run = _run(tmp_path, replace(SETTINGS, finish=once, decoder=replace(SETTINGS.decoder, steps=0)))
    trainer = finish_trainer(run)  # without the stage `decoder`, at its beginning
    changed = set()
    for _ in range(8):
        before = [[p.detach().clone() for p in net.parameters()] for net in trainer.discriminators.nets]
        assert "adversarial" in trainer.step()
        now = [list(net.parameters()) for net in trainer.discriminators.nets]
        moved = [
            i for i, (a, b) in enumerate(zip(before, now, strict=True)) if not all(map(torch.equal, a, b))
        ]
        assert len(moved) == 1
        changed |= set(moved)
    assert changed == set(range(len(now)))


@pytest.mark.parametrize(("average", "source"), [(0.1, "averaged"), (0.5, "codec")])
def test_the_decoder_goes_on_from_exactly_what_it_learned_with_the_encoders_codes(
    built: Path, tmp_path: Path, average: float, source: str
):
    """From the average of its weights, unless that still holds initial ones."""
    settings = replace(SETTINGS, finish=replace(SETTINGS.finish, average=average))
    copy = _copy(built, tmp_path, "data", "teacher", "folder", "encoder", "decoder", "language")
    run = _run(copy, settings)
    trainer = finish_trainer(run)
    with run.state("decoder") as decoder:
        expected = {k.removeprefix("module."): v for k, v in decoder[source].items()}
    assert trainer.step_count == 0
    for codec in (trainer.codec, trainer.shipped):
        found = {k: v for k, v in codec.state_dict().items() if k in expected}
        torch.testing.assert_close(
            found, {k: v for k, v in expected.items() if k != "n_averaged"}, rtol=0, atol=0
        )
    for name, module in (("heads", trainer.heads), ("discriminators", trainer.discriminators)):
        torch.testing.assert_close(dict(module.state_dict()), dict(decoder[name]), rtol=0, atol=0)
    (train, *_), speech = trainer.synthetic.sets, run.speech("train")
    codes = encode_speech(trained_encoder(run), speech.waveform(0))
    frames = codes.shape[1]
    assert np.array_equal(train.codes[:frames], codes[0])
    assert np.array_equal(np.rint(train.values[:frames].astype(np.float32) * 10 + 10).T, codes[1:])


def test_the_finishing_runs_state_holds_what_balances_its_losses(built: Path):
    with _run(built).state("finish") as state:
        balancer = state["balancer"]
    losses = ("mel", "magnitude", "feature", "adversarial")
    assert balancer["counts"] == dict.fromkeys(losses, SETTINGS.finish.steps)
    assert all(balancer["squares"][name] > 0 for name in losses)


def test_the_language_model_is_fed_its_own_past_from_a_chosen_step(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    language = replace(SETTINGS.language, steps=4, own_share=1.0, own_from=2)
    settings = replace(SETTINGS, language=language)
    run = _run(built, settings)
    data = encoded_language_data(run)
    trainer = LanguageTrainer(run.params.voxtral_config(), language, data, tmp_path)
    read: list[int] = []
    own = language_training.predicted_ids

    def noted(*args: Any) -> list[torch.Tensor]:
        if args[1]:
            read.append(trainer.step_count)
        return own(*args)

    monkeypatch.setattr(language_training, "predicted_ids", noted)
    for _ in range(4):
        trainer.step()
    assert read == [2, 3]


def test_semantic_codes_are_not_made_without_phonemes(built: Path, materials: Materials, tmp_path: Path):
    copy = _copy(built, tmp_path, "data", "folder")
    with pytest.raises(LabError, match=r"lab\.speech\.durations --kokoro MODEL --voices FILE --index"):
        train_teacher(replace(_run(copy), spoken=tmp_path, whisper=materials.whisper))


def test_the_decoder_is_not_tuned_on_a_part_of_the_speech(tmp_path: Path):
    language = replace(SETTINGS.language, speakers=0.5)
    settings = replace(SETTINGS, language=language)
    with pytest.raises(LabError, match="leaves a part of it out"):
        build(_run(tmp_path, settings), tmp_path / "out", tmp_path / "e", Materials())
    with pytest.raises(LabError, match="--speech"):  # untuned it goes on
        build(
            _run(tmp_path, replace(settings, predicted_share=0.0)),
            tmp_path / "out",
            tmp_path / "e",
            Materials(),
        )


def test_an_encoder_goes_on_with_the_teacher_codecs_present_codebook(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = _copy(built, tmp_path, "data", "folder", "teacher", "encoder")
    given = lab_build.semantic_data(_run(copy), trained_teacher(_run(copy)))
    monkeypatch.setattr(lab_build, "semantic_data", lambda *_: given)
    path = copy / "run" / "teacher" / "teacher-state.pt"
    state = torch.load(path, weights_only=True)
    state["teacher"]["rows"] += 0.5
    torch.save(state, path)
    run = _run(copy)
    trainer = half_trainer("encoder", run)
    for codec in (trainer.codec, trainer.shipped):
        book = codec.quantizer.semantic_codebook
        rows = book.embedding_sum / book.cluster_usage[:, None]
        torch.testing.assert_close(rows, trained_teacher(run).rows)


def _command(folder: Path, settings: BuildSettings, materials: Materials, *options: str) -> Result:
    config = folder / "settings.json"
    config.write_text(json.dumps(asdict(settings)))
    arguments = [
        "build", str(folder / "run"), "--out", str(folder / "out"), "--encoder", str(folder / "e"),
        "--config", str(config), "--whisper", str(materials.whisper),
    ]  # fmt: skip
    return CliRunner().invoke(app, [*arguments, *options])


def test_the_command_says_that_a_folder_is_complete_only_where_it_has_made_one(
    built: Path, materials: Materials, tmp_path: Path
):
    shutil.copytree(built / "run", tmp_path / "run")
    done = _command(tmp_path, SETTINGS, materials, "--stage", "teacher")
    assert done.exit_code == 0
    assert "done: teacher" in done.output
    assert not (tmp_path / "out").exists()
    made = _command(tmp_path, SETTINGS, materials, "--stage", "folder")
    assert f"{tmp_path / 'out'} is complete" in made.output
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_the_command_says_how_long_a_stage_still_takes(built: Path, materials: Materials, tmp_path: Path):
    stages = {"teacher": 4, "encoder": 4, "decoder": 4, "finish": 4, "language": 3, "tune": 2}
    often: Any = {name: replace(getattr(SETTINGS, name), report_every=1) for name in stages}
    shutil.copytree(built / "run", tmp_path / "run")
    for stage in stages:
        (tmp_path / "run" / stage / f"{stage}-state.pt").unlink()
    asked = [part for stage in stages for part in ("--stage", stage)]
    output = _command(tmp_path, replace(SETTINGS, **often), materials, *asked).output
    for stage, steps in stages.items():
        of = re.findall(rf"{stage}  step (\d+) of {steps}, (\d+ min \d+ s) left", output)
        assert [int(step) for step, _ in of] == list(range(1, steps + 1)), output
        assert of[-1][1] == "0 min 00 s"


def test_speech_folders_may_be_several_and_a_missing_material_is_named(
    built: Path, materials: Materials, tmp_path: Path
):
    (whole,) = materials.speech
    lines = (whole / "index.jsonl").read_text().splitlines(keepends=True)
    halves = tmp_path / "one", tmp_path / "two"
    for folder, part in zip(halves, (lines[:20], lines[20:]), strict=True):
        folder.mkdir()
        (folder / "audio").symlink_to(whole / "audio")
        (folder / "index.jsonl").write_text("".join(part))
    speech = [part for folder in halves for part in ("--speech", str(folder))]
    humans = ["--librispeech", str(materials.librispeech)]
    done = _command(tmp_path, SETTINGS, materials, *speech, *humans, "--stage", "speech")
    assert done.exit_code == 0, done.output
    for path in (built / "run" / "data").iterdir():
        assert (tmp_path / "run" / "data" / path.name).read_bytes() == path.read_bytes()
    run = BuildRun(tmp_path / "run", SETTINGS)
    for stage, missing in (("speech", "--speech"), ("teacher", "--whisper")):
        with pytest.raises(LabError, match=missing):
            build(run, tmp_path / "out", tmp_path / "e", Materials(), stages=(stage,))


def test_what_has_been_tuned_is_not_finished_again(built: Path, tmp_path: Path):
    copy = _copy(built, tmp_path, "data", "folder", "teacher", "encoder", "language", "tune")
    build(_run(copy), tmp_path / "out", tmp_path / "e", Materials(), stages=("finish", "folder"))
    assert not (tmp_path / "run" / "finish").exists()
    made = (tmp_path / "out" / WEIGHTS).read_bytes()
    assert made == (built / "checkpoint" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("there", "asked", "missing"),
    [
        ((), "encoder", "teacher"),
        (("teacher", "encoder"), "finish", "decoder"),
        (("teacher", "decoder"), "finish", "encoder"),
        (("teacher", "decoder"), "language", "encoder"),
        (("teacher", "encoder", "finish"), "tune", "language"),
        (("encoder",), "folder", "finish"),
        (("encoder", "finish"), "folder", "language"),
    ],
)
def test_a_stage_asked_for_before_its_predecessor_says_which_one_is_missing(
    built: Path, tmp_path: Path, there: tuple[str, ...], asked: str, missing: str
):
    _copy(built, tmp_path, "data", *there)
    with pytest.raises(LabError, match=f"run the stage `{missing}` first"):
        build(_run(tmp_path), tmp_path / "out", tmp_path / "encoder", Materials(), stages=(asked,))


def test_a_stage_without_its_speech_says_which_stage_makes_it(
    built: Path, materials: Materials, tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(built / "run", run)
    (run / "data" / "synthetic-train.json").unlink()
    shutil.rmtree(run / "tune")
    for stage in ("teacher", "encoder", "decoder", "finish"):
        with pytest.raises(LabError, match="no synthetic speech: run the stage `speech` first"):
            build(_run(tmp_path), tmp_path / "out", tmp_path / "e", materials, stages=(stage,))


@pytest.mark.parametrize(
    ("gone", "asked"),
    [("teacher", "encoder"), ("teacher", "decoder"), ("encoder", "finish"), ("decoder", "finish"),
     ("encoder", "language"), ("finish", "tune"), ("language", "tune"), ("tune", "folder"),
     ("language", "folder")],
)  # fmt: skip
def test_a_stage_whose_predecessors_state_cannot_be_used_says_which(
    built: Path, tmp_path: Path, gone: str, asked: str
):
    shutil.copytree(built / "run", tmp_path / "run")
    (tmp_path / "run" / asked / f"{asked}-state.pt").unlink(missing_ok=True)
    if asked == "finish":
        shutil.rmtree(tmp_path / "run" / "tune")
    path = tmp_path / "run" / gone / f"{gone}-state.pt"
    whole = path.read_bytes()

    def ask() -> None:
        out = tmp_path / "out"
        build(_run(tmp_path), out, tmp_path / "e", Materials(), stages=(asked,))

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match=rf"{gone}-state\.pt cannot be read"):
        ask()
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(TrainingError, match=rf"{gone}-state\.pt is of a network of other sizes or parts"):
        ask()
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_width_is_a_sentence(built: Path):
    other = replace(SETTINGS, teacher=replace(SETTINGS.teacher, width=24))
    with pytest.raises(TrainingError, match="other sizes or parts"):
        trained_teacher(_run(built, other))


def test_a_build_takes_its_speech_from_shards_where_there_are_some(built: Path, tmp_path: Path):
    pack(built / "run" / "data", tmp_path / "shards")
    make_speech(BuildRun(tmp_path, SETTINGS), Materials())
    assert {path.name for path in (tmp_path / "data").glob("*.json")} == {
        path.name for path in (built / "run" / "data").glob("*.json")
    }
    for split, kind in (("train", "synthetic"), ("more", "synthetic"), ("train", "human")):
        made, copied = (SpeechSet(folder / "data", split, kind) for folder in (built / "run", tmp_path))
        assert copied.utterances == made.utterances
        assert len(copied.waveform(1)) == len(made.waveform(1))


def test_training_quantizes_half_dithers_a_quarter_and_passes_a_quarter():
    rng = torch.Generator().manual_seed(0)
    value = torch.tanh(torch.randn(2000, 3, 36, generator=rng))
    read = quantize_acoustic(value, 21, rng)
    rounded = ((value + 1) / 2 * 20).round() / 10 - 1
    exact = (read - value).abs().amax((1, 2)) < 1e-6
    whole = (read - rounded).abs().amax((1, 2)) < 1e-5
    assert abs(float(whole.float().mean()) - 0.5) < 0.04
    assert abs(float(exact.float().mean()) - 0.25) < 0.04
    noise = (read - value)[~exact & ~whole]
    assert float(noise.abs().max()) <= 1 / 21 + 1e-6
    assert float(noise.abs().max()) > 0.9 / 21


def test_rounding_lets_the_gradient_through():
    value = torch.linspace(-0.9, 0.9, 36).repeat(64, 1, 1).requires_grad_()
    quantize_acoustic(value, 21, torch.Generator().manual_seed(0)).sum().backward()
    assert torch.allclose(value.grad, torch.ones_like(value))


def test_codes_are_the_encoders_and_are_cached_until_its_encoder_changes(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = _run(_copy(built, tmp_path, "data", "folder", "encoder", "language"))
    speech, codec = run.speech("train"), trained_encoder(run)

    def encoded() -> list[np.ndarray]:
        return [encode_speech(codec, speech.waveform(i)) for i in range(len(speech))]

    def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    before = encoded()
    with monkeypatch.context() as patch:
        patch.setattr("lab.build.encode_speech", lambda *_: pytest.fail("the build has cached them"))
        assert same(utterance_codes(run, codec, "synthetic", "train"), before)
    next(codec.input_proj.parameters()).neg_()
    after = utterance_codes(run, codec, "synthetic", "train")
    assert same(after, encoded())
    assert not same(after, before)


def test_another_size_of_codebook_needs_a_folder_of_its_own(built: Path, tmp_path: Path):
    sizes = {**SETTINGS.codec_sizes, "semantic_codebook_size": 16}
    _copy(built, tmp_path, "folder")
    with pytest.raises(LabError, match="folder of its own"):
        write_params(_run(tmp_path, replace(SETTINGS, codec_sizes=sizes)))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"language": {"own_form": 3}}', "language.own_form: there is no setting"),
        ('{"languagewidth": 128}', "languagewidth: there is no setting"),
        ('{"guide": {"steps": 3}}', "guide: it is now teacher"),
        ('{"language": {"steps": "many"}}', "language.steps: "),
        ("[]", "object"),
        ("{", "JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, written: str | None, message: str):
    path = tmp_path / "settings.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises(LabError, match=message):
        read_settings(path)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("lab-build*.json")), ids=lambda path: path.stem)
def test_the_committed_settings_are_read_as_they_are_written(path: Path):
    settings, given = asdict(read_settings(path)), json.loads(path.read_text())
    for stage in ("teacher", "encoder", "decoder", "finish", "language", "tune"):
        assert {
            k: v for k, v in given[stage].items() if json.loads(json.dumps(settings[stage][k])) != v
        } == {}
        if settings[stage]["steps"]:  # a stage without steps is left out
            assert settings[stage]["warmup"] + settings[stage]["decay_steps"] < settings[stage]["steps"]


def test_a_language_model_of_another_width_is_built_and_speaks(built: Path, tmp_path: Path):
    settings = replace(SETTINGS, language_width=128)
    run = tmp_path / "run"
    run.mkdir()
    for part in ("data", "teacher", "encoder", "finish"):
        (run / part).symlink_to(built / "run" / part)
    encoder = tmp_path / "reference" / "encoder.safetensors"
    stages = ("language", "folder")
    build(BuildRun(run, settings), tmp_path / "out", encoder, Materials(), stages=stages)
    assert read_params(tmp_path / "out").voxtral_config().backbone.dim == 128
    shapes = {n: e.shape for n, e in read_header(tmp_path / "out" / WEIGHTS).items()}
    assert shapes["layers.0.attention.wq.weight"] == (128, 128)
    audio = load(tmp_path / "out", device="cpu").speak("ten past nine", PRESETS[0], max_seconds=0.4)
    assert len(audio.samples)
    with pytest.raises(LabError, match="of its own"):
        build(_run(tmp_path), tmp_path / "out", encoder, Materials(), stages=stages)
    with pytest.raises(LabError, match="multiple of 128"):
        write_params(BuildRun(tmp_path / "other", replace(SETTINGS, language_width=192)))


def test_the_codecs_ends_start_as_oscillators_that_encode_and_decode_a_tone():
    config = CodecConfig(dim=64, hidden_dim=32, head_dim=16, n_heads=4, n_kv_heads=4)
    codec = Codec(config, with_encoder=True)
    initialize(codec, 0)
    atoms = oscillators(64, 240, 7, 24000)
    assert np.allclose(np.linalg.norm(atoms, axis=1), 1)
    hidden = torch.zeros(1, 64, 20)
    hidden[0, 40, 5] = 1.0
    wave = codec.output_proj(hidden).transpose(1, 2).flatten().detach().numpy()
    assert np.allclose(wave[5 * 240 : 12 * 240], atoms[40] * 0.07, atol=1e-5)
    hidden = codec.input_proj(torch.from_numpy(atoms[40]).float().reshape(1, 7, 240).transpose(1, 2))
    assert hidden.shape == (1, 64, 7)
    aligned = torch.from_numpy(np.pad(atoms[40][::-1].copy(), (240, 0))).float().reshape(1, 8, 240)
    assert int(codec.input_proj(aligned.transpose(1, 2))[0, :, -1].argmax()) == 40


def test_each_pair_of_oscillators_answers_speech_equally_strongly():
    codec = Codec(CodecConfig(dim=16, hidden_dim=32, head_dim=4, n_heads=4, n_kv_heads=4), with_encoder=True)
    initialize(codec, 0)
    noise = torch.randn(2, 24000, generator=torch.Generator().manual_seed(0))
    falling = torch.cumsum(noise, dim=1) * 0.01  # 6 dB less at each octave
    even_input(codec, falling, 0.8)
    answers = codec.input_proj(falling.unflatten(1, (-1, 240)).transpose(1, 2))
    pairs = answers.unflatten(1, (-1, 2)).square().sum(2).mean((0, 2)).sqrt()
    torch.testing.assert_close(pairs, torch.full((8,), 0.8))


def test_the_language_model_learns_from_codes_whose_sound_is_gone(
    built: Path, materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = replace(_run(built), spoken=tmp_path / "spoken")
    with_sound, _ = encoded_language_data(run)
    monkeypatch.setattr(lab_build, "SPOKEN_AT_ONCE", 20)
    encode, left = lab_build.encode_speech, iter(range(30))

    def interrupted(codec: Codec, wave: np.ndarray) -> np.ndarray:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(codec, wave)

    with monkeypatch.context() as during:
        during.setattr(lab_build, "encode_speech", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack_spoken(run, run.spoken, materials.speech)
    assert pack_spoken(run, run.spoken, materials.speech) == (26, 46)
    assert pack_spoken(run, run.spoken, materials.speech) == (0, 46)
    same, _ = encoded_language_data(run)  # nothing twice
    assert len(same.utterances) == len(with_sound.utterances)
    copy = _copy(built, tmp_path, "data", "folder", "encoder", "teacher")
    for path in (copy / "run" / "data").glob("synthetic-more*"):
        path.unlink()
    without, _ = encoded_language_data(replace(_run(copy), spoken=run.spoken))
    changed = [u for u in with_sound.utterances if u.speaker.endswith(("-0.94", "-1.06")) and not u.human]

    def keys(utterances: list[TokenizedUtterance]) -> set[tuple[Any, ...]]:
        return {(u.speaker, u.preset, *(t.tokens for t in u.texts), u.codes.tobytes()) for u in utterances}

    assert keys(without.utterances) == keys(with_sound.utterances) - keys(changed)


def test_the_decoder_is_tuned_on_what_the_language_model_predicts_of_true_pasts(built: Path, tmp_path: Path):
    copy = _copy(built, tmp_path, "data", "folder", "teacher", "encoder", "finish", "language")
    run = _run(copy)
    found = predicted_speech(run, "human")
    codes = utterance_codes(run, trained_encoder(run), "human", "train")
    assert [c.shape for c in found] == [c.shape for c in codes]
    assert all(one.min() >= 0 and one[1:].max() < 21 for one in found)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(found, codes, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(found, codes, strict=True))
    again = predicted_speech(run, "human")
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    path = copy / "run" / "language" / "language-state.pt"
    state = torch.load(path, weights_only=True)
    for name, weight in state["averaged"].items():
        if name.endswith("norm.weight"):
            weight.mul_(-1)
    torch.save(state, path)  # the same step, other weights
    other = predicted_speech(run, "human")
    assert not all(np.array_equal(a, b) for a, b in zip(found, other, strict=True))
    path = copy / "run" / "encoder" / "encoder-state.pt"
    state = torch.load(path, weights_only=True)
    last = max(int(k.split(".")[1]) for k in state["codec"] if k.startswith("encoder_blocks."))
    for part in ("codec", "averaged"):
        for name, weight in state.get(part, {}).items():
            if f"encoder_blocks.{last}.conv" in name and name.endswith("original1"):
                weight.mul_(-1)
    torch.save(state, path)  # another encoder, the same language model
    codes = utterance_codes(run, trained_encoder(run), "human", "train")
    renewed = predicted_speech(run, "human")
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(renewed, codes, strict=True))
    assert not all(np.array_equal(a[0], b[0]) for a, b in zip(renewed, other, strict=True))
    tuned, finished = (trained_codec(r).state_dict() for r in (_run(built), run))
    name = next(k for k in tuned if k.startswith("decoder") and k.endswith("layers.0.attention.wq.weight"))
    assert not torch.equal(tuned[name], finished[name])


def test_a_share_of_values_is_as_uncertain_as_a_prediction():
    rng = torch.Generator().manual_seed(0)
    values = (torch.randn(400, 40, 36, generator=rng) * 0.25 + 0.2).clamp(-1, 1)
    found = predicted_values(values, 0.5, rng)
    changed = (found != values).any(2).any(1)
    assert float(changed.float().mean()) == pytest.approx(0.5, abs=0.08)
    a, b = values[changed], found[changed]
    assert (b.mean(1) - a.mean(1)).abs().mean() < 0.06  # the speaker stays
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    likeness = (a * b).sum((1, 2)) / (a.square().sum((1, 2)) * b.square().sum((1, 2))).sqrt()
    spread = (b.square().sum((1, 2)) / a.square().sum((1, 2))).sqrt()
    assert 0.25 < likeness.min() < 0.5
    assert likeness.max() > 0.95
    assert spread.max() < 1.1
    assert spread.min() > 0.3


def test_text_is_spelled_in_bytes_where_no_piece_has_a_token(tmp_path: Path):
    run = BuildRun(tmp_path, replace(SETTINGS, text_pieces=0))
    write_params(run)
    assert run.params.voxtral_config().backbone.vocab_size == 1256
    pieces = json.loads((run.work / "tekken.json").read_text())["vocab"]
    assert len(pieces) == 256


def test_the_committed_codes_are_of_the_committed_encoder(tmp_path: Path):
    restore_bundles(LAB / "state", tmp_path)
    run = BuildRun(tmp_path, read_settings(BENCHMARKS / "lab-build.json"))
    write_params(run)
    codes = read_codes(run.spoken, encoder_identity(trained_encoder(run)))
    assert len(codes) == len((LAB / "spoken" / "index.jsonl").read_text().splitlines()) > 2000
    sizes = run.params.voxtral_config().codec
    for one in codes.values():
        assert one.min() >= 0
        assert one[0].max() < sizes.semantic_codebook_size
        assert one[1:].max() < sizes.acoustic_codebook_size
