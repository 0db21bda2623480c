"""Mel spectrograms of several clips in one picture, one under the other, on shared scales."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from revox.speech.audio import Audio
from revox.speech.errors import AudioError
from revox.speech.files import replace_file

_FLOOR, _CEILING = -60.0, 5.0  # dB relative to the clip's loud parts
_MELS = 96
_TICKS = (0, 500, 1000, 2000, 4000, 8000)  # Hz


def mel_picture(
    path: str | os.PathLike[str], clips: Sequence[tuple[str, Audio]], max_seconds: float = 30.0
) -> Path:
    """Draw the mel spectrogram of each (title, audio) to a PNG; returns its path.

    All clips share the time axis (the first `max_seconds` of each) and the frequency axis (0 Hz to half the
    highest rate, at most 12 kHz); levels are in dB relative to each clip's loud parts. Raises AudioError
    when there is nothing to draw or matplotlib is missing, OSError when the file cannot be written.
    """
    if not clips or any(audio.samples.shape[-1] == 0 for _, audio in clips):
        raise AudioError("There is no audio to draw; give at least one clip with samples.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise AudioError("Drawing needs matplotlib; install it with `pip install 'revox[eval]'`.") from None

    rate = min(24000, max(audio.rate for _, audio in clips))
    seconds = min(max_seconds, max(audio.seconds for _, audio in clips))
    ticks = [hz for hz in _TICKS if hz < rate / 2]
    # A figure of its own, not pyplot: no global state, no display.
    figure = Figure(figsize=(10, 0.9 + 1.9 * len(clips)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(len(clips), 1, sharex=True, sharey=True))
    image = None
    for axis, (title, audio) in zip(axes, clips, strict=True):
        levels = _levels(audio, rate, seconds)
        axis.set_facecolor("black")
        extent = (0.0, levels.shape[1] * 0.01, 0.0, float(_MELS))
        image = axis.imshow(
            levels, cmap="magma", vmin=_FLOOR, vmax=_CEILING, origin="lower", aspect="auto", extent=extent
        )
        axis.set_title(f"{title}  ({audio.seconds:.2f} s)", loc="left", fontsize=10)
        axis.set_yticks([_band(hz, rate) for hz in ticks], labels=[str(hz) for hz in ticks])
        axis.set_ylabel("Hz")
        axis.set_xlim(0, seconds)
        axis.set_ylim(0, _MELS)
    axes[-1].set_xlabel("seconds")
    assert image is not None
    figure.colorbar(image, ax=list(axes), label="dB", pad=0.01, aspect=15 * len(clips), shrink=0.9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    replace_file(path, buffer.getvalue())
    return Path(path)


def _band(hz: float, rate: int) -> float:
    """The place of `hz` on the axis of mel bands, 0 to `_MELS`."""
    from revox.losses.stft import hz_to_mel

    return float(hz_to_mel(hz) / hz_to_mel(rate / 2)) * _MELS


def _levels(audio: Audio, rate: int, seconds: float) -> np.ndarray:
    """`[bands, frames]` in dB relative to the loudest 1 %, a frame each 10 ms, bands up to half of `rate`."""
    import torch

    from revox.losses.stft import hz_to_mel, mel_spectrogram, mel_to_hz

    samples = torch.from_numpy(audio.at(rate).samples[: round(seconds * rate)])
    n_fft = 1 << round(np.log2(rate * 0.043))
    mel = mel_spectrogram(samples, rate, n_fft, rate // 100, _MELS).double().numpy()
    # Half of the unit-area norm is undone, and hum does not set the scale: both would hide the speech.
    centers = mel_to_hz(np.linspace(0, hz_to_mel(rate / 2), _MELS))
    mel *= np.sqrt(np.maximum(centers, 1000.0) / 1000.0)[:, None]
    loud = max(float(np.percentile(mel[_MELS // 20 :], 99)), 1e-9)
    return 20 * np.log10(np.maximum(mel / loud, 1e-5))
