"""How fast one stream is here, and what it takes."""

from __future__ import annotations

import sys
import time

import torch

from revox.doctor.checkpoint_under_test import SENTENCES, CheckpointUnderTest
from revox.doctor.findings import NO_RANGE, CheckResult, Figure, Verdict

SPEED_SECONDS = 4.0


def speed(subject: CheckpointUnderTest) -> CheckResult:
    """Frames a second, real-time factor and time to the first audio of one stream; decoding alone; memory."""
    tts = subject.model
    model, rate = tts.model, tts.model.config.codec.frame_rate
    voice = subject.names[0]
    text = max(SENTENCES, key=len)
    subject.update(f"{voice}: one stream")
    reset_memory(model.device)  # so that it is not that of the checks before
    started = time.perf_counter()
    first, seconds = None, 0.0
    for chunk in tts.stream(text, voice, seed=subject.seed, takes=1, max_seconds=SPEED_SECONDS):
        first = first or time.perf_counter() - started
        seconds += chunk.seconds
    took = time.perf_counter() - started
    codes = subject.recovered(voice).codes.to(model.device)
    _wait(model.device)
    started = time.perf_counter()
    model.audio_tokenizer.decode(codes[None])
    _wait(model.device)
    decoding = time.perf_counter() - started
    factor = took / seconds if seconds else None
    on_gpu = model.device.type == "cuda"
    figures = (
        Figure("real-time factor, one stream", factor, "under 0.5" if on_gpu else NO_RANGE),
        Figure("frames a second", seconds * rate / took, f"{rate:g} is real time"),
        Figure("seconds to the first audio", first),
        Figure("codec, seconds of sound decoded a second", codes.shape[1] / rate / decoding),
        Figure(
            "memory, GB", memory(model.device), "about 9 in bf16" if subject.is_release_sized else NO_RANGE
        ),
    )
    if factor is None:
        return CheckResult(
            Verdict.WARN, "The voice ended without a sound, so there is nothing to time.", figures
        )
    if factor > 1 and on_gpu:
        return CheckResult(Verdict.WARN, "Slower than real time on a GPU; is it shared?", figures)
    sentence = f"It takes {factor:.1f} s for a second of speech."
    if factor < 1:
        sentence = f"It speaks {1 / factor:.1f} times as fast as real time."
    return CheckResult(Verdict.PASS, sentence, figures)


def reset_memory(device: torch.device) -> None:
    """Have `memory` count from here, where the device can; a process always counts from its beginning."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> float | None:
    """The most memory used in GB, of the GPU since `reset_memory` or of the process since its beginning; None
    where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
