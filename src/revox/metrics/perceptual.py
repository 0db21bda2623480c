"""PESQ and ESTOI, by their own libraries: how much worse than the original, and how much less intelligible.

Both are optional. PESQ (ITU-T P.862.2, wide band) is the extra `pesq`, which needs a C compiler; ESTOI
(Jensen and Taal 2016) is in the extra `eval`. They compare two waveforms moment by moment: for speech at
another pace, or by another speaker, they only say that it is another signal.
"""

from __future__ import annotations

import importlib.metadata
import warnings

import numpy as np

from revox.metrics.errors import MetricError
from revox.speech.audio import Audio

_RATE = 16000
_EXTRAS = {"pesq": "pesq", "pystoi": "eval"}


def installed(library: str) -> str | None:
    """The version of `pesq` or `pystoi`, or None when it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def pesq(reference: Audio, audio: Audio) -> float | None:
    """Wide-band PESQ of `audio` against `reference`, 1.0 (bad) to 4.64; None where it finds no speech.

    The longer is cut; both are brought to 16 kHz. Raises MetricError when the library is missing.
    """
    _require("pesq")
    import pesq as library

    a, b = _pair(reference, audio, _RATE)
    # It scales by the larger of both peaks and finds nothing to compare in silence.
    if not np.any(a) or not np.any(b):
        return None
    try:
        return float(library.pesq(_RATE, a, b, "wb"))
    except library.PesqError:  # no utterances, or shorter than a quarter of a second
        return None


def estoi(reference: Audio, audio: Audio) -> float | None:
    """Extended short-time objective intelligibility, 1 for the reference itself, about 0 for noise.

    The longer is cut. None where less than 0.4 s of speech is left without its pauses, which is too little.
    Raises MetricError when the library is missing.
    """
    _require("pystoi")
    from pystoi import stoi

    a, b = _pair(reference, audio, reference.rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # how it says that there is too little speech
        try:
            return float(stoi(a.astype(np.float64), b.astype(np.float64), reference.rate, extended=True))
        except (RuntimeWarning, ValueError):
            return None


def _pair(reference: Audio, audio: Audio, rate: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = reference.at(rate).samples, audio.at(rate).samples
    length = min(len(a), len(b))
    return a[:length], b[:length]


def _require(library: str) -> None:
    if installed(library) is None:
        extra = _EXTRAS[library]
        raise MetricError(f"{library} is not installed; install it with `pip install 'revox[{extra}]'`")
