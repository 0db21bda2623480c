"""The run that restores the encoder: exact under interruption and in parallel, and good for something."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from conftest import preset_codes, tiny_model
from revox.checkpoint.encoder_file import ENCODER_FILE
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.coding import CodingSettings, find_codes
from revox.coding.student import StudentEncoder
from revox.metrics.likelihood import likelihood
from revox.model.codec import Codec
from revox.model.layers import CausalConv1d, CausalConvTranspose1d
from revox.synthesis.prompt import Prompter
from revox.training.data import ClipBatch
from revox.training.distill import AsrDistillation, WhisperTeacher
from revox.training.distiller import Distiller, StatesCache
from revox.training.encoder import EncoderTrainer, TrainingData
from revox.training.errors import TrainingError
from revox.training.hidden_states import captured
from revox.training.initial import transpose_decoder
from revox.training.optimizers import Optimizers
from revox.training.settings import EncoderTraining, read_settings
from revox.training.soft_labels import Ensemble, load_ensemble
from revox.training.spoken import Utterance
from revox.training.validation import Validation, ValidationClip, as_served, decoded_figures
from revox.training.world import World
from training.test_distill import save_whisper

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {
    "steps": 6, "clips": 2, "pairs": 2, "pseudo_labels": 2, "pseudo_labeled": 3, "seconds": 0.64,
    "save_every": 2, "report_every": 1, "validate_every": 100, "warmup": 2, "decay_steps": 2,
    "learning_rate": 3e-5, "resolutions": [[512, 40], [256, 20]],
    "weights": {"waveform": 1.0, "feature": 2.0},
    "discriminator": {"start": 2, "every": 1, "n_ffts": [256, 128], "channels": 2, "seconds": 0.3},
}  # fmt: skip


NO_LABELS: dict[str, Any] = {"pseudo_labels": 0, "pseudo_labeled": 0}


def clips() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(20000 + 3000 * i, generator=rng) for i in range(5)]


class ClipsInMemory:
    """Random stretches of `clips`; every rank draws for the whole batch and takes its part."""

    def __init__(self, clips: list[Tensor], samples: int, batch: int, world: World, seed: int = 0) -> None:
        self.clips, self.samples, self.batch, self.world = clips, samples, batch, world
        self.seed, self.drawn = seed, 0

    def __next__(self) -> ClipBatch:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.drawn)
        self.drawn += 1
        found, lengths = [], []
        for _ in range(self.batch):
            clip = self.clips[int(torch.randint(len(self.clips), (), generator=rng))]
            start = int(torch.randint(max(1, len(clip) - self.samples + 1), (), generator=rng))
            part = clip[start : start + self.samples]
            lengths.append(len(part))
            found.append(torch.nn.functional.pad(part, (0, self.samples - len(part))))
        mine = self.world.part(self.batch)
        return ClipBatch(torch.stack(found[mine]), torch.tensor(lengths[mine]))

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state(self, state: dict[str, Any]) -> None:
        self.drawn = int(state["drawn"])


def labelled(frames: int = 8) -> list[tuple[Tensor, Tensor]]:
    codes = list(preset_codes().values())[:3]
    return [(clip[: frames * 1920].half(), c[:, :frames]) for clip, c in zip(clips(), codes, strict=False)]


def trainer(
    folder: Path, world: World | None = None, validation: Validation | None = None, **changes: Any
) -> EncoderTrainer:
    settings = EncoderTraining.model_validate(SETTINGS | changes)
    world = world or World()
    samples = 8 * 1920
    recordings = ClipsInMemory(clips(), samples, settings.clips, world) if settings.clips else None
    return EncoderTrainer(
        tiny_model(),
        TrainingData(
            list(preset_codes().values()), recordings, labelled() if settings.pseudo_labels else ()
        ),
        settings,
        folder,
        world=world,
        validation=validation or Validation([ValidationClip(clip) for clip in clips()[:2]]),
    )  # fmt: skip


def rows_of(run: EncoderTrainer) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    run.run(rows.append, run.validate, report_every=1, validate_every=100)
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, rows_of(trainer(folder))


def test_an_interrupted_run_goes_on_step_by_step_as_the_uninterrupted_one(whole, tmp_path: Path):
    first = trainer(tmp_path)
    for _ in range(3):
        first.step()
    first.save()
    second = trainer(tmp_path)
    assert second.resume()
    rest = rows_of(second)
    for row, wanted in zip(rest, whole[1][3:], strict=True):
        same = {k: v for k, v in wanted.items() if k != "seconds"}
        assert {k: v for k, v in row.items() if k != "seconds"} == same


def test_what_is_kept_and_looked_at_is_the_average_and_goes_on_exactly(tmp_path: Path):
    name = "input_proj.conv.parametrizations.weight.original1"
    plain, run = trainer(tmp_path / "plain"), trainer(tmp_path / "run", average=0.3)
    expected = None
    for n in range(4):
        assert plain.step()["loss"] == run.step()["loss"]  # what is learnt is not touched by it
        now = run.codec.state_dict()[name]
        share = min(0.3, (1 + n) / (10 + n))
        expected = now.clone() if expected is None else share * expected + (1 - share) * now
    assert torch.allclose(run.encoder_state()[name], expected, atol=1e-7)
    assert not torch.equal(run.encoder_state()[name], plain.encoder_state()[name])
    assert run.encoder_state().keys() == plain.encoder_state().keys()
    run.save()
    with safe_open(tmp_path / "run" / "encoder.safetensors", "pt") as file:
        kept = file.get_tensor(f"audio_tokenizer.{name}")
    assert torch.equal(kept, expected.bfloat16())

    again = trainer(tmp_path / "run", average=0.3)
    assert again.resume()
    for one in (run, again):
        one.step()
    for key, value in run.encoder_state().items():
        assert torch.equal(value, again.encoder_state()[key]), key

    looked = again.validate()
    with torch.no_grad():
        for p in again.encoder:
            p.zero_()
    assert again.validate() == looked


def test_held_out_speech_is_validated_on_in_other_phases_and_compared_with_learned_speech(tmp_path: Path):
    held = [codes.flip(1) for codes in list(preset_codes().values())[:3]]
    run = trainer(tmp_path, **NO_LABELS, validation=Validation(utterances=[Utterance("", c) for c in held]))
    row, served = run.validate(), as_served(run.codec, run.encoder_state())
    wanted = decoded_figures(run.codec, served, held, 4 * run.frames, 2.5)
    assert (row["valid_agreement"], row["valid_levels"]) == pytest.approx(wanted, abs=1e-4)
    learned = decoded_figures(run.codec, served, run.data.codes, 4 * run.frames, 2.5)
    assert row["trained_levels"] == pytest.approx(learned[1], abs=1e-4)
    assert decoded_figures(run.codec, served, held, 4 * run.frames, 0.0) != wanted
    assert run.validate() == row


def test_the_likelihood_of_recordings_whose_words_are_known_is_reported_beside_that_of_its_own_speech(
    tmp_path: Path, tiny_checkpoint: Path
):
    model, prompter = tiny_model(), Prompter(tiny_checkpoint)
    one, other, longer = clips()[:3]
    known = [ValidationClip(one), ValidationClip(other, "hello there"), ValidationClip(longer, "good day")]
    own = [Utterance("", c) for c in list(preset_codes().values())[:2]]
    own.append(Utterance("well", preset_codes()["casual_male"]))
    run = trainer(tmp_path, validation=Validation(known, own, lambda: (model, prompter)))
    row, served = run.validate(), as_served(run.codec, run.encoder_state())

    def nll(text: str, codes: Tensor) -> float:
        voice = model.mm_audio_embeddings.voice_embedding(codes)
        tokens = torch.tensor(prompter.tokens(text, len(voice)))
        return float(
            likelihood(model, model.embed_prompt(tokens, prompter.audio_token, voice), codes).semantic_nll
        )

    found = [find_codes(served, clip.samples, CodingSettings("encoder")).codes for clip in known[1:]]
    mean = (nll("hello there", found[0]) + nll("good day", found[1])) / 2
    assert row["valid_nll"] == pytest.approx(mean, abs=1e-3)
    assert row["own_nll"] == pytest.approx(nll("well", own[2].codes), abs=1e-3)
    assert "valid_nll" not in trainer(tmp_path / "none").validate()


def test_two_processes_get_the_losses_of_one(whole, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys, json, pathlib, torch; torch.set_num_threads(1)\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('parts', {__file__!r}); m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "from revox.training.world import World\n"
        "world = World.join('cpu'); assert world.size == 2\n"
        "rows = m.rows_of(m.trainer(pathlib.Path(sys.argv[1]) / str(world.rank), world))\n"
        "(pathlib.Path(sys.argv[1]) / f'rows{world.rank}.json').write_text(json.dumps(rows))\n"
    )
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    for rank in range(2):
        rows = json.loads((tmp_path / f"rows{rank}.json").read_text())
        for row, wanted in zip(rows, whole[1], strict=True):
            for name, value in wanted.items():
                if name not in ("seconds", "loss") and not name.startswith("valid"):
                    assert row[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (name, rank, row["step"])


def test_what_is_kept_is_a_whole_encoder_in_bf16_and_the_last_few_of_them(whole):
    folder = whole[0]
    codec = Codec(tiny_model().audio_tokenizer.config, with_encoder=True)
    names = {f"audio_tokenizer.{k}" for k in codec.state_dict()}
    with safe_open(folder / "encoder.safetensors", framework="pt") as file:
        assert set(file.keys()) == {k for k in names if k.startswith(ENCODER_PREFIXES)}
        assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"BF16"}  # noqa: SIM118
        assert json.loads(file.metadata()["revox"])["steps"] == 6
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"encoder-{step:08d}.safetensors" for step in (2, 4, 6)]


def test_pairs_teach_it_the_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = {"commitment": 0.0, "diversity": 0.0}
    run = trainer(
        tmp_path, steps=60, clips=0, pairs=6, **NO_LABELS, seconds=0.32, learning_rate=2e-3, weights=weights,
        pair={"all_pass": 0}, decay_steps=20,
    )  # fmt: skip
    always = run.pairs.draw_codes(6, run.frames, torch.Generator().manual_seed(0))
    monkeypatch.setattr(run.pairs, "draw_codes", lambda *_: always)
    rows = [run.step() for _ in range(60)]
    assert rows[-1]["acoustic"] < 0.5 * rows[0]["acoustic"]
    assert rows[-1]["semantic"] < 0.5 * rows[0]["semantic"]


def test_pairs_are_heard_in_other_phases_than_the_decoders_unless_told_otherwise(tmp_path: Path):
    off = {"clips": 0, **NO_LABELS}
    plain = trainer(tmp_path / "plain", **off, pair={"all_pass": 0})
    heard, codes, _ = plain._batch()
    torch.testing.assert_close(heard, plain.codec.decode(codes))
    turned, codes, _ = trainer(tmp_path / "turned", **off)._batch()
    decoded = plain.codec.decode(codes)
    assert float(torch.nn.functional.cosine_similarity(turned, decoded).abs().max()) < 0.5
    # Not so all-pass at the ends of such short items.
    torch.testing.assert_close(turned.square().mean(1), decoded.square().mean(1), rtol=0.1, atol=0)


def test_recordings_that_were_inverted_teach_it_their_codes(tmp_path: Path):
    only = {"clips": 0, "pairs": 0, "pseudo_labels": 3, "weights": {"commitment": 0.0, "diversity": 0.0}}
    run = trainer(tmp_path, steps=60, learning_rate=2e-3, decay_steps=20, **only)
    rows = [run.step() for _ in range(60)]
    assert rows[-1]["acoustic"] < 0.6 * rows[0]["acoustic"]
    assert rows[-1]["semantic"] < 0.6 * rows[0]["semantic"]
    with pytest.raises(TrainingError, match="has pseudo-labels"):
        EncoderTrainer(tiny_model(), TrainingData(list(preset_codes().values())), run.settings, tmp_path)


def test_pairs_and_inverted_recordings_stand_beside_their_own_codes(tmp_path: Path):
    heard, codes, _ = trainer(tmp_path, clips=0, pair={"all_pass": 0})._batch()
    assert len(heard) == len(codes) == 4
    torch.testing.assert_close(heard[:2], trainer(tmp_path).codec.decode(codes[:2]))
    for wave, its in zip(heard[2:], codes[2:], strict=True):
        assert any(torch.equal(wave, w.float()) and torch.equal(its, c) for w, c in labelled())


def test_recordings_alone_bring_the_reconstruction_nearer_and_leave_decoder_and_codebook_alone(
    tmp_path: Path,
):
    run = trainer(
        tmp_path, clips=4, pairs=0, **NO_LABELS, steps=30, learning_rate=2e-3, discriminator={"start": 1000}
    )
    frozen = {
        k: v.clone() for k, v in run.codec.state_dict().items() if not k.startswith(("input", "encoder"))
    }
    rows = [run.step() for _ in range(30)]
    assert rows[-1]["mel"] < 0.95 * rows[0]["mel"]
    for name, value in frozen.items():
        assert torch.equal(run.codec.state_dict()[name], value), name


def test_a_loss_that_counts_nothing_changes_nothing(tmp_path: Path):
    def after(name: str, **changes: Any) -> Tensor:
        run = trainer(tmp_path / name, **NO_LABELS, **changes)
        run.step()
        return run.encoder_state()["input_proj.conv.parametrizations.weight.original1"]

    off = {"commitment": 0.0, "diversity": 0.0, "reconstruction": 0.0}
    alone = after("alone", clips=0, weights=off)
    assert not torch.equal(alone, after("all"))
    beside = after("beside", weights=off)  # recordings are there and count nothing
    # Adam's first step is the gradient's sign: where that is nearly nought, rounding decides.
    assert ((alone - beside).abs() > 1e-6).float().mean() < 0.01


def test_a_compiled_codec_learns_the_same_and_is_looked_at_as_it_is_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled: list[str] = []

    def compile(function: Any, **_: Any) -> Any:
        def call(*given: Any) -> Any:
            compiled.append(function.__name__)
            return function(*given)

        return call

    plain = rows_of(trainer(tmp_path / "plain"))
    monkeypatch.setattr(torch, "compile", compile)
    run = trainer(tmp_path / "compiled", compile=True)
    fast = rows_of(run)
    steps = SETTINGS["steps"]
    assert compiled.count("encode_latents") == steps
    assert compiled.count("decode_latents") == 2 * steps  # pairs and recordings
    for one, two in zip(plain, fast, strict=True):
        for name in one.keys() - {"seconds"}:
            assert two[name] == one[name], name
    compiled.clear()
    trainer(tmp_path / "off").step()
    assert not compiled


def test_discriminators_and_the_waveform_count_only_where_they_are_asked_for(tmp_path: Path):
    early = {"start": 0, "every": 1, "n_ffts": [256], "channels": 2, "seconds": 0.3}

    def learnt(name: str, **weights: float) -> tuple[dict[str, float], Tensor]:
        run = trainer(tmp_path / name, weights=weights, discriminator=early, **NO_LABELS)
        return run.step(), torch.cat([p.detach().flatten() for p in run.encoder])

    row, plain = learnt("default")
    assert "mel" in row
    assert not {"discriminator", "feature"} & row.keys()
    assert torch.equal(plain, learnt("none", waveform=0.0, feature=0.0)[1])
    assert not torch.equal(plain, learnt("waveform", waveform=1.0)[1])
    row, _ = learnt("feature", feature=1.0)
    assert "discriminator" in row
    assert "adversarial" not in row  # the paper's encoder matches features, and nothing else of them


def test_the_diversity_term_pulls_to_the_frequencies_of_the_models_own_codes(tmp_path: Path, monkeypatch):
    given: list[Tensor] = []
    monkeypatch.setattr("revox.training.encoder.diversity_loss", lambda p, q: (given.append(q), p.sum())[1])
    trainer(tmp_path, **NO_LABELS, discriminator={"start": 100}).step()
    codes = torch.cat([one[0] for one in preset_codes().values()])
    counts = torch.bincount(codes, minlength=512) + 0.05  # so that none is 0
    torch.testing.assert_close(given[0], counts / counts.sum())


def test_the_benchmark_times_every_part_of_a_step(tmp_path: Path):
    """Its parts hang on the trainer's own functions; one that goes by another name would count as nothing."""
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "training.py"))
    run = trainer(tmp_path, discriminator=SETTINGS["discriminator"] | {"start": 0})
    watch = benchmark["Stopwatch"]("cpu")
    with benchmark["timed_parts"](run, watch), watch.part(benchmark["OTHER"]):
        run.step()
    of_speaker_loss = {"speaker loss forward", "speaker loss backward"}  # there is none here
    assert set(benchmark["PARTS"]) - of_speaker_loss == {
        part for part, took in watch.seconds.items() if took > 0
    }


def test_the_benchmark_says_whose_memory_it_is():
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "training.py"))
    found = {"size": "lab", "date": "", "machine": "", "parts": {}, "settings": {"device": "cpu"}}
    assert "peak includes the parts before" in benchmark["as_markdown"](found)
    found["settings"] = {"device": "cuda"}
    assert "allocated on the device" in benchmark["as_markdown"](found)


def test_without_a_compiler_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    run = trainer(tmp_path / "run", compile=True)
    with (
        config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}),
        pytest.raises(TrainingError, match=r"compiled here \(.*no-compiler.*set compile to false"),
    ):
        run.step()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_torch_compiles_it(tmp_path: Path):
    few = {"steps": 2, "discriminator": {"start": 100}}
    plain, fast = (
        rows_of(trainer(tmp_path / name, compile=name == "fast", **few)) for name in ("plain", "fast")
    )
    for one, two in zip(plain, fast, strict=True):
        for name in ("mel", "stft", "semantic", "acoustic", "norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_settings_that_will_not_do_are_a_sentence(tmp_path: Path):
    bad = tmp_path / "bad.yaml"
    for text, sentence in (
        ("clips: 0\npairs: 0\n", "nothing to learn from"),
        ("pseudo_labels: 4\n", "go together"),
        ("pseudo_labeled: 4\n", "go together"),
        ("weights: {acceptance: 1}\n", "no such loss any more"),
        ("weights: {mell: 1}\n", "weights.mell"),
        ("learning_rate: -1\n", "learning_rate"),
        ("weights: {speaker: 1}\n", "verifier"),
        ("clips: 0\nweights: {semantic: 0, acoustic: 0}\n", "learn from are 0"),
        ("weights: {mel: 0, stft: 0, waveform: 0, feature: 0}\n", "none of its losses"),
        ("- a\n- b\n", "holds no settings"),
        ("a: [\n", "cannot be read"),
    ):
        bad.write_text(text)
        with pytest.raises(TrainingError, match=sentence):
            read_settings(bad)
    with pytest.raises(TrainingError, match="cannot be read"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(TrainingError, match="make it a multiple"):
        trainer(tmp_path, World(rank=0, size=3))


def test_settings_of_version_0_1_are_read_and_their_new_names_are_said(tmp_path: Path):
    old = tmp_path / "old.yaml"
    old.write_text(
        "labels: 2\ninverted: 8\nstrangers: 0.5\nacceptance_clips: 1\n"
        "weights: {acceptance: 0, mel: 3, adversarial: 1}\n"
        "pair: {phases: 1.5, shift: 0.2, shake: 0.1, strange: 0.3}\n"
    )
    with pytest.warns(FutureWarning) as caught:
        settings = read_settings(old)
    assert (settings.pseudo_labels, settings.pseudo_labeled, settings.interpolated) == (2, 8, 0.5)
    pair = settings.pair
    assert (pair.all_pass, pair.offset, pair.jitter, pair.replace) == (1.5, 0.2, 0.1, 0.3)
    assert settings.weights.mel == 3
    said = [str(warning.message) for warning in caught]
    assert len(said) == 10
    assert any("pair.shake is called pair.jitter now" in sentence for sentence in said)


def test_a_state_of_version_0_1_is_taken_up(tmp_path: Path):
    whole = trainer(tmp_path / "whole")
    for _ in range(3):
        whole.step()
    state = whole.state()
    for new, old in (("discriminators", "judges"), ("discriminator_optimizer", "judge_optimizer")):
        state[old] = state.pop(new)
    whole.write_state(state)
    again = trainer(tmp_path / "whole")
    assert again.resume()
    wanted, found = whole.step(), again.step()
    assert found == wanted


def test_the_stft_and_waveform_losses_fade_with_the_balancer_on(tmp_path: Path, monkeypatch):
    run = trainer(tmp_path, decay=0.5)
    balancer, factors = run.balancers["waveform"], []
    combine = balancer.combine
    monkeypatch.setattr(balancer, "combine", lambda g, f: (factors.append(f), combine(g, f))[1])
    for _ in range(3):
        run.step()
    assert factors == [{"stft": share, "waveform": share} for share in (1.0, 0.5, 0.25)]


@pytest.mark.parametrize("seconds", [0.3, 0.5, 0.7])
def test_every_length_works_in_whole_frames(tmp_path: Path, seconds: float):
    run = trainer(tmp_path, **NO_LABELS, seconds=seconds)
    run.data.recordings.samples = round(seconds * 24000)  # 7,200 samples are no whole number of 80 ms
    real, _, recordings = run._batch()
    assert real.shape == (4, run.frames * 1920)
    assert recordings is not None
    assert int(recordings.lengths.max()) <= run.frames * 1920
    assert math.isfinite(run.step()["loss"])
    assert abs(run.frames * 0.08 - seconds) <= 0.04


@pytest.mark.parametrize("seconds", [0.3, 0.5, 0.7])
def test_every_length_can_be_distilled(tmp_path: Path, seconds: float):
    (tmp_path / "whisper").mkdir()
    teacher = WhisperTeacher.load(str(save_whisper(tmp_path / "whisper")))
    run = trainer(
        tmp_path / "run", **NO_LABELS, seconds=seconds, whisper="tiny", weights={"distillation": 1.0}
    )
    run.data.recordings.samples = round(seconds * 24000)
    loss = AsrDistillation(run.codec.config.semantic_dim, teacher.width)
    run.teachers.asr = Distiller(teacher, loss, run.rate, StatesCache(tmp_path / "states", 1e9))
    assert math.isfinite(run.step()["distillation"])


def test_whisper_is_given_latents_after_the_codebook_straight_through(tmp_path: Path):
    class Asr(torch.nn.Module):
        def forward(self, semantic: Tensor, recordings: ClipBatch) -> Tensor:
            self.given = semantic
            return semantic.square().mean()

    asr = Asr()
    run = trainer(tmp_path, **NO_LABELS, whisper="none", weights={"distillation": 1.0})
    run.teachers.asr = asr
    run.step()
    given = asr.given.detach().flatten(0, 1)
    rows = run.table[torch.cdist(given, run.table).argmin(dim=1)]
    torch.testing.assert_close(given, rows, atol=1e-5, rtol=0)
    assert asr.given.requires_grad


def test_nothing_is_learned_from_the_padding_of_short_clips(tmp_path: Path, monkeypatch):
    run = trainer(tmp_path, **NO_LABELS, pairs=0, discriminator=SETTINGS["discriminator"] | {"start": 0})
    waves = torch.stack([clip[:15360].clone() for clip in clips()[:2]])
    waves[1, 3000:] = 0
    short = ClipBatch(waves, torch.tensor([15360, 3000]))
    monkeypatch.setattr(ClipsInMemory, "__next__", lambda _: short)
    balancer, found = run.balancers["latent"], {}
    combine = balancer.combine
    monkeypatch.setattr(balancer, "combine", lambda g: (found.update(g), combine(g))[1])
    run.step()
    for name in ("reconstruction", "diversity", "commitment"):
        assert float(found[name][1, 2:].abs().max()) == 0, name  # 3,000 samples are in two frames
        assert float(found[name][1, :2].abs().max()) > 0, name
        assert float(found[name][0, 2:].abs().max()) > 0, name
    assert int(run.use.sum()) == 8 + 2


def test_nothing_is_learned_after_the_end_of_short_recordings_with_pseudo_labels(tmp_path: Path):
    def gradients(of_the_end: float) -> tuple[Tensor, dict[str, float]]:
        run = trainer(tmp_path, clips=0, pairs=0, pseudo_labels=1, weights={"diversity": 0})
        wave, codes = labelled()[0]
        run.data.pseudo_labeled = [(wave[: 3 * 1920], codes[:, :3])]
        balancer, found = run.balancers["latent"], {}
        combine = balancer.combine
        balancer.combine = lambda g: (found.update(g), combine(g))[1]
        padded = run._batch()
        assert padded[1].shape == (1, 37, 8)
        padded[0][:, 3 * 1920 :] = of_the_end
        run._batch = lambda: padded
        row = run.step()
        assert all(float(one[:, 3:].abs().max()) == 0 for one in found.values())
        assert all(float(one[:, :3].abs().max()) > 0 for one in found.values())
        assert int(run.use.sum()) == 3
        return found["semantic"], row

    silent, row = gradients(0.0)
    noisy, other = gradients(0.3)
    torch.testing.assert_close(silent, noisy)
    assert row["agreement"] == other["agreement"]


# Options of experiments


def test_soft_labels_of_an_encoder_teach_another_its_codes(tmp_path: Path):
    weights = {"mel": 0, "stft": 0, "reconstruction": 0, "semantic": 0, "acoustic": 0, "commitment": 0,
               "diversity": 0, "soft_semantic": 1, "soft_acoustic": 1}  # fmt: skip
    run = trainer(
        tmp_path, steps=60, learning_rate=2e-3, decay_steps=20, **NO_LABELS, weights=weights, encoders=["a"]
    )
    run.teachers.soft = Ensemble([], [tiny_model(with_encoder=True).audio_tokenizer.float()])
    rows = [run.step() for _ in range(60)]
    assert rows[-1]["soft_acoustic"] < 0.7 * rows[0]["soft_acoustic"]
    assert rows[-1]["soft_semantic"] < rows[0]["soft_semantic"]


def test_an_ensembles_posterior_is_the_mean_of_its_members(tmp_path: Path):
    codec = tiny_model(with_encoder=True).audio_tokenizer.float()
    students = [StudentEncoder.for_codec(codec, 16, 1) for _ in range(2)]
    audio = torch.stack([clip[: 8 * 1920] for clip in clips()[:2]])
    probabilities, values = Ensemble(students, [codec]).posterior(audio)
    assert probabilities.shape == (2, 8, codec.config.semantic_codebook_size)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 8))
    each = [Ensemble([one]).posterior(audio) for one in students] + [Ensemble([], [codec]).posterior(audio)]
    torch.testing.assert_close(probabilities, sum(one for one, _ in each) / 3)
    torch.testing.assert_close(values, sum(other for _, other in each) / 3)
    found = each[2][0].argmax(dim=-1)[0]
    coder = as_served(codec, {})
    assert (find_codes(coder, audio[0], CodingSettings("encoder", as_served=False)).codes[0] == found).all()


def test_the_ensemble_of_a_run_is_trained_once_and_reads_encoders_of_earlier_runs(tmp_path: Path, whole):
    folder, _ = whole
    codec = tiny_model().audio_tokenizer.float()
    settings = EncoderTraining.model_validate(
        {"students": 2, "student_steps": 10, "student_width": 16, "encoders": [str(folder / ENCODER_FILE)]}
    )
    codes = list(preset_codes().values())[:3]
    seen: list[str] = []

    def load(path: Path) -> Ensemble:
        return load_ensemble(codec, codes, settings, path, "a", lambda at: seen.append(at.what))

    made = load(tmp_path)
    assert [len(made.students), len(made.encoders)] == [2, 1]
    one, other = (student.net[0].weight for student in made.students)
    assert not torch.equal(one, other)
    assert seen
    seen.clear()
    again = load(tmp_path)
    assert not seen
    assert torch.equal(again.students[0].net[0].weight, one)
    settings = settings.model_copy(update={"encoders": (str(tmp_path / "none"),), "students": 0})
    with pytest.raises(TrainingError, match="cannot be read as an encoder"):
        load(tmp_path)


EXPERIMENT: dict[str, Any] = {
    "optimizer": "muon", "start": "decoder", **NO_LABELS,
    "augmentation": {"gain_db": 6, "delay_ms": 3, "equalization_db": 2, "room": 0.3, "noise": 0.3},
    "weights": {"hidden": 0.5},
}  # fmt: skip


def test_a_run_with_every_option_of_experiments_is_resumed_exactly(tmp_path: Path):
    uninterrupted = trainer(tmp_path / "a", **EXPERIMENT)
    wanted = [uninterrupted.step() for _ in range(4)]
    assert all(math.isfinite(row["hidden"]) for row in wanted)
    first = trainer(tmp_path / "b", **EXPERIMENT)
    for _ in range(2):
        first.step()
    first.save()
    second = trainer(tmp_path / "b", **EXPERIMENT)
    assert second.resume()
    assert [second.step() for _ in range(2)] == wanted[2:]


def test_matched_hidden_states_come_nearer_and_reach_the_encoder_alone(tmp_path: Path):
    weights = {"semantic": 0, "acoustic": 1e-9, "commitment": 0, "diversity": 0, "hidden": 1}
    run = trainer(
        tmp_path, steps=60, clips=0, **NO_LABELS, learning_rate=2e-3, decay_steps=20, weights=weights
    )
    frozen = {name: p.clone() for name, p in run.codec.decoder_blocks.named_parameters()}
    rows = [run.step() for _ in range(60)]
    assert rows[-1]["hidden"] < 0.8 * rows[0]["hidden"]
    for name, value in run.codec.decoder_blocks.named_parameters():
        assert torch.equal(value, frozen[name]), name
    assert not any(block._forward_hooks for block in run.codec.encoder_blocks)


def test_hidden_states_are_captured_from_the_highest_rate_to_the_lowest():
    codec = tiny_model(with_encoder=True).audio_tokenizer.float()
    audio = torch.stack([clip[: 8 * 1920] for clip in clips()[:2]])
    with captured(codec.encoder_blocks) as encoder:
        latents = codec.encode_latents(audio)
    with captured(codec.decoder_blocks, lowest_first=True) as decoder:
        codec.decode_latents(latents)
    for states in (encoder, decoder):
        assert [one.shape[1] for one in states] == [64, 32, 16, 8]


def test_the_transposed_decoder_is_its_adjoint():
    codec = Codec(tiny_model().audio_tokenizer.config, with_encoder=True).float()
    transpose_decoder(codec)
    y = torch.randn(1, codec.config.pretransform_patch_size, 20)
    # The adjoint of a convolution, and what the encoder's does in the middle of a long clip.
    adjoint = torch.nn.functional.conv_transpose1d(y, codec.output_proj.conv.weight)
    found = torch.nn.functional.conv1d(
        torch.nn.functional.pad(y, (6, 6)), codec.input_proj.conv.weight
    )  # a kernel of 7
    torch.testing.assert_close(found, adjoint)
    back = [one for one in codec.decoder_blocks if isinstance(one, CausalConvTranspose1d)]
    own = [one for one in codec.encoder_blocks if isinstance(one, CausalConv1d)]
    x, z = torch.randn(1, codec.config.dim, 5), torch.randn(1, codec.config.dim, 12)
    up = torch.nn.functional.conv_transpose1d(x, back[-1].conv.weight, stride=2)
    down = torch.nn.functional.conv1d(z, own[0].conv.weight, stride=2)
    torch.testing.assert_close((up * z).sum(), (x * down).sum(), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(codec.encode_latents(0.1 * torch.randn(1, 8 * 1920))).all()


def test_a_shallower_transformer_takes_the_last_layers_of_the_decoders():
    config = tiny_model().audio_tokenizer.config
    lengths = config.decoder_transformer_lengths
    deeper = (*lengths[:-1], lengths[-1] + 1)
    codec = Codec(replace(config, decoder_transformer_lengths=deeper), with_encoder=True)
    transpose_decoder(codec.float())
    given = list(codec.decoder_blocks[-1].layers.values())
    for one, other in zip(codec.encoder_blocks[0].layers.values(), given[1:], strict=True):
        assert torch.equal(one.attention.wq.weight, other.attention.wq.weight)


def test_a_scaled_start_gives_latents_the_deviations_of_the_right_codes(tmp_path: Path):
    run = trainer(tmp_path, scaled_start=True)
    codes, audio = run.pairs.draw(16, run.frames, torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = run.codec.encode_latents(audio)
    dim = run.codec.config.semantic_dim
    rows = run.table[codes[:, 0].flatten()]
    torch.testing.assert_close(latents[:, :dim].std(dim=(0, 2)), rows.std(dim=0), rtol=1e-3, atol=1e-4)
    values = torch.atanh((codes[:, 1:] / 10 - 1).clamp(-0.95, 0.95))
    wanted = values.std(dim=(0, 2)).clamp_min(0.05)
    torch.testing.assert_close(latents[:, dim:].std(dim=(0, 2)), wanted, rtol=1e-3, atol=1e-4)


def test_muon_takes_the_matrices_and_adamw_the_rest(tmp_path: Path):
    run = trainer(tmp_path, optimizer="muon", learning_rate=1e-3, weight_decay=0.0)
    assert isinstance(run.optimizer, Optimizers)
    adamw, muon = run.optimizer.members
    assert {p.dim() for group in muon.param_groups for p in group["params"]} == {2}
    assert 2 not in {p.dim() for group in adamw.param_groups for p in group["params"]}
    count = sum(len(group["params"]) for group in run.optimizer.param_groups)
    assert count == len(run.encoder)
    matrix = run.codec.encoder_blocks[0].layers["0"].feed_forward.w1.weight
    before = matrix.detach().clone()
    run.step()
    step = (matrix.detach() - before) / run.learning_rate() * 0.5  # in the warm-up of two steps
    singular = torch.linalg.svdvals(step.float())
    assert float(singular.max() / singular[len(singular) // 2]) < 2  # nearly orthogonal


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weights": {"soft_semantic": 1}}, "soft labels need students"),
        ({"weights": {"hidden": 1}, "pairs": 0}, "weights.hidden is of pairs"),
        ({"weights": {"hidden": 1}, "compile": True}, "compile: false"),
        ({"augmentation": {"room": 2}}, "less than or equal to 1"),
        ({"optimizer": "sgd"}, "adamw"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        EncoderTraining.model_validate(changes)
