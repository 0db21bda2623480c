"""300 takes of made-up speech, with and without faults; what a take is judged by is known exactly."""

from __future__ import annotations

import numpy as np
import pytest

from revox.model.config import CodecConfig
from revox.synthesis.split import expected_seconds
from revox.synthesis.takes import TakeCheck, TakeFault

CODEC = CodecConfig()
FRAME, RATE = CODEC.samples_per_frame, CODEC.frame_rate
WORDS = "the rain had stopped and nobody was in the hall when he came back from a long walk by the sea"


def _text(chance):
    return " ".join(chance.permutation(WORDS.split())[: chance.integers(6, 20)]) + "."


def _speech(chance, seconds):
    """Codes and samples of that length: syllables at their own levels, pauses, one code for silence."""
    frames = max(1, round(seconds * RATE))
    levels = 0.1 * np.exp(0.8 * chance.standard_normal(frames))
    codes = chance.integers(0, 8192, frames)
    held = np.flatnonzero(chance.random(frames) < 0.15)[1:]
    codes[held] = codes[held - 1]  # long vowels
    for start in chance.integers(2, max(3, frames), frames // 40):
        pause = slice(start, start + chance.integers(2, 10))
        levels[pause], codes[pause] = 1e-4, 17
    return codes, levels


def _judge(text, codes, levels, ended=True, chunk=25):
    check = TakeCheck(text, CODEC)
    wave = np.repeat(levels, FRAME).astype(np.float32)
    for start in range(0, len(codes), chunk):
        stop = start + chunk
        check.push(codes[start:stop], wave[start * FRAME : stop * FRAME])
    check.finish(ended)
    return check.fault


def _rate(chance):
    return float(np.exp(0.25 * chance.standard_normal()))  # two in three speakers within 28 % of the usual


def _ended_early(chance, codes, levels):
    stop = int(chance.integers(0, max(1, len(codes) // 4)))
    return codes[:stop], levels[:stop]


def _looping(chance, codes, levels):
    period, start = int(chance.integers(2, 30)), int(chance.integers(0, len(codes) // 2))
    source = np.arange(len(codes) + 3 * period + 30)
    loop = source[start + period : start + 3 * period + 30]
    source[start + period : start + 3 * period + 30] = start + (loop - start) % period
    source = np.where(source < len(codes), source, len(codes) - 1 - source % len(codes))
    looped = codes[source].copy()
    other = chance.random(len(looped)) < 0.1
    looped[other] = chance.integers(0, 8192, other.sum())
    return looped, np.maximum(levels[source], 0.02)


def _silent(chance, codes, levels):
    start, frames = int(chance.integers(0, len(codes))), int(chance.integers(20, 60))
    quiet = 1e-4 * np.exp(0.3 * chance.standard_normal(frames))
    return np.insert(codes, start, np.full(frames, 17)), np.insert(levels, start, quiet)


FAULTS = [
    (_ended_early, TakeFault.ENDED_EARLY),
    (_looping, TakeFault.LOOP),
    (_silent, TakeFault.SILENCE),
]


@pytest.mark.parametrize(("injure", "fault"), FAULTS)
def test_of_300_injected_faults_95_in_100_are_found(injure, fault):
    chance, found, named = np.random.default_rng(3), 0, 0
    for _ in range(300):
        text = _text(chance)
        codes, levels = injure(chance, *_speech(chance, _rate(chance) * expected_seconds(text)))
        judged = _judge(text, codes, levels)
        found += judged is not None
        named += judged == fault
    assert found >= 285
    assert named >= 270


def test_of_300_good_takes_no_more_than_2_in_100_are_rejected():
    chance, rejected = np.random.default_rng(4), []
    for _ in range(300):
        text = _text(chance)
        rejected.append(_judge(text, *_speech(chance, _rate(chance) * expected_seconds(text))))
    assert sum(fault is not None for fault in rejected) <= 6


def test_what_was_stopped_by_its_limit_never_ended():
    chance = np.random.default_rng(5)
    check = TakeCheck("ten to five", CODEC)
    codes, levels = _speech(chance, check.max_frames / RATE)
    assert _judge("ten to five", codes, levels, ended=False) == TakeFault.NEVER_ENDED


def test_a_take_without_frames_ended_early():
    check = TakeCheck("ten to five", CODEC)
    check.finish(ended=True)
    assert check.fault == TakeFault.ENDED_EARLY
    assert check.message == "ended after 0.0 s; its text takes about 0.7 s"


def test_a_take_without_sound_is_silent():
    assert _judge("ten to five", np.full(9, 17), np.full(9, 1e-4)) == TakeFault.SILENCE
