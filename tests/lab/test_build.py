"""A miniature build: every stage, resumed, to a folder in the release's format."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from revox.checkpoint.load import load_model
from revox.checkpoint.params import read_params
from revox.checkpoint.tensors import expected_tensors, read_header
from revox.checkpoint.voice_codes import recover_codes
from revox.checkpoint.voices import load_voice
from revox.lab.build import (
    BuildSettings,
    build,
    codec_trainer,
    encode_speech,
    make_speech,
    train_codec,
    write_params,
)
from revox.lab.codec_training import Codebook, CodecTraining, quantize_in_training
from revox.lab.data import SpeechSet, write_set
from revox.lab.errors import LabError
from revox.lab.language_training import LanguageTraining
from revox.lab.shards import pack
from revox.lab.sizes import PRESETS
from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.model.quantizer import SemanticCodebook

SETTINGS = BuildSettings(
    codec=CodecTraining(
        steps=4, batch=2, seconds=0.32, discriminator_from=2, discriminator_channels=2, save_every=2,
        validate_every=100, decoder_only_from=3, warmup=1, decay_steps=2,
    ),
    language=LanguageTraining(steps=3, batch=2, save_every=2, validate_every=100),
    codec_sizes={"dim": 32, "hidden_dim": 32, "head_dim": 8, "encoder_transformer_lengths_str": "1,1,1,1",
                 "decoder_transformer_lengths_str": "1,1,1,1"},
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
            index = [{**who, "text": t, "samples": len(p)} for t, p in zip(TEXTS, pieces, strict=True)]
            parts.append((np.concatenate(pieces), index))
        folder.mkdir(parents=True, exist_ok=True)
        write_set(folder, f"synthetic-{split}", iter(parts))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("build")
    _speech(root / "run" / "data")
    build(
        root / "run", root / "checkpoint", None, SETTINGS, encoder_out=root / "aside" / "encoder.safetensors",
        stages=("codec", "language", "folder"),
    )  # fmt: skip
    return root


def test_the_built_folder_has_the_releases_inventory_and_its_encoder_lies_apart(built: Path):
    expected = expected_tensors(read_params(built / "checkpoint"))
    found = read_header(built / "checkpoint" / "consolidated.safetensors")
    aside = read_header(built / "aside" / "encoder.safetensors")
    encoder = {name for name, spec in expected.items() if spec.component == "codec_encoder"}
    assert set(found) == set(expected) - encoder
    assert set(aside) == encoder
    for name, header in {**found, **aside}.items():
        assert tuple(header.shape) == tuple(expected[name].shape), name
        assert header.dtype == "BF16"


def test_a_presets_rows_are_the_sum_of_its_own_codes_under_the_encoder_put_aside(built: Path):
    folder = built / "checkpoint"
    model = load_model(folder)
    voice = load_voice(folder, PRESETS[3])
    recovered = recover_codes(
        voice.rows, model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight, model.config
    )
    assert torch.equal(model.mm_audio_embeddings.voice_rows(recovered.codes), voice.rows)


def test_the_built_model_speaks(built: Path):
    import revox

    tts = revox.load(built / "checkpoint")
    audio = tts.speak(TEXTS[0], PRESETS[0], max_seconds=0.4)
    assert audio.rate == 24000
    assert np.isfinite(audio.samples).all()


def test_an_interrupted_codec_run_goes_on_with_the_losses_of_an_uninterrupted_one(tmp_path: Path):
    _speech(tmp_path / "a" / "data")
    _speech(tmp_path / "b" / "data")
    params = write_params(tmp_path / "folder", SETTINGS)
    whole = codec_trainer(tmp_path / "a", params, SETTINGS, "cpu", False)
    expected = [whole.step()["loss"] for _ in range(4)]
    first = codec_trainer(tmp_path / "b", params, SETTINGS, "cpu", False)
    found = [first.step()["loss"] for _ in range(2)]
    first.save()
    second = codec_trainer(tmp_path / "b", params, SETTINGS, "cpu", False)
    assert second.step_count == 2
    found += [second.step()["loss"] for _ in range(2)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_finished_stage_is_not_repeated(built: Path, tmp_path: Path):
    before = (
        (built / "run" / "codec" / "codec-log.jsonl").read_text()
        if (built / "run" / "codec" / "codec-log.jsonl").exists()
        else ""
    )
    params = read_params(built / "run" / "folder")
    train_codec(built / "run", params, SETTINGS, "cpu", False, lambda stage, row: pytest.fail("it trained"))
    assert codec_trainer(built / "run", params, SETTINGS, "cpu", False).step_count == SETTINGS.codec.steps
    assert before == "" or before == (built / "run" / "codec" / "codec-log.jsonl").read_text()


def test_a_stage_asked_for_before_its_predecessor_says_which_one_is_missing(tmp_path: Path):
    _speech(tmp_path / "run" / "data")
    with pytest.raises(LabError, match="codec"):
        build(
            tmp_path / "run", tmp_path / "out", None, SETTINGS,
            encoder_out=tmp_path / "aside" / "encoder.safetensors", stages=("language",),
        )  # fmt: skip


def test_the_decoder_alone_learns_once_the_codes_are_settled(tmp_path: Path):
    _speech(tmp_path / "run" / "data")
    settings = replace(SETTINGS, codec=replace(SETTINGS.codec, decoder_only_from=0))
    params = write_params(tmp_path / "folder", settings)
    trainer = codec_trainer(tmp_path / "run", params, settings, "cpu", False)
    wave = np.random.default_rng(0).standard_normal(5760).astype(np.float32) * 0.1
    codes = encode_speech(trainer.codec, wave)
    heard = trainer.codec.decode(torch.from_numpy(codes.astype(np.int64))[None]).detach().clone()
    trainer.step()
    assert np.array_equal(encode_speech(trainer.codec, wave), codes)
    assert not torch.equal(trainer.codec.decode(torch.from_numpy(codes.astype(np.int64))[None]), heard)


def test_a_build_takes_its_speech_from_shards_where_there_are_some(tmp_path: Path):
    _speech(tmp_path / "run" / "data")
    pack(tmp_path / "run" / "data", tmp_path / "carried" / "shards")
    made = SpeechSet(tmp_path / "run" / "data", "train", "synthetic")
    make_speech(tmp_path / "carried", None, SETTINGS, lambda stage, row: None)
    carried = SpeechSet(tmp_path / "carried" / "data", "train", "synthetic")
    assert [u.text for u in carried.utterances] == [u.text for u in made.utterances]
    assert len(carried.waveform(3)) == len(made.waveform(3))


def test_training_quantizes_half_dithers_a_quarter_and_passes_a_quarter():
    config = CodecConfig(semantic_codebook_size=16, semantic_dim=4, acoustic_dim=36, dim=8, hidden_dim=8,
    head_dim=4,
                         n_heads=2, n_kv_heads=2)  # fmt: skip
    codec = Codec(config, with_encoder=False)
    rng = torch.Generator().manual_seed(0)
    codec.quantizer.semantic_codebook.embedding_sum.copy_(torch.randn(16, 4, generator=rng))
    latents = torch.randn(2000, 40, 3, generator=rng)
    read, codes, rows = quantize_in_training(codec, latents, rng)
    value = torch.tanh(latents[:, 4:])
    rounded = ((value + 1) / 2 * 20).round() / 10 - 1
    exact = (read[:, 4:] - value).abs().amax((1, 2)) < 1e-6
    whole = (read[:, 4:] - rounded).abs().amax((1, 2)) < 1e-5
    assert abs(float(whole.float().mean()) - 0.5) < 0.04
    assert abs(float(exact.float().mean()) - 0.25) < 0.04
    noise = (read[:, 4:] - value)[~exact & ~whole]
    assert float(noise.abs().max()) <= 1 / 21 + 1e-6
    snapped = (read[:, :4] - rows).abs().amax((1, 2)) < 1e-6
    assert abs(float(snapped.float().mean()) - 0.5) < 0.04
    assert torch.equal(codec.quantizer.semantic_codebook.encode(latents[:, :4]), codes)


def test_a_codebook_row_that_nobody_uses_is_placed_on_a_recent_latent():
    book = SemanticCodebook(4, 2)
    book.embedding_sum.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [60.0, 60.0]]))
    upkeep = Codebook(book, decay=0.5, floor=0.2)
    rng = torch.Generator().manual_seed(0)
    latents = torch.tensor([[0.1, 0.0], [1.1, 1.0]]).repeat(8, 1)
    for _ in range(6):
        codes = book.encode(latents.T[None])[0]
        upkeep.update(latents, codes, rng)
    assert float(torch.cdist(book.embedding, latents).amin(1).max()) < 0.2
