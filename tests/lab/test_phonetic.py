"""The loss by Whisper's states: its spectra and states against transformers' own, and what it tells apart."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from lab.phonetic import PhoneticDistance
from training.test_distill import save_whisper


@pytest.fixture(scope="module")
def distance(tmp_path_factory):
    return PhoneticDistance(save_whisper(tmp_path_factory.mktemp("whisper"), layers=5), 16000)


def wave(seed, seconds=1.0, rate=16000):
    time = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    tones = sum(np.sin(2 * np.pi * rng.uniform(100, 3000) * time) for _ in range(5))
    return torch.from_numpy((0.1 * tones * (1 + np.sin(9 * time))).astype(np.float32))


def test_spectra_are_whispers(distance):
    one = wave(0, 30.0)
    expected = WhisperFeatureExtractor()(one.numpy(), sampling_rate=16000, return_tensors="pt")
    found = distance.spectra(one[None])
    torch.testing.assert_close(found, expected.input_features, atol=1e-3, rtol=0)


def test_states_are_those_of_whispers_encoder_before_the_next_layer(distance):
    features = distance.spectra(wave(0, 30.0)[None])
    seen = []
    hooks = [
        distance.encoder.layers[n].self_attn_layer_norm.register_forward_hook(
            lambda _module, _given, out: seen.append(out)
        )
        for n in distance.layers
    ]
    with torch.no_grad():
        distance.encoder(features)
        for hook in hooks:
            hook.remove()
        found = distance.states(features)
    assert len(found) == len(seen) > 0
    for a, b in zip(found, seen, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_distance_grows_with_the_difference_and_only_the_second_waveform_learns(distance):
    real = torch.stack((wave(1), wave(2)))
    assert float(distance(real, real)) == 0
    noise = 1e-4 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    near, far = float(distance(real, real + noise)), float(distance(real, real.flip(0)))
    assert 0 < near < far
    leaf = (real + noise).requires_grad_()
    distance(real, leaf).backward()
    assert float(leaf.grad.norm()) > 0
    assert all(p.grad is None for p in distance.parameters())
