"""Naturalness without a reference: the mean opinion score that DistillMOS (arXiv 2502.05356) predicts.

The package distillmos holds its weights. It imports torchaudio, of which it uses nothing here but which must
load; docs/measuring.md says how to install both beside a torch for CPUs.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from revox.metrics.errors import MetricError
from revox.speech.audio import Audio

_RATE = 16000
_SHORTEST = 0.4  # seconds
LOWEST = 1.0
_INSTALL = "`pip install --no-deps distillmos xls-r-sqa torchaudio`"


class NaturalnessModel:
    """DistillMOS on the CPU. Raises MetricError when it is not installed or cannot be imported."""

    def __init__(self) -> None:
        library = _library()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights are
            self._model = library.ConvTransformerSQAModel().eval()

    def score(self, audio: Audio) -> float:
        """The predicted mean opinion score, 1 (bad) to 5 (excellent); 1 for silence and under 0.4 s."""
        samples = audio.at(_RATE).samples
        if len(samples) < _SHORTEST * _RATE or not samples.any():
            return LOWEST
        with torch.inference_mode():
            return float(self._model(torch.from_numpy(samples.copy())[None]))


def can_score_naturalness() -> bool:
    """Whether distillmos can be imported."""
    try:
        _library()
    except MetricError:
        return False
    return True


def _library() -> Any:
    try:
        import distillmos
    except ModuleNotFoundError as error:
        raise MetricError(
            f"naturalness needs distillmos, and {error.name} is not installed; install it with {_INSTALL}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MetricError(
            f"naturalness needs distillmos, which cannot be imported ({why}); beside a torch for CPUs, move "
            "torchaudio/lib/_torchaudio.so out of its folder (docs/measuring.md)"
        ) from None
    return distillmos
