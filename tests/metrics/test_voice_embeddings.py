from __future__ import annotations

import math

import pytest
import torch

from conftest import TINY, preset_codes, tiny_model
from revox.metrics.errors import MetricError
from revox.metrics.voice_embeddings import PresetEmbeddings


def with_end(frames):
    """The frames and one more, which stands for the end and must not count."""
    return torch.cat((frames, torch.full_like(frames[:1], 99.0)))


def test_figures_of_an_embedding_agree_with_those_by_hand():
    """Frames around (3, 0) in two dimensions; the voice is off by (0, 1) and varies twice as much."""
    presets = [torch.tensor([[3.0, -1.0], [3.0, 1.0]]), torch.tensor([[2.0, -1.0], [4.0, 1.0]])]
    embeddings = PresetEmbeddings([with_end(preset) for preset in presets])
    figures = embeddings.score(with_end(torch.tensor([[2.0, -1.0], [4.0, 3.0]])))
    assert figures["offset"] == pytest.approx(1.0)
    assert figures["mean_cosine"] == pytest.approx(3 / math.sqrt(10))
    assert figures["frame_norm"] == pytest.approx((math.sqrt(5) + 5) / 2)
    # Deviations of the presets: (0, 1) and (1, 1), root mean squares (0.707, 1); the voice's are 1 and 2.
    assert figures["spread"] == pytest.approx(math.sqrt(math.sqrt(2) * 2))
    assert figures["sparsity"] == 0.0


def test_a_preset_is_like_the_others_and_a_constant_embedding_is_not():
    model = tiny_model()
    presets = [model.mm_audio_embeddings.voice_embedding(c) for c in preset_codes().values()]
    embeddings = PresetEmbeddings(presets)
    usual = [figures["spread_mismatch"] for figures in embeddings.score_presets()]
    assert len(usual) == 20
    constant = presets[0][:1].expand(30, -1)
    assert embeddings.score(with_end(constant))["spread_mismatch"] > 3 * max(usual)
    empty = torch.zeros(30, TINY.backbone.dim)
    assert embeddings.score(with_end(empty))["sparsity"] == 1.0
    assert embeddings.score(presets[3])["nearest_preset"] == pytest.approx(1.0, abs=1e-6)


def test_a_preset_has_no_nearest_of_one_other():
    torch.manual_seed(0)
    two = PresetEmbeddings([torch.randn(4, 8), torch.randn(5, 8)])
    assert not any("nearest_preset" in figures for figures in two.score_presets())
    assert two.score(torch.randn(4, 8))["nearest_preset"] > 0
    three = PresetEmbeddings([torch.randn(4, 8) for _ in range(3)])
    assert all("nearest_preset" in figures for figures in three.score_presets())


def test_one_preset_is_too_few():
    with pytest.raises(MetricError, match="fewer than two"):
        PresetEmbeddings([torch.randn(4, 8)])
