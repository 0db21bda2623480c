"""Batches are the same however many decode them, go on where they were, and survive bad clips."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import clip, put, source, tone

from revox.speech import Audio, encode_audio, loudness, read_audio
from revox.training.data import ClipBatches, ClipSampler, DataError, SpeechSource
from revox.training.data.loading import decode_cut
from revox.workers import WorkerError

RATE = 24000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine clips of 0.4 to 2 s at several rates and formats, each a tone of its own; one is no audio."""
    root = tmp_path_factory.mktemp("speech")
    formats = [("wav", 24000), ("flac", 16000), ("mp3", 44100), ("opus", 48000)]
    for i in range(9):
        ending, rate = formats[i % 4]
        put(root / f"{i}.{ending}", 300 + 100 * i, 0.4 + 0.2 * i, rate)
    (root / "bad.wav").write_text("no audio at all")
    return root


def tones(folder: Path, lengths_known: bool = True) -> SpeechSource:
    clips = []
    for i, path in enumerate(sorted(folder.glob("[0-9]*"))):
        known = 0.4 + 0.2 * i if lengths_known else 0.0
        clips.append(clip(path, f"s{i % 3}", "en", f"words {i}", known))
    return source("tones", [*clips, clip(folder / "bad.wav", "s1", "en", "x", 1.0, 24000)])


def sampler_of(*sources: SpeechSource, batch: int = 3) -> ClipSampler:
    return ClipSampler(sources, seconds=1.0, batch=batch, seed=4)


def batches(folder, workers, state=None, **options) -> ClipBatches:
    return ClipBatches(sampler_of(tones(folder)), RATE, workers=workers, state=state, **options)


def take(loader, count: int) -> list:
    return [next(loader) for _ in range(count)]


def same(a, b) -> bool:
    return (a.ids, a.speakers, a.transcripts) == (b.ids, b.speakers, b.transcripts) and bool(
        torch.equal(a.waveforms, b.waveforms) and torch.equal(a.lengths, b.lengths)
    )


@pytest.fixture(scope="module")
def one_process(folder) -> list:
    """Twelve batches decoded in this process, with the state after each."""
    with batches(folder, 0) as loader:
        return [(next(loader), loader.state()) for _ in range(12)]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches_and_states(folder, one_process, workers):
    with batches(folder, workers) as loader:
        for expected, state in one_process:
            assert same(next(loader), expected)
            assert loader.state() == state


def test_a_resumed_run_gets_the_very_same_batches(folder, one_process):
    state = json.loads(json.dumps(one_process[3][1]))
    with batches(folder, 0, state) as loader:
        for expected, after in one_process[4:]:
            assert same(next(loader), expected)
            assert loader.state() == after


def test_batches_go_back_to_a_state_and_read_the_one_that_version_0_1_saved(folder, one_process):
    with batches(folder, 0) as loader:
        next(loader)
        for state in (one_process[3][1], {"from": one_process[3][1]}):
            loader.load_state(state)
            assert next(loader).ids == one_process[4][0].ids
            assert loader.state() == one_process[4][1]


def test_a_clip_that_cannot_be_decoded_gives_way_to_the_next_draw_and_is_counted(folder, one_process):
    sampler = sampler_of(tones(folder))
    ids = [next(sampler).id for _ in range(60)]
    good = [one for one in ids if not one.endswith("bad.wav")]
    assert [one for batch, _ in one_process for one in batch.ids] == good[:36]
    used = ids[: one_process[-1][1]["place"]]
    assert one_process[-1][1]["failed"] == sum(one.endswith("bad.wav") for one in used) > 0
    with batches(folder, 0) as loader:
        while not loader.failed:
            next(loader)
        assert "bad.wav: bad.wav is not an audio or video file" in loader.failures[0]


def test_every_waveform_is_its_clip_cut_padded_and_levelled(folder, one_process):
    seen = set()
    for one, _ in one_process:
        assert one.waveforms.dtype == torch.float32
        assert one.waveforms.shape == (3, RATE)
        for key, samples, length, words in zip(
            one.ids, one.waveforms, one.lengths, one.transcripts, strict=True
        ):
            i = int(Path(key).stem)
            seconds = 0.4 + 0.2 * i
            # An MP3 says how long it is to a frame, with the encoder's padding.
            assert int(length) == pytest.approx(
                min(seconds, 1.0) * RATE, abs=1500 if key.endswith("3") else 2
            )
            assert not samples[int(length) :].any()
            heard = samples[: int(length)].numpy()
            hertz = np.abs(np.fft.rfft(heard * np.hanning(len(heard)))).argmax() * RATE / len(heard)
            assert hertz == pytest.approx(300 + 100 * i, abs=3)
            assert loudness(heard, RATE) == pytest.approx(-23, abs=0.1)
            if seconds < 0.95:
                assert words == f"words {i}"
            elif seconds > 1.1:
                assert words is None
            seen.add(i)
    assert seen == set(range(9))


def ramp(seconds: float) -> np.ndarray:
    """Sound that tells the time: the k-th of its 0.1 s stretches is a tone of 200 + 20 k Hz."""
    count = round(seconds / 0.1)
    return np.concatenate([tone(200 + 20 * k, 0.1) for k in range(count)])


@pytest.mark.parametrize("format", ["wav", "flac", "opus", "mp3"])
@pytest.mark.parametrize("known", [True, False])
def test_the_place_in_a_clip_is_where_the_draw_says(format, known):
    data = encode_audio(Audio(ramp(6.0), RATE), format)[0]
    for place in (0.0, 0.5, 0.98):
        samples, whole, start = decode_cut(data, place, 6.0 if known else None, 1.0, RATE)
        assert not whole
        assert start == pytest.approx(place * 5.0, abs=0.08)
        assert len(samples) == RATE
        middle = samples[RATE // 2 - 1000 : RATE // 2 + 1000] * np.hanning(2000)
        hertz = np.abs(np.fft.rfft(middle, 1 << 16)).argmax() * RATE / (1 << 16)
        begin = place * 5.0 + 0.5
        assert (hertz - 200) / 20 * 0.1 == pytest.approx(begin - 0.05, abs=0.08)


def test_a_header_that_promises_too_much_costs_a_reading_not_the_clip():
    data = encode_audio(Audio(ramp(2.0), RATE), "flac")[0]
    samples, whole, _ = decode_cut(data, 0.9, 50.0, 1.0, RATE)
    assert len(samples) == RATE
    assert not whole
    nearly, *_ = decode_cut(data, 0.03, 50.0, 1.0, RATE)  # where the header's place leaves half a second
    assert len(nearly) == RATE
    short, whole, _ = decode_cut(data, 0.9, 50.0, 10.0, RATE)
    assert len(short) == 2 * RATE
    assert whole


def test_a_clip_a_hair_longer_than_asked_is_cut_and_loses_its_words():
    data = encode_audio(Audio(ramp(2.0), RATE), "wav")[0]
    assert decode_cut(data, 0.5, 2.0, 2.0, RATE).whole
    assert not decode_cut(data, 0.5, 2.0, 1.99, RATE).whole


def test_a_worker_that_dies_is_a_sentence(folder):
    with batches(folder, 1) as loader:
        next(loader)
        [process] = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="a worker process died, often for lack of memory"):
            take(loader, 12)


def test_workers_end_with_the_batches_and_never_load_torch(folder):
    with batches(folder, 2) as loader:
        next(loader)
        processes = multiprocessing.active_children()
        assert len(processes) == 2
        maps = [Path(f"/proc/{process.pid}/maps") for process in processes]
        if maps[0].exists():
            assert not any("libtorch" in path.read_text() for path in maps)
    for process in processes:  # is_alive() errs while the pool's own thread notes that it has waited for it
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
    with pytest.raises(DataError, match="are closed"):
        take(loader, 8)


def test_when_nothing_can_be_decoded_it_ends_with_a_sentence(tmp_path):
    clips = [clip(tmp_path / f"{i}.wav") for i in range(3)]
    with (
        ClipBatches(sampler_of(source("gone", clips), batch=2), RATE, workers=0) as loader,
        pytest.raises(DataError, match="could not be decoded; check that the folder is still there"),
    ):
        next(loader)


def test_unknown_lengths_give_the_same_lengths_and_words(folder):
    sampler = sampler_of(tones(folder, lengths_known=False))
    with ClipBatches(sampler, RATE, workers=0) as loader:
        for _ in range(4):
            one = next(loader)
            for key, length, words in zip(one.ids, one.lengths, one.transcripts, strict=True):
                seconds = read_audio(key).seconds
                assert int(length) == pytest.approx(min(seconds, 1.0) * RATE, abs=2)
                assert (words is not None) == (seconds <= 1.0001)
