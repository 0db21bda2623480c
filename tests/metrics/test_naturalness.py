"""distillmos is not installed here: a stand-in notes how it is called."""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

from revox.metrics.errors import MetricError
from revox.metrics.naturalness import NaturalnessModel, can_score_naturalness
from revox.speech import Audio


class Peak(torch.nn.Module):
    """In place of DistillMOS: 4 for everything; notes the shapes it was given."""

    shapes: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        print("weights loaded from: here")

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return torch.full((len(x), 1), 4.0)


@pytest.fixture
def library(monkeypatch):
    Peak.shapes = []
    fake = types.ModuleType("distillmos")
    fake.ConvTransformerSQAModel = Peak
    monkeypatch.setitem(sys.modules, "distillmos", fake)


def test_a_sound_is_scored_at_16_khz_and_nothing_is_printed(library, capsys):
    assert can_score_naturalness()
    model = NaturalnessModel()
    assert model.score(Audio(np.ones(48000), 24000)) == 4.0
    assert Peak.shapes == [(1, 32000)]
    assert capsys.readouterr().out == ""


def test_silence_and_what_is_too_short_have_the_lowest_score(library):
    model = NaturalnessModel()
    assert model.score(Audio(np.zeros(48000), 24000)) == 1.0
    assert model.score(Audio(np.ones(4800), 24000)) == 1.0
    assert Peak.shapes == []


def test_a_missing_package_says_how_it_is_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "distillmos", raising=False)
    monkeypatch.setattr(sys, "path", [])
    assert not can_score_naturalness()
    with pytest.raises(MetricError, match=r"distillmos is not installed; .*--no-deps distillmos xls-r-sqa"):
        NaturalnessModel()


@pytest.mark.parametrize("error", ["OSError('libcudart.so.13: cannot open')", "ImportError('libcudart')"])
def test_a_torchaudio_for_cuda_beside_a_torch_for_cpus_is_a_sentence(monkeypatch, tmp_path, error):
    (tmp_path / "distillmos.py").write_text(f"raise {error}\n")
    monkeypatch.delitem(sys.modules, "distillmos", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert not can_score_naturalness()
    with pytest.raises(MetricError, match=r"libcudart.*move torchaudio/lib/_torchaudio\.so out"):
        NaturalnessModel()
