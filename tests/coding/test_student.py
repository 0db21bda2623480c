"""Pairs from the decoder, and the search from a posterior."""

from __future__ import annotations

import pytest
import torch

from revox.checkpoint.load import load_model
from revox.coding.features import SpectralFeatures
from revox.coding.invert import InversionConfig, invert
from revox.coding.pairs import PairSettings, PresetPairs
from revox.coding.presets import preset_codes
from revox.coding.regularizers import Posterior, Regularizers
from revox.demo import checkpoint_folder
from revox.model.codec import Codec
from revox.model.config import CodecConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STILL = PairSettings(mixed=0.0, offset=0.0, jitter=0.0, replace=0.0)


@pytest.fixture(scope="module")
def lab() -> tuple[Codec, list[torch.Tensor]]:
    parts = ("audio_tokenizer", "mm_audio_embeddings")
    model = load_model(checkpoint_folder(), dtype=torch.float32, parts=parts)
    return model.audio_tokenizer, preset_codes(checkpoint_folder(), model, max_frames=250)


def test_undisturbed_pairs_are_stretches_of_presets_and_what_the_decoder_makes_of_them(lab):
    codec, bank = lab
    source = PresetPairs(codec, bank, STILL)
    codes, audio = source.draw(2, 12, torch.Generator().manual_seed(0))
    assert codes.shape == (2, 37, 12)
    assert torch.allclose(audio, codec.decode(codes), atol=1e-6)
    known = {tuple(column) for b in bank for column in b.T.tolist()}
    assert all(tuple(column) in known for one in codes for column in one.T.tolist())


def test_disturbed_pairs_stay_codes_and_differ_from_the_presets(lab):
    codec, bank = lab
    codes = PresetPairs(codec, bank).draw_codes(8, 20, torch.Generator().manual_seed(0))
    assert int(codes[:, 1:].min()) >= 0
    assert int(codes[:, 1:].max()) <= 20
    assert int(codes[:, 0].max()) < codec.config.semantic_codebook_size
    known = {tuple(column) for b in bank for column in b.T.tolist()}
    assert not any(tuple(column) in known for one in codes for column in one.T.tolist())


def test_features_of_a_batch_are_those_of_its_clips(lab):
    features = SpectralFeatures(lab[0].config)
    clips = torch.randn(3, 5000) * 0.1
    assert torch.allclose(features(clips)[1], features(clips[1]), atol=1e-5)


def test_inversion_starts_at_the_posterior_and_a_heavy_weight_keeps_it_there(lab):
    codec, bank = lab
    wanted = bank[0][:, :10]
    target = codec.decode(wanted[None])[0]
    log_probabilities = torch.full((10, codec.config.semantic_codebook_size), -20.0)
    log_probabilities[torch.arange(10), wanted[0]] = 0.0
    posterior = Posterior(log_probabilities, wanted[1:].float() / 10 - 1)
    terms = Regularizers(posterior=posterior)
    none = InversionConfig(steps=0, local_search_rounds=0)
    assert torch.equal(invert(codec, target, config=none, regularizers=terms).codes, wanted)
    other = codec.decode(bank[1][None, :, :10])[0]
    moved = {}
    for weight in (0.0, 100.0):
        config = InversionConfig(steps=12, local_search_rounds=2, posterior_weight=weight)
        moved[weight] = invert(codec, other, config=config, regularizers=terms).codes
    assert torch.equal(moved[100.0], wanted)
    assert not torch.equal(moved[0.0], wanted)


def test_guidance_by_soft_codes_bends_the_search(lab):
    codec, bank = lab
    target = codec.decode(bank[0][None, :, :10])[0]
    asked: list[tuple[torch.Size, torch.Size]] = []

    def low_levels(probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        asked.append((probabilities.shape, values.shape))
        return values.mean()

    config = InversionConfig(steps=24, local_search_rounds=0, guidance_weight=20.0, guidance_every=2)
    plain = invert(codec, target, config=config).codes
    bent = invert(codec, target, config=config, regularizers=Regularizers(guidance=low_levels)).codes
    assert set(asked) == {((10, codec.config.semantic_codebook_size), (36, 10))}
    assert 12 < len(asked) < 30
    assert bent[1:].float().mean() < plain[1:].float().mean() - 2


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
