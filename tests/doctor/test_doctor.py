"""Broken folders, made from the lab checkpoint: each fault is named by the figures that it leaves."""

from __future__ import annotations

import getpass
import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from conftest import RELEASE_PARAMS
from lab.tokenizer import write_tekken
from revox.checkpoint.inject import inject
from revox.checkpoint.tensors import ENCODER_WEIGHTS
from revox.cli import doctor_command
from revox.demo import checkpoint_folder
from revox.doctor import clone_checks, folder_checks, layout, speech_checks, speed, voice_checks
from revox.doctor.checkpoint_under_test import CheckpointUnderTest, choose_voices
from revox.doctor.examine import DoctorSettings, _made_with, examine
from revox.doctor.findings import CheckResult, DoctorReport, Verdict
from revox.doctor.report import write_report
from revox.doctor.sound import SoundFigures, measure
from revox.progress import Progress
from revox.speech import Audio, read_audio

pytestmark = pytest.mark.usefixtures("one_thread")

LAB_ENCODER = Path(__file__).parents[2] / "lab" / "reference-encoder" / "encoder.safetensors"
LAB = checkpoint_folder()
EXAMPLES = LAB.parent / "examples"
VOICES = ["casual_female", "neutral_male"]
WEIGHTS = "consolidated.safetensors"

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture
def lab_copy(tmp_path: Path) -> Path:
    """A copy of the lab checkpoint that a test may break."""
    return Path(shutil.copytree(LAB, tmp_path / "broken-lab"))


def change_weights(folder: Path, change: Change, file: str = WEIGHTS) -> None:
    save_file(change(load_file(folder / file)), folder / file)


def under_test(folder: Path, voices: list[str] = VOICES, load: bool = True) -> CheckpointUnderTest:
    import revox

    made = CheckpointUnderTest(folder, quick=True)
    made.names = choose_voices(folder, voices, quick=True)
    if load:
        made.tts = revox.load(folder, "cpu", torch.float32)
    return made


def to_hugging_face(weight: Tensor, head_dim: int) -> Tensor:
    """The permutation of transformers' conversion script for Mistral: rows 2i to i, 2i + 1 to i + half."""
    rows, dim = weight.shape
    pairs = weight.view(rows // head_dim, head_dim // 2, 2, dim)
    return pairs.transpose(1, 2).reshape(rows, dim).contiguous()


# -- the sound


def test_noise_hum_and_silence_are_not_speech_and_recordings_are():
    rate, rng = 24000, np.random.default_rng(0)
    t = np.arange(4 * rate) / rate
    noise = 0.05 * rng.standard_normal(len(t))
    hum = 0.05 * sum(np.sin(2 * np.pi * 50 * k * t) / k for k in range(1, 8))
    tone = 0.1 * np.sin(2 * np.pi * 200 * t)
    throbbing = noise * (1 + np.sin(2 * np.pi * 4 * t))
    for sound in (noise, hum, tone, throbbing, np.zeros_like(t), np.full_like(t, np.nan)):
        assert not measure(Audio(sound, rate)).is_speech
    clips = sorted(EXAMPLES.glob("*.flac"))
    assert clips
    assert all(measure(read_audio(clip)).is_speech for clip in clips)


# -- the whole


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[DoctorReport, Path]:
    """The doctor's report on the lab as it ships, and where it was written, under a telling path."""
    folder = tmp_path_factory.mktemp("somebody-private") / "my-lab"
    shutil.copytree(LAB, folder)
    report = examine(folder, DoctorSettings(tuple(VOICES), quick=True, device="cpu"))
    out = folder.parent / "report"
    write_report(report, out, [folder, out])
    return report, out


def test_the_shipped_lab_passes(healthy: tuple[DoctorReport, Path]):
    report, _ = healthy
    failed = [
        (finding.name, finding.sentence) for finding in report.findings if finding.verdict is Verdict.FAIL
    ]
    assert not failed
    assert not report.stopped
    assert {finding.name for finding in report.findings} >= {"inventory", "speaking", "q/k layout", "speed"}


def test_the_report_tells_no_path_and_no_user(healthy: tuple[DoctorReport, Path]):
    report, out = healthy
    told = json.loads((out / "doctor.json").read_text())
    assert told["verdict"] == report.verdict.value
    assert [f["name"] for f in told["findings"]] == [f.name for f in report.findings]
    for text in ((out / "doctor.md").read_text(), (out / "doctor.json").read_text()):
        assert "my-lab" in text
        assert "somebody-private" not in text
        assert str(Path.home()) not in text
        assert f"/{getpass.getuser()}/" not in text
        assert "/tmp" not in text


def test_sentences_with_paths_are_cleaned_before_they_are_written(tmp_path: Path):
    private = tmp_path / "ada" / "models"
    sentence = f"{private}/lab/tekken.json is missing; see {Path.home()}/notes/a.txt or /srv/data/x.pt."
    report = DoctorReport("lab", {}, [CheckResult(Verdict.FAIL, sentence, name="inventory")])
    markdown, data = write_report(report, tmp_path / "out", [private / "lab"])
    for text in (markdown.read_text(), data.read_text()):
        assert "lab/tekken.json is missing" in text
        assert "ada" not in text
        assert str(Path.home()) + "/" not in text
        assert "/srv" not in text


def test_ctrl_c_keeps_what_was_found(tiny_checkpoint: Path):
    def stop(at: Progress) -> None:
        if at.facts["check"] == "weights":
            raise KeyboardInterrupt

    report = examine(tiny_checkpoint, DoctorSettings(quick=True), progress=stop)
    assert report.stopped
    assert report.finding("inventory").verdict is Verdict.PASS
    assert report.finding("weights").verdict is Verdict.SKIPPED
    assert report.finding("speed").verdict is Verdict.SKIPPED


def test_weights_that_do_not_load_for_any_reason_cost_no_report(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise RuntimeError("out of memory: 9 GB wanted\nand a trace of frames")

    monkeypatch.setattr("revox.load", full)
    shown: list[CheckResult] = []
    report = examine(tiny_checkpoint, DoctorSettings(quick=True), on_finding=shown.append)
    assert shown == report.findings
    assert report.finding("loading").sentence.endswith("RuntimeError: out of memory: 9 GB wanted")
    assert report.finding("inventory").verdict is Verdict.PASS
    assert report.finding("speed").verdict is Verdict.SKIPPED


def test_a_checkpoint_without_a_voice_is_not_said_to_pass(tiny_checkpoint_copy: Path):
    shutil.rmtree(tiny_checkpoint_copy / "voice_embedding")
    report = examine(tiny_checkpoint_copy, DoctorSettings(quick=True))
    assert report.finding("loading").verdict is Verdict.WARN
    assert "no voice to examine" in report.finding("loading").sentence
    assert report.finding("speed").verdict is Verdict.SKIPPED


def test_the_command_exits_with_1_on_a_fault_and_with_the_report(
    tiny_checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = importlib.import_module("revox.doctor.examine")
    monkeypatch.setattr(module, "LOADED", dict(list(module.LOADED.items())[:2]))
    (tiny_checkpoint_copy / "voice_embedding" / "de_male.pt").unlink()
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(doctor_command.command)
    settings = ["--quick", "--voices", "pt_male,pt_female", "--out", str(tmp_path / "out"), "--sounds"]
    result = CliRunner().invoke(app, [str(tiny_checkpoint_copy), *settings])
    assert result.exit_code == 1, result.output
    assert "de_male" in (tmp_path / "out" / "doctor.md").read_text()
    assert (tmp_path / "out" / "sounds" / "pt_male.decoded.wav").is_file()


def test_random_weights_are_told_from_a_trained_model(tiny_checkpoint: Path):
    examined = under_test(tiny_checkpoint, ["pt_male", "pt_female"])
    assert voice_checks.decoded_presets(examined).verdict is Verdict.FAIL


# -- q/k layout


def test_query_and_key_rows_in_hugging_faces_layout_are_named(lab_copy: Path):
    config = under_test(lab_copy, load=False).config.backbone

    def permute(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for i in range(config.n_layers):
            for name in ("wq", "wk"):
                key = f"layers.{i}.attention.{name}.weight"
                state[key] = to_hugging_face(state[key], config.head_dim)
        return state

    change_weights(lab_copy, permute)
    broken = under_test(lab_copy)
    assert voice_checks.decoded_presets(broken).verdict is Verdict.PASS  # the codec is well
    finding = layout.query_key_layout(broken)
    assert finding.verdict is Verdict.FAIL
    assert "Hugging Face's layout" in finding.sentence


def test_reading_as_hugging_face_undoes_the_conversion_and_is_undone(tiny_checkpoint: Path):
    backbone = under_test(tiny_checkpoint, ["pt_male"]).model.model.backbone
    before = [layer.attention.wk.weight.clone() for layer in backbone.layers]
    converted = [to_hugging_face(weight, backbone.config.head_dim) for weight in before]
    for layer, weight in zip(backbone.layers, converted, strict=True):
        layer.attention.wk.weight.data = weight
    with layout.read_as_hugging_face(backbone):
        for layer, weight in zip(backbone.layers, before, strict=True):
            assert torch.equal(layer.attention.wk.weight, weight)
    for layer, weight in zip(backbone.layers, converted, strict=True):
        assert torch.equal(layer.attention.wk.weight, weight)


# -- voices


def sounding(pitch: float, voiced: float = 0.6) -> SoundFigures:
    return SoundFigures(4.0, -25.0, 40.0, 0.8, voiced, pitch, 0.5, 0.95)


class Voices(CheckpointUnderTest):
    """A checkpoint whose voices have these pitches (and voiced shares)."""

    def __init__(self, pitches: dict[str, tuple[float, float]]) -> None:
        super().__init__(Path("nowhere"), names=list(pitches))
        self.pitches = pitches

    def decoded_figures(self, name: str) -> SoundFigures:
        return sounding(*self.pitches[name])


def test_two_files_swapped_between_the_sexes_are_named():
    pitches = {"pt_male": (110, 0.6), "pt_female": (210, 0.6), "de_male": (215, 0.6), "it_female": (105, 0.5)}
    finding = voice_checks.pitch_and_names(Voices(pitches))
    assert finding.verdict is Verdict.FAIL
    assert "de_male and it_female" in finding.sentence
    assert "pt_" not in finding.sentence


def test_one_odd_pitch_is_a_warning_and_an_unclear_one_is_none():
    one_odd = {"pt_male": (240, 0.6), "pt_female": (210, 0.6), "de_male": (100, 0.6)}
    assert voice_checks.pitch_and_names(Voices(one_odd)).verdict is Verdict.WARN
    between = {"pt_male": (170, 0.6), "pt_female": (150, 0.6), "de_male": (230, 0.05)}
    assert voice_checks.pitch_and_names(Voices(between)).verdict is Verdict.PASS


def test_swapped_voices_of_the_lab_are_named(lab_copy: Path):
    whole = under_test(lab_copy, ["it_male", "fr_male", "casual_female", "hi_female"])
    figures = {name: whole.decoded_figures(name) for name in whole.names}
    male = min(("it_male", "fr_male"), key=lambda n: figures[n].pitch)
    female = max(("casual_female", "hi_female"), key=lambda n: figures[n].pitch)
    assert voice_checks.pitch_and_names(whole).verdict is not Verdict.FAIL
    files = [lab_copy / "voice_embedding" / f"{name}.pt" for name in (male, female)]
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)
    swapped = under_test(lab_copy, whole.names, load=False)
    swapped.tts = whole.tts
    finding = voice_checks.pitch_and_names(swapped)
    assert finding.verdict is Verdict.FAIL
    assert f"{min(male, female)} and {max(male, female)}" in finding.sentence


def test_swapped_voices_of_other_lengths_are_named_from_their_rows(tiny_checkpoint_copy: Path):
    files = [tiny_checkpoint_copy / "voice_embedding" / f"{name}.pt" for name in ("it_male", "fr_male")]
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)
    finding = folder_checks.inventory(under_test(tiny_checkpoint_copy, ["pt_male"], load=False))
    assert finding.verdict is Verdict.FAIL
    assert "it_male and fr_male are swapped" in finding.sentence


def test_rows_of_another_checkpoint_are_named(lab_copy: Path):
    path = lab_copy / "voice_embedding" / "neutral_male.pt"
    rows = torch.load(path).detach().clone()
    rows[:7] = torch.randn(7, rows.shape[1]).to(torch.bfloat16)
    torch.save(rows, path)
    finding = voice_checks.voice_embedding(under_test(lab_copy))
    assert finding.verdict is Verdict.FAIL
    assert "neutral_male" in finding.sentence
    assert "casual_female" not in finding.sentence


def test_a_voice_without_its_end_frame_is_named(tiny_checkpoint_copy: Path):
    path = tiny_checkpoint_copy / "voice_embedding" / "pt_male.pt"
    rows = torch.load(path)
    torch.save(torch.cat((rows[:-1], rows[:1])), path)
    finding = voice_checks.voice_embedding(under_test(tiny_checkpoint_copy, ["pt_male", "pt_female"]))
    assert finding.verdict is Verdict.WARN
    assert "pt_male do not close" in finding.sentence
    finding = voice_checks.voice_embedding(under_test(tiny_checkpoint_copy, ["pt_female"]))
    assert finding.verdict is Verdict.PASS


# -- the codec


def test_a_codec_with_tensors_missing_is_named_and_nothing_else_is_tried(lab_copy: Path):
    def drop(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if not k.startswith("audio_tokenizer.decoder_blocks.7.")}

    change_weights(lab_copy, drop)
    report = examine(lab_copy, DoctorSettings(tuple(VOICES), quick=True))
    finding = report.finding("inventory")
    assert finding.verdict is Verdict.FAIL
    assert "half-loaded codec" in finding.sentence
    assert "audio_tokenizer.decoder_blocks.7." in finding.sentence
    assert report.finding("speaking").verdict is Verdict.SKIPPED


def test_a_codec_left_partly_at_random_values_is_named(lab_copy: Path):
    """Fresh modules as torch makes them: uniform matrices, norms of 1, LayerScale at its start."""
    generator = torch.Generator().manual_seed(0)

    def forget(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in state.items():
            if not name.startswith(
                ("audio_tokenizer.decoder_blocks.5.", "audio_tokenizer.decoder_blocks.7.")
            ):
                continue
            if tensor.dim() > 1:
                bound = 1 / math.sqrt(tensor[0].numel())
                state[name] = (2 * torch.rand(tensor.shape, generator=generator) - 1).mul(bound).bfloat16()
            else:
                state[name] = torch.full_like(tensor, 0.2 if name.endswith("_scale") else 1.0)
        return state

    change_weights(lab_copy, forget)
    broken = under_test(lab_copy)
    finding = folder_checks.weights(broken)
    assert finding.verdict is Verdict.FAIL
    assert "codec is half-loaded" in finding.sentence
    named = " ".join(broken.suspects)
    assert "decoder_blocks.5." in named
    assert "decoder_blocks.7." in named
    assert not any(".decoder_blocks.1." in name or ".decoder_blocks.3." in name for name in broken.suspects)


def test_an_encoder_that_learned_for_minutes_is_a_warning_and_one_that_did_not_a_failure(lab_copy: Path):
    inject(lab_copy, LAB_ENCODER)
    generator = torch.Generator().manual_seed(0)
    for blocks, verdict in (((0,), Verdict.WARN), (range(8), Verdict.FAIL)):
        prefixes = tuple(f"audio_tokenizer.encoder_blocks.{block}." for block in blocks)

        def forget(state: dict[str, Tensor], prefixes: tuple[str, ...] = prefixes) -> dict[str, Tensor]:
            for name, tensor in state.items():
                if name.startswith(prefixes) and tensor.dim() > 1:
                    state[name] = (0.05 * torch.randn(tensor.shape, generator=generator)).bfloat16()
            return state

        change_weights(lab_copy, forget, ENCODER_WEIGHTS)
        subject = under_test(lab_copy)
        finding = folder_checks.weights(subject)
        assert finding.verdict is verdict, finding.sentence
        assert "encoder_blocks.0." in finding.sentence
        assert subject.suspects == []  # nothing that decodes
    assert "half-loaded" in finding.sentence


def test_a_codec_left_partly_at_zero_is_named_twice(lab_copy: Path):
    def zero(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            k: v * 0 if k.startswith("audio_tokenizer.decoder_blocks.6.") else v for k, v in state.items()
        }

    change_weights(lab_copy, zero)
    broken = under_test(lab_copy)
    assert "decoder_blocks.6.conv" in folder_checks.weights(broken).sentence
    finding = voice_checks.decoded_presets(broken)
    assert finding.verdict is Verdict.FAIL
    assert "half-loaded" in finding.sentence
    assert "decoder_blocks.6.conv" in finding.sentence


def test_trained_and_fresh_matrices_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(400, 300, generator=generator)
    assert folder_checks.noise_likeness(fresh) == pytest.approx((1, 1, 1), abs=0.12)
    direction = torch.outer(torch.randn(400, generator=generator), torch.randn(300, generator=generator))
    assert folder_checks.noise_likeness(fresh + 0.1 * direction)[0] > 1.1


# -- the tokenizer


def tokenizer_of(folder: Path, **settings: object) -> CheckResult:
    voices = json.loads((folder / "tekken.json").read_text())["audio"]["voice_num_audio_tokens"]
    write_tekken(folder / "tekken.json", voices, **settings)
    return folder_checks.tokenizer(under_test(folder, load=False))


def test_a_tokenizer_larger_or_much_smaller_than_the_table_is_named(lab_copy: Path):
    larger = tokenizer_of(lab_copy, vocab_size=4000)
    params = json.loads((lab_copy / "params.json").read_text())
    (lab_copy / "params.json").write_text(json.dumps(params | {"vocab_size": 2 * params["vocab_size"]}))
    for finding in (larger, tokenizer_of(lab_copy)):
        assert finding.verdict is Verdict.FAIL
        assert "wrong tokenizer" in finding.sentence


def test_a_tokenizer_with_other_special_ids_is_named(lab_copy: Path):
    path = lab_copy / "tekken.json"
    data = json.loads(path.read_text())
    for token in data["special_tokens"]:  # [AUDIO] and [BEGIN_AUDIO] change places
        token["rank"] = {24: 25, 25: 24}.get(token["rank"], token["rank"])
    data["special_tokens"].sort(key=lambda token: token["rank"])
    path.write_text(json.dumps(data))
    finding = folder_checks.tokenizer(under_test(lab_copy, load=False))
    assert finding.verdict is Verdict.FAIL
    assert "[AUDIO] is 25 and params.json says 24" in finding.sentence


def test_what_is_known_of_the_release_is_used_for_its_sizes_only(tmp_path: Path, lab_copy: Path):
    from revox.checkpoint.release import PRESETS

    (tmp_path / "params.json").write_text(RELEASE_PARAMS.read_text())
    release = CheckpointUnderTest(tmp_path)
    assert release.is_release_sized
    assert not CheckpointUnderTest(lab_copy).is_release_sized
    rows = {**PRESETS, "pt_male": PRESETS["nl_male"], "nl_male": PRESETS["pt_male"]}
    # Both lists of the folder agree; only the release knows better.
    same = {name: (count, count) for name, count in rows.items()}
    assert set(folder_checks.exchanged_voices(release, same) or ()) == {"pt_male", "nl_male"}
    assert folder_checks.exchanged_voices(CheckpointUnderTest(lab_copy), same) is None


def test_a_vocabulary_in_another_order_shows_in_a_table_with_structure():
    """Rows made alike for " word", "word" and " Word"; then the same table under a shuffled vocabulary."""
    from lab.tokenizer import tekken

    generator = torch.Generator().manual_seed(0)
    stems = [
        "".join(chr(97 + int(c)) for c in torch.randint(26, (6,), generator=generator)) for _ in range(200)
    ]
    words = [f" {stem}" for stem in stems] + [f" {stem.capitalize()}" for stem in stems]
    contents = tekken({}, words=words)
    common = torch.randn(200, 128, generator=generator).repeat(2, 1)
    table = torch.randn(1256 + 400, 128, generator=generator)
    table[1256:] = common + 0.5 * torch.randn(400, 128, generator=generator)
    table += torch.randn(128, generator=generator) * torch.randn(1656, 1, generator=generator)
    alike, random, error, structured = folder_checks.spelling_likeness(contents, table)
    assert structured
    assert alike - random > 10 * error
    order = torch.randperm(400, generator=generator).tolist()
    shuffled = tekken({}, words=[words[i] for i in order])
    alike, random, error, structured = folder_checks.spelling_likeness(shuffled, table)
    assert structured
    assert alike - random < 3 * error


# -- cloning, speed


def test_the_encoder_check_tells_an_untrained_encoder(tiny_checkpoint_with_encoder: Path):
    finding = clone_checks.encoder(under_test(tiny_checkpoint_with_encoder, ["pt_male", "pt_female"]))
    assert finding.verdict is Verdict.FAIL
    assert "unrelated" in finding.sentence


def test_the_encoder_check_judges_the_codes_that_serving_takes(
    tiny_checkpoint_with_encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    judged: list[Tensor] = []
    monkeypatch.setattr(clone_checks, "semantic_agreement", lambda codes, _: float(judged.append(codes) or 0))
    examined = under_test(tiny_checkpoint_with_encoder, ["hi_female", "pt_female"])
    clone_checks.encoder(examined)
    sound = torch.from_numpy(examined.decoded("hi_female").samples)[None]
    codec = examined.model.model.audio_tokenizer
    with torch.inference_mode():
        loaded, served = codec.encode(sound)[0], codec.bfloat16().encode_as_served(sound)[0]
    assert torch.equal(judged[0], served)
    assert not torch.equal(loaded, served)


@pytest.mark.slow
def test_the_labs_own_encoder_passes(lab_copy: Path):
    from revox.evaluation.reference_encoder import original_codec

    examined = under_test(lab_copy, ["casual_female", "neutral_male", "es_female", "it_male"])
    examined.model.model.audio_tokenizer = original_codec(lab_copy, LAB_ENCODER)
    assert clone_checks.encoder(examined).verdict is not Verdict.FAIL


def test_inverting_a_decoded_preset_comes_nearer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clone_checks, "STEPS", 4)
    monkeypatch.setattr(clone_checks, "CLONED_FRAMES", 12)
    examined = under_test(LAB)
    examined.quick = False
    examined.verifier = "not installed"
    finding = clone_checks.clone(examined)
    assert finding.verdict is not Verdict.FAIL
    assert {figure.name for figure in finding.figures} >= {"semantic codes recovered", "seconds a step"}


def test_inversion_through_an_untrained_decoder_is_a_warning_though_its_objective_falls(
    tiny_checkpoint: Path,
):
    examined = under_test(tiny_checkpoint, ["pt_male", "pt_female"])
    examined.quick, examined.verifier = False, "not installed"
    finding = clone_checks.clone(examined)
    assert finding.verdict is Verdict.WARN
    assert "levels off" in finding.sentence


def test_the_memory_of_a_stream_is_counted_from_its_beginning(monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    codes = SimpleNamespace(to=lambda device: torch.zeros(37, 2))

    def stream(*_: object, **__: object) -> list[Audio]:
        events.append("stream")
        return [Audio(np.zeros(2400, np.float32), 24000)]

    codec = SimpleNamespace(decode=lambda codes: codes)
    config = SimpleNamespace(codec=SimpleNamespace(frame_rate=12.5))
    model = SimpleNamespace(device=torch.device("cuda"), config=config, audio_tokenizer=codec)
    subject = SimpleNamespace(
        model=SimpleNamespace(model=model, stream=stream), names=["a"], seed=0, is_release_sized=False,
        update=lambda what: None, recovered=lambda voice: SimpleNamespace(codes=codes),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: events.append("read") or 9e9)
    speed.speed(subject)  # type: ignore[arg-type]
    assert events == ["reset", "stream", "read"]


def test_an_unknown_voice_or_recognizer_is_the_users_mistake(tiny_checkpoint: Path):
    from revox.checkpoint.errors import VoiceError
    from revox.metrics.errors import MetricError

    with pytest.raises(VoiceError, match="pt_male"):
        examine(tiny_checkpoint, DoctorSettings(("pt_mail",)))
    with pytest.raises(MetricError, match="pocketsphinx"):
        examine(tiny_checkpoint, DoctorSettings(recognizer="ears"))


def test_the_doctor_reports_whispers_transcript_and_no_path_of_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    class Whisper:
        def __init__(self, source: str, device: str):
            assert (source, device) == (str(tmp_path / "models"), "cpu")

        def transcribe(self, audio: Audio) -> str:
            return "Please open the window in the kitchen!"

    monkeypatch.setattr("revox.metrics.whisper.WhisperRecognizer", Whisper)
    recognizer = speech_checks.find_recognizer(f"whisper:{tmp_path}/models")
    subject = under_test(tiny_checkpoint, ["pt_male"])
    subject.recognizer = recognizer
    finding = speech_checks.words(subject)
    assert finding.verdict is Verdict.PASS
    assert finding.rows[0]["word error rate"] == 0
    settings = DoctorSettings(recognizer=f"{tmp_path}/models")
    assert _made_with(subject, torch.device("cpu"), settings)["recognizer"] == "whisper"


def test_pocketsphinx_picks_among_the_doctors_sentences():
    pytest.importorskip("pocketsphinx")
    recognizer = speech_checks.find_recognizer("pocketsphinx")
    assert recognizer is not None
    assert recognizer.transcribe(Audio(np.zeros(16000, np.float32), 16000)) == ""


def test_without_a_recognizer_the_words_are_skipped_and_say_how(tiny_checkpoint: Path):
    finding = speech_checks.words(under_test(tiny_checkpoint, ["pt_male"], load=False))
    assert finding.verdict is Verdict.SKIPPED
    assert "--recognizer" in finding.sentence
