"""A miniature build: every stage, resumed, to a folder in the release's format."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lab import language_training
from lab.__main__ import app
from lab.build import (
    BuildRun,
    BuildSettings,
    build,
    code_source,
    frame_sets,
    half_trainer,
    language_data,
    make_speech,
    teacher_trainer,
    train_half,
    train_teacher,
    trained_codec,
    trained_teacher,
    utterance_codes,
    write_params,
)
from lab.codec_training import DecoderTraining, ReferenceEncoderTraining
from lab.data import SpeechSet, write_set
from lab.errors import LabError
from lab.language_training import LanguageTrainer, LanguageTraining
from lab.phone_classifier import PhoneClassifierTraining
from lab.phones import PHONES, nearest_cluster, phone_codebook, phone_occupancy
from lab.settings import read_settings
from lab.shards import pack
from lab.sizes import PRESETS
from lab.state_bundle import write_bundles
from lab.teacher_codec import TeacherCodecTraining
from revox import load
from revox.checkpoint.load import load_model
from revox.checkpoint.params import read_params
from revox.checkpoint.release import expected_tensors
from revox.checkpoint.tensors import WEIGHTS, read_header
from revox.checkpoint.voice_codes import recover_codes
from revox.checkpoint.voices import load_voice
from revox.coding.features import SpectralFeatures
from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.training.errors import TrainingError
from revox.training.initial import initialize, oscillators
from revox.training.quantize import quantize_acoustic
from revox.training.run import Run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SETTINGS = BuildSettings(
    teacher=TeacherCodecTraining(steps=4, batch=4, frames=6, width=16, blocks=1, warmup=1, decay_steps=2,
                                 save_every=2, validate_every=100),
    encoder=ReferenceEncoderTraining(steps=4, batch=2, frames=4, warmup=1, decay_steps=2, save_every=2,
                                     validate_every=100, average=0.5),
    decoder=DecoderTraining(steps=4, batch=2, frames=4, warmup=1, decay_steps=2, save_every=2,
                            validate_every=100, discriminator_from=2, discriminator_channels=2, phones=1.0,
                            average=0.5),
    phone_classifier=PhoneClassifierTraining(steps=2, batch=2, width=8, warmup=1, decay_steps=1, seconds=0.3),
    language=LanguageTraining(steps=3, batch=2, save_every=2, validate_every=100, average=0.5),
    codec_sizes={"dim": 32, "hidden_dim": 32, "head_dim": 8, "encoder_transformer_lengths_str": "1,1,1,1",
                 "decoder_transformer_lengths_str": "1,1,1,1", "semantic_codebook_size": 8},
    preset_frames=10,
)  # fmt: skip
TEXTS = ("the train leaves at noon", "my number is four two")


def _tone(rng: np.random.Generator, seconds: float = 0.7) -> np.ndarray:
    time = np.arange(int(seconds * 24000)) / 24000
    pitch = rng.uniform(90, 250)
    wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 12)) * 0.05
    return (wave * 32767).astype(np.int16)


def _speech(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        parts = []
        for name in PRESETS:
            pieces = [_tone(rng) for _ in TEXTS]
            who = {"speaker": f"speaker-{name}", "sex": "F", "preset": name}
            phones = [(name, 0.06 * (i + 1)) for i, name in enumerate(rng.choice(PHONES, 11).tolist())]
            index = [
                {**who, "text": t, "samples": len(p), "phones": phones}
                for t, p in zip(TEXTS, pieces, strict=True)
            ]
            parts.append((np.concatenate(pieces), index))
        folder.mkdir(parents=True, exist_ok=True)
        write_set(folder, f"synthetic-{split}", iter(parts))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("build")
    _speech(root / "run" / "data")
    build(
        BuildRun(root / "run", SETTINGS), root / "checkpoint", root / "reference" / "encoder.safetensors",
        stages=("teacher", "encoder", "decoder", "language", "folder"),
    )  # fmt: skip
    return root


def _run(built: Path, settings: BuildSettings = SETTINGS) -> BuildRun:
    return BuildRun(built / "run", settings)


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
    audio = tts.speak(TEXTS[0], PRESETS[0], max_seconds=0.4)
    assert audio.rate == 24000
    assert np.isfinite(audio.samples).all()


@pytest.mark.parametrize("stage", ["teacher", "encoder", "decoder"])
def test_an_interrupted_run_goes_on_with_the_losses_of_an_uninterrupted_one(
    built, tmp_path: Path, stage: str
):
    for name in ("a", "b"):
        _speech(tmp_path / name / "data")
        if stage != "teacher":
            shutil.copytree(built / "run" / "teacher", tmp_path / name / "teacher")
        write_params(BuildRun(tmp_path / name, SETTINGS))

    def trainer(name: str):
        run = BuildRun(tmp_path / name, SETTINGS)
        return teacher_trainer(run, frame_sets(run)) if stage == "teacher" else half_trainer(stage, run)

    whole = trainer("a")
    expected = [whole.step()["loss"] for _ in range(4)]
    first = trainer("b")
    found = [first.step()["loss"] for _ in range(2)]
    first.save()
    second = trainer("b")
    assert second.step_count == 2
    found += [second.step()["loss"] for _ in range(2)]
    assert found == pytest.approx(expected, rel=1e-5)
    if stage != "teacher":
        averages = (one.averaged.module.state_dict() for one in (whole, second))
        for one, two in zip(*(state.values() for state in averages), strict=True):
            assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_the_average_of_the_weights_is_validated_and_shipped(built: Path, stage: str):
    settings = replace(
        SETTINGS, decoder=replace(SETTINGS.decoder, steps=8), encoder=replace(SETTINGS.encoder, steps=8)
    )
    trainer = half_trainer(stage, _run(built, settings))
    names = trainer.codec.state_dict()
    name = next(k for k in names if k.startswith(stage) and k.endswith("layers.0.attention.wq.weight"))
    expected = trainer.shipped.state_dict()[name].clone()
    for n in range(2):
        trainer.take_step()
        share = min(0.5, (5 + n) / (14 + n))  # the build took four steps before
        expected = share * expected + (1 - share) * trainer.codec.state_dict()[name]
        assert torch.allclose(trainer.shipped.state_dict()[name], expected, atol=1e-6)
    state = torch.load(built / "run" / stage / f"{stage}-state.pt", weights_only=True)
    shipped = trained_codec(_run(built)).state_dict()[name]
    assert not torch.equal(state["codec"][name], state["averaged"][f"module.{name}"])
    assert torch.equal(shipped, state["averaged"][f"module.{name}"].bfloat16().float())
    evaluated = trainer.validate()
    with torch.no_grad():
        for p in trainer.codec.parameters():
            p.mul_(2)
    assert trainer.validate() == evaluated
    without = replace(
        settings,
        decoder=replace(settings.decoder, average=0.0),
        encoder=replace(settings.encoder, average=0.0),
    )
    plain = half_trainer(stage, _run(built, without))
    assert plain.shipped is plain.codec


def test_the_shipped_model_speaks_with_the_average_of_its_weights(built: Path):
    state = torch.load(built / "run" / "language" / "language-state.pt", weights_only=True)
    name = next(k for k in state["model"] if k.endswith("layers.0.attention.wq.weight"))
    expected = state["averaged"][f"module.{name}"]
    assert not torch.equal(state["model"][name], expected)
    assert torch.equal(load_model(built / "checkpoint").state_dict()[name], expected.bfloat16())


def test_a_build_resumes_in_another_folder_from_its_state_bundles(built: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Run, "step", lambda self: pytest.fail(f"{self.log_path.stem} took a step"))
    made = write_bundles(built / "run", tmp_path / "run" / "state")
    assert max(path.stat().st_size for path in made) < 16e6
    _speech(tmp_path / "run" / "data")
    build(
        _run(tmp_path), tmp_path / "checkpoint", tmp_path / "encoder.safetensors",
        stages=("teacher", "encoder", "decoder", "language", "folder"),
    )  # fmt: skip
    for name in (WEIGHTS, "params.json", f"voice_embedding/{PRESETS[0]}.pt"):
        there, here = (folder / "checkpoint" / name for folder in (tmp_path, built))
        assert there.read_bytes() == here.read_bytes()


def test_a_state_holds_its_own_half_and_one_without_it_is_refused(built: Path):
    trainer = half_trainer("decoder", _run(built))
    state = trainer.state()
    for name in (*state["codec"], *state["averaged"]):
        assert not name.removeprefix("module.").startswith(("encoder_blocks.", "input_proj."))
    name = next(name for name in state["codec"] if name.startswith("decoder_blocks."))
    with pytest.raises(LabError, match=f"lacks {name}"):
        trainer.load_state(state | {"codec": {k: v for k, v in state["codec"].items() if k != name}})


def test_a_finished_stage_is_not_repeated(built: Path, monkeypatch):
    monkeypatch.setattr(Run, "step", lambda self: pytest.fail(f"{self.log_path.stem} took a step"))
    train_teacher(_run(built))
    for half in ("encoder", "decoder"):
        train_half(half, _run(built))
    longer = replace(SETTINGS, encoder=replace(SETTINGS.encoder, steps=5))
    with pytest.raises(pytest.fail.Exception, match="encoder-log took a step"):
        train_half("encoder", _run(built, longer))


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
        SETTINGS, encoder=replace(SETTINGS.encoder, steps=60, learning_rate=3e-3, decay_steps=1)
    )
    trainer = half_trainer("encoder", _run(built, settings))
    first = np.mean([trainer.step()["loss"] for _ in range(5)])
    for _ in range(40):
        trainer.step()
    assert np.mean([trainer.step()["loss"] for _ in range(5)]) < 0.95 * first


def test_the_phone_classifiers_loss_is_of_synthetic_speech_only(built: Path, monkeypatch):
    settings = replace(SETTINGS, decoder=replace(SETTINGS.decoder, steps=40))
    trainer = half_trainer("decoder", _run(built, settings))
    trainer.human, trainer.human_share = trainer.synthetic, 0.5  # in place of human speech
    batch, drawn, compared = trainer.batch, [], []

    def watched():
        drawn.append(batch())
        return drawn[-1]

    def difference(real, fake):
        compared.append((real, fake.shape))
        return fake.square().mean()

    monkeypatch.setattr(trainer, "batch", watched)
    monkeypatch.setattr(trainer.classifier, "difference", difference)
    rows = [trainer.take_step() for _ in range(8)]
    counts = [one[4] for one in drawn]
    assert min(counts) < max(counts), "some of it should be human"
    expected = [one[0][: one[4]] for one in drawn if one[4]]
    assert len(compared) == len(expected)
    for (real, fake_shape), synthetic in zip(compared, expected, strict=True):
        assert torch.equal(real, synthetic)
        assert fake_shape == synthetic.shape
    assert all(row["phones"] == 0 for row, count in zip(rows, counts, strict=True) if not count)


def test_the_phone_classifiers_loss_counts_from_a_chosen_step(built: Path):
    begun = torch.load(built / "run" / "decoder" / "decoder-state.pt", weights_only=True)["step"]
    decoder = replace(SETTINGS.decoder, steps=begun + 4, phones_from=begun + 2)
    settings = replace(SETTINGS, decoder=decoder)
    trainer = half_trainer("decoder", _run(built, settings))
    assert ["phones" in trainer.step() for _ in range(4)] == [False, False, True, True]


def test_the_language_model_is_fed_its_own_past_from_a_chosen_step(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    language = replace(SETTINGS.language, steps=4, own_share=1.0, own_from=2)
    settings = replace(SETTINGS, language=language)
    run = _run(built, settings)
    data, validation = language_data(run)
    trainer = LanguageTrainer(run.params.voxtral_config(), language, data, validation, tmp_path)
    read: list[int] = []
    own = language_training._own_acoustic_ids

    def noted(*args: Any) -> list[torch.Tensor]:
        if args[3]:
            read.append(trainer.step_count)
        return own(*args)

    monkeypatch.setattr(language_training, "_own_acoustic_ids", noted)
    for _ in range(4):
        trainer.step()
    assert read == [2, 3]


def test_the_command_says_that_a_folder_is_complete_only_where_it_has_made_one(built: Path, tmp_path: Path):
    config = tmp_path / "settings.json"
    config.write_text(json.dumps(asdict(SETTINGS)))
    shutil.copytree(built / "run", tmp_path / "run")
    out = tmp_path / "out"
    common = ["build", str(tmp_path / "run"), "--out", str(out), "--encoder", str(tmp_path / "e.safetensors"),
              "--config", str(config)]  # fmt: skip
    done = CliRunner().invoke(app, [*common, "--stage", "teacher"])
    assert done.exit_code == 0
    assert "done: teacher" in done.output
    assert not out.exists()
    made = CliRunner().invoke(app, [*common, "--stage", "folder"])
    assert f"{out} is complete" in made.output
    assert (out / WEIGHTS).is_file()


def test_the_command_says_how_long_a_stage_still_takes(built: Path, tmp_path: Path):
    config = tmp_path / "settings.json"
    stages = {"teacher": 4, "encoder": 4, "decoder": 4, "language": 3}
    often: Any = {
        name: replace(getattr(SETTINGS, name), report_every=1) for name in (*stages, "phone_classifier")
    }
    config.write_text(json.dumps(asdict(replace(SETTINGS, **often))))
    shutil.copytree(built / "run", tmp_path / "run")
    for stage in stages:
        (tmp_path / "run" / stage / f"{stage}-state.pt").unlink()
    (tmp_path / "run" / "decoder" / "phones-state.pt").unlink()
    output = CliRunner().invoke(
        app,
        ["build", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--encoder", str(tmp_path / "e"),
         "--config", str(config), *(part for stage in stages for part in ("--stage", stage))],
    ).output  # fmt: skip
    for stage, steps in {**stages, "phone_classifier": 2}.items():
        of = re.findall(rf"{stage}  step (\d+) of {steps}, (\d+ min \d+ s) left", output)
        assert [int(step) for step, _ in of] == list(range(1, steps + 1)), output
        assert of[-1][1] == "0 min 00 s"


def test_a_stage_asked_for_before_its_predecessor_says_which_one_is_missing(tmp_path: Path):
    _speech(tmp_path / "run" / "data")
    with pytest.raises(LabError, match="teacher"):
        build(_run(tmp_path), tmp_path / "out", tmp_path / "encoder.safetensors", stages=("language",))


def test_a_stage_without_its_speech_says_which_stage_makes_it(built: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(built / "run", run)
    (run / "data" / "synthetic-train.json").unlink()
    for stage in ("teacher", "encoder", "decoder"):
        with pytest.raises(LabError, match="no synthetic speech: run the stage `speech` first"):
            build(_run(tmp_path), tmp_path / "out", tmp_path / "e", stages=(stage,))


@pytest.mark.parametrize(
    ("gone", "asked"),
    [("teacher", "encoder"), ("teacher", "decoder"), ("encoder", "decoder"), ("encoder", "language"),
     ("encoder", "folder"), ("decoder", "folder"), ("language", "folder")],
)  # fmt: skip
def test_a_stage_whose_predecessors_state_cannot_be_used_says_which(
    built: Path, tmp_path: Path, gone: str, asked: str
):
    shutil.copytree(built / "run", tmp_path / "run")
    path = tmp_path / "run" / gone / f"{gone}-state.pt"
    whole = path.read_bytes()

    def ask() -> None:
        out = tmp_path / "out"
        build(_run(tmp_path), out, tmp_path / "e", stages=(asked,))

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


def test_a_build_takes_its_speech_from_shards_where_there_are_some(tmp_path: Path):
    _speech(tmp_path / "run" / "data")
    pack(tmp_path / "run" / "data", tmp_path / "other" / "shards")
    made = SpeechSet(tmp_path / "run" / "data", "train", "synthetic")
    make_speech(BuildRun(tmp_path / "other", SETTINGS))
    copied = SpeechSet(tmp_path / "other" / "data", "train", "synthetic")
    assert copied.utterances == made.utterances
    assert len(copied.waveform(3)) == len(made.waveform(3))


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


def test_frames_without_phones_do_not_train_the_semantic_codes(built: Path):
    run = _run(built)
    frames = frame_sets(run)
    trainer = teacher_trainer(run, frames)
    features, labels = frames["synthetic", "train"].batch(4, 6, np.random.default_rng(0))
    x, known = torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)
    last, dim = trainer.teacher.encoder[-1], run.params.voxtral_config().codec.semantic_dim
    slopes = []
    for some in (known, torch.full_like(known, -1)):
        losses = trainer.losses(x, some, training=True)
        trainer.optimizer.zero_grad()
        sum(losses[name] for name in ("mel", "pitch", "semantic", "commitment", "spread")).backward()
        slopes.append((float(last.weight.grad[:dim].abs().sum()), float(last.weight.grad[dim:].abs().sum())))
    assert slopes[0][0] > 0
    assert slopes[1][0] == 0
    assert slopes[1][1] > 0


def test_codes_are_the_encoders_once_it_is_done_and_the_teachers_before(built: Path):
    assert code_source(_run(built)).name == "encoder"
    longer = replace(SETTINGS, encoder=replace(SETTINGS.encoder, steps=100))
    source = code_source(_run(built, longer))
    assert source.name == "teacher"
    wave = SpeechSet(built / "run" / "data", "train", "synthetic").waveform(0)
    codes = source.encode(wave)
    assert codes.shape == (37, -(-len(wave) // 1920))
    frames = frame_sets(_run(built))["synthetic", "train"]
    teacher = trained_teacher(_run(built))
    semantic, _ = teacher.encode(torch.from_numpy(frames.features[: frames.ends[0]].astype(np.float32))[None])
    assert (torch.from_numpy(codes[0].astype(np.int64)) == semantic[0]).float().mean() > 0.8


def test_codes_are_encoded_once_and_then_cached(built: Path):
    speech = SpeechSet(built / "run" / "data", "train", "synthetic")
    source = code_source(_run(built))
    alone = [source.encode(speech.waveform(i)) for i in range(len(speech))]
    source = replace(source, encode=lambda wave: pytest.fail("the build has cached it"))
    cached = utterance_codes(_run(built), source, "synthetic", "train")
    for one, other in zip(alone, cached, strict=True):
        assert np.array_equal(one, other)


def test_another_size_of_codebook_needs_a_folder_of_its_own(built: Path, tmp_path: Path):
    sizes = {**SETTINGS.codec_sizes, "semantic_codebook_size": 16}
    for part in ("data", "teacher"):
        shutil.copytree(built / "run" / part, tmp_path / "run" / part)
    run = _run(tmp_path, replace(SETTINGS, codec_sizes=sizes))
    write_params(run)
    with pytest.raises(LabError, match="folder of its own"):
        frame_sets(run)


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
    for stage in ("teacher", "encoder", "decoder", "language"):
        assert {
            k: v for k, v in given[stage].items() if json.loads(json.dumps(settings[stage][k])) != v
        } == {}
        assert settings[stage]["warmup"] + settings[stage]["decay_steps"] < settings[stage]["steps"]


def test_a_language_model_of_another_width_is_built_and_speaks(built: Path, tmp_path: Path):
    settings = replace(SETTINGS, language_width=128)
    run = tmp_path / "run"
    run.mkdir()
    for part in ("data", "teacher", "encoder", "decoder"):
        (run / part).symlink_to(built / "run" / part)
    encoder = tmp_path / "reference" / "encoder.safetensors"
    stages = ("language", "folder")
    build(BuildRun(run, settings), tmp_path / "out", encoder, stages=stages)
    assert read_params(tmp_path / "out").voxtral_config().backbone.dim == 128
    shapes = {n: e.shape for n, e in read_header(tmp_path / "out" / WEIGHTS).items()}
    assert shapes["layers.0.attention.wq.weight"] == (128, 128)
    audio = load(tmp_path / "out", device="cpu").speak("ten past nine", PRESETS[0], max_seconds=0.4)
    assert len(audio.samples)
    with pytest.raises(LabError, match="of its own"):
        build(_run(tmp_path), tmp_path / "out", encoder, stages=stages)
    with pytest.raises(LabError, match="multiple of 128"):
        write_params(BuildRun(tmp_path / "other", replace(SETTINGS, language_width=192)))


def test_phones_fill_the_parts_of_a_frame_by_their_share_of_time():
    filled = phone_occupancy([("pau", 0.03), ("s", 0.1), ("iy", 0.16)], 3, 0.08).reshape(3, 4, -1)
    pause, s, iy = (PHONES.index(name) for name in ("pau", "s", "iy"))
    assert np.allclose(filled.sum(-1), 1, atol=1e-5)
    assert filled[0, 1, pause] == pytest.approx(0.5)
    assert filled[0, 1, s] == pytest.approx(0.5)
    assert filled[1, 0, s] == pytest.approx(1)
    assert np.allclose(filled[1, 1:, iy], 1)
    assert np.allclose(filled[2, :, pause], 1)
    with pytest.raises(KeyError):
        phone_occupancy([("xx", 0.1)], 1, 0.08)


def test_frames_of_equal_phones_share_a_code_and_codes_have_rows_of_unit_variance():
    kinds = np.repeat(np.eye(12, dtype=np.float32), 30, axis=0)
    centroids, rows = phone_codebook(kinds, 12, 4, 0)
    codes = nearest_cluster(kinds, centroids)
    assert len(set(codes.tolist())) == 12
    assert all(len(set(codes[i * 30 : i * 30 + 30].tolist())) == 1 for i in range(12))
    assert rows.shape == (12, 4)
    assert rows.std() == pytest.approx(1, abs=1e-5)


def test_features_show_a_tone_where_it_sounds_and_complete_the_last_frame():
    spectra = SpectralFeatures(CodecConfig())
    time = torch.arange(3 * 1920 + 5) / 24000
    wave = torch.where(time < 0.08, torch.sin(2 * torch.pi * 1000 * time) * 0.1, torch.zeros(()))
    found = spectra(wave)
    assert found.shape == (4, spectra.size)
    mel = found[:, : spectra.mel_size].reshape(4, 8, 80)
    assert float(mel[0, 3].max()) > float(mel[3].max()) + 1.5
    assert mel[0, 3].argmax() == mel[0, 4].argmax()
    low = found[:, spectra.mel_size :]
    assert float(low.std()) < 1.0  # 1000 Hz lies above the low bins: nothing stands out there


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
