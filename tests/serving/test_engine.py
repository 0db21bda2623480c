from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from revox.serving.admission import AdmissionControl
from revox.serving.engine import EngineThread
from revox.serving.errors import ApiError
from revox.serving.metrics import Metrics
from revox.synthesis.engine import Engine, Request
from revox.synthesis.prompt import make_prompt

REQUESTS = [("Hello.", "neutral_male", 3), ("Good evening, doctor.", "hi_female", 0), ("ten", "pt_male", 8)]
FRAMES = 14


@pytest.fixture(scope="module")
def prompts(tts):
    return [
        make_prompt(tts.model, tts.prompter, text, tts.voice(name)).embeddings for text, name, _ in REQUESTS
    ]


@pytest.fixture(scope="module")
def alone(tts, prompts):
    return [
        Engine(tts.model).speak(Request(prompt, seed, FRAMES)).audio.samples
        for prompt, (*_, seed) in zip(prompts, REQUESTS, strict=True)
    ]


@pytest.fixture
def run(tts, settings):
    """`run(dialogue, **settings)`: `async def dialogue(engine)` with a running engine."""

    def running(dialogue, clock=time.monotonic, **changes):
        engine = EngineThread(tts.model, settings(**changes), Metrics(), clock)

        async def everything():
            engine.start()
            try:
                return await asyncio.wait_for(dialogue(engine), 60)
            finally:
                await asyncio.to_thread(engine.close)

        return asyncio.run(everything())

    return running


async def _heard(stream):
    return np.concatenate([chunk.samples async for chunk in stream])


def _value(engine, name, **labels):
    return engine.metrics.registry.get_sample_value(name, labels) or 0


def test_together_and_one_after_the_other_each_gives_what_it_gives_alone(run, prompts, alone):
    async def dialogue(engine):
        streams = [
            engine.submit(Request(prompt, seed, FRAMES), streaming=i != 1)
            for i, (prompt, (*_, seed)) in enumerate(zip(prompts, REQUESTS, strict=True))
        ]
        return await asyncio.gather(*map(_heard, streams))

    for slots in (3, 2):
        for heard, expected in zip(run(dialogue, max_streams=slots), alone, strict=True):
            np.testing.assert_allclose(heard, expected, atol=1e-6)


def test_a_stream_starts_with_five_frames_or_as_many_as_were_asked_for(run, prompts, tts):
    async def dialogue(engine):
        sizes = []
        for first in (None, 2):
            stream = engine.submit(Request(prompts[1], 0, FRAMES), streaming=True, first_frames=first)
            sizes.append([chunk.frames async for chunk in stream])
        return sizes

    usual, asked = run(dialogue, admission_control=False)
    assert usual == [5, 5, 4]
    assert asked == [2, 2, 4, 6]


class _Fixed(AdmissionControl):
    """A machine that speaks two in time, and whose players are always about to run dry."""

    def allows(self, streams, speed):
        return streams <= 2 / speed

    def margin(self, streams):
        return 1e9

    def first_frames(self, streams, speed):
        return 5


def test_chunks_that_can_wait_are_decoded_as_far_as_they_fit_into_a_step(tts, settings):
    engine = EngineThread(tts.model, settings(), Metrics(), lambda: 0.0)
    engine._decoded, engine._decoding_took = 10.0, 0.1  # 10 ms a frame; half a frame's 80 ms are left
    engine._admission.observe(3, 0.02)  # a player needs 80 ms in hand

    def stream(in_hand, frames, live=True, done=False, late=0):
        decoded = 100 if live is not None else 0
        return SimpleNamespace(
            live=live is not False, decoded=decoded, frames=decoded + frames, speed=1.0,
            end=decoded + frames - late, first_at=in_hand - 0.08 * decoded,
            generation=SimpleNamespace(done=done),
        )  # fmt: skip

    soon, later, last = stream(0.05, 10), stream(1.0, 3), stream(2.0, 1)
    silent, file = stream(0.0, 2, live=None), stream(0.0, 50, live=False)
    assert engine._in_turn([last, later, soon]) == [soon], "one who cannot wait takes all there is"
    assert engine._in_turn([last, later]) == [later, last]
    assert engine._in_turn([later, silent, soon]) == [silent, soon], "who has no sound yet is first"
    assert engine._in_turn([file, later]) == [later]
    assert engine._in_turn([file]) == [file], "nobody waits for nothing"
    late = stream(0.0, 125, live=False, late=25)
    assert engine._in_turn([late, soon]) == [soon, late], "a file does not pile up behind players"
    ended = stream(3.0, 9, done=True)
    assert engine._in_turn([ended, soon]) == [soon, ended], "an end is handed over at once"


@pytest.mark.parametrize(
    ("streaming", "admission_control", "most"),
    [(True, True, 2), (False, True, 3), (True, False, 3)],
    ids=["listened to", "whole files", "told not to"],
)
def test_no_more_are_spoken_at_once_than_are_heard_in_time(
    run, prompts, alone, streaming, admission_control, most
):
    async def dialogue(engine):
        engine._admission = _Fixed(0.08)
        together, step = [], engine._engine.step
        engine._engine.step = lambda: together.append(engine._engine.count_speaking) or step()
        asked = [(prompt, seed) for prompt, (*_, seed) in zip(prompts, REQUESTS, strict=True)]
        streams = [
            engine.submit(Request(prompt, seed, FRAMES), streaming=streaming) for prompt, seed in asked
        ]
        return await asyncio.gather(*map(_heard, streams)), max(together)

    heard, found = run(dialogue, admission_control=admission_control)
    assert found == most
    for one, expected in zip(heard, alone, strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-6)


def test_one_listener_is_enough_for_whole_files_to_wait(run, prompts):
    async def dialogue(engine):
        engine._admission = _Fixed(0.08)
        together, step = [], engine._engine.step
        engine._engine.step = lambda: together.append(engine._engine.count_speaking) or step()
        streams = [engine.submit(Request(prompts[0], 3, FRAMES), streaming=i == 0) for i in range(3)]
        await asyncio.gather(*map(_heard, streams))
        return max(together)

    assert run(dialogue) == 2


@pytest.mark.parametrize(("admission_control", "sizes"), [(True, [5, *[1] * 35]), (False, [5, 5, 10, 20])])
def test_a_stream_is_handed_over_before_its_player_runs_dry(run, prompts, admission_control, sizes):
    async def dialogue(engine):
        engine._admission = _Fixed(0.08)
        whole = await _heard(engine.submit(Request(prompts[1], 0, 40)))
        return whole, [chunk async for chunk in engine.submit(Request(prompts[1], 0, 40), streaming=True)]

    whole, chunks = run(dialogue, admission_control=admission_control)
    assert [chunk.frames for chunk in chunks] == sizes
    np.testing.assert_allclose(np.concatenate([c.samples for c in chunks]), whole, atol=1e-6)


def test_who_listens_at_double_speed_is_spoken_to_alone(run, prompts):
    async def dialogue(engine):
        engine._admission = _Fixed(0.08)
        together, step = [], engine._engine.step
        engine._engine.step = lambda: together.append(engine._engine.count_speaking) or step()
        asked = [engine.submit(Request(prompts[1], 0, 34), streaming=i == 0, speed=2.0 - i) for i in range(2)]
        await asyncio.gather(*map(_heard, asked))
        return together

    assert run(dialogue) == [1] * 68


class _Clock:
    """Stands still but for what a test adds."""

    now = 0.0

    def __call__(self):
        return self.now


def _watched(engine, clock, seconds):
    """Who took part, step by step; every step takes so many seconds."""
    took_part, step = [], engine._engine.step

    def watched():
        clock.now += seconds
        took_part.append(step())
        return took_part[-1]

    engine._engine.step = watched
    return took_part


@pytest.mark.parametrize(
    ("seconds", "waits"), [(0.01, True), (0.07, False)], ids=["has enough in hand", "would run dry"]
)
def test_the_first_sound_of_a_new_stream_comes_before_more_of_one_that_can_wait(
    run, held, until, prompts, alone, seconds, waits
):
    clock = _Clock()

    async def dialogue(engine):
        took_part = _watched(engine, clock, seconds)
        with held(engine, 12) as go:
            plays = engine.submit(Request(prompts[1], 0, 40), streaming=True)
            await asyncio.to_thread(until, lambda: len(took_part) == 12, "12 frames")
            one = engine._active[0].generation
            new = engine.submit(Request(prompts[0], 3, FRAMES), streaming=True)
            go.set()
            chunks = [chunk async for chunk in new]
            samples = (await _heard(plays)).size
        # The step that was held may still be the first stream's alone.
        start = next(i for i, step in enumerate(took_part) if i > 11 and step != [one])
        return [one in step for step in took_part[start : start + chunks[0].frames]], samples, chunks

    plays_on, samples, chunks = run(dialogue, clock)
    assert any(plays_on) != waits
    assert samples == 40 * 1920
    np.testing.assert_allclose(np.concatenate([chunk.samples for chunk in chunks]), alone[0], atol=1e-6)


def test_whole_files_wait_for_first_sounds_but_not_for_ever(run, held, until, prompts):
    clock = _Clock()

    async def dialogue(engine):
        took_part = _watched(engine, clock, 0.3)
        with held(engine, 2) as go:
            file = engine.submit(Request(prompts[1], 0, FRAMES))
            await asyncio.to_thread(until, lambda: len(took_part) == 2, "2 frames")
            one = engine._active[0].generation
            stream = engine.submit(Request(prompts[0], 3, FRAMES), streaming=True, first_frames=9)
            go.set()
            await asyncio.gather(*map(_heard, (file, stream)))
        start = next(i for i, step in enumerate(took_part) if one not in step)
        return [one in step for step in took_part[start : start + 9]]

    assert run(dialogue, clock) == [False, False, False, True, False, False, False, True, False]


def test_no_more_are_spoken_at_once_than_memory_holds_at_their_longest(run, prompts, alone):
    async def dialogue(engine):
        together, step = [], engine._engine.step
        engine._engine.step = lambda: together.append(engine._engine.count_speaking) or step()
        # Room for two requests of one block each.
        engine._cache_bytes = 2 * 256 * engine._engine.cache.position_bytes
        asked = [(prompt, seed) for prompt, (*_, seed) in zip(prompts, REQUESTS, strict=True)]
        streams = [engine.submit(Request(prompt, seed, FRAMES)) for prompt, seed in asked]
        return await asyncio.gather(*map(_heard, streams)), max(together)

    heard, most = run(dialogue)
    assert most == 2
    for one, expected in zip(heard, alone, strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-6)


def test_what_a_step_takes_is_observed(run, prompts):
    async def dialogue(engine):
        await _heard(engine.submit(Request(prompts[1], 0, FRAMES), streaming=True))
        return engine._admission.expected(1)

    assert 0 < run(dialogue) < 60


def test_a_reader_who_takes_nothing_holds_up_nobody_and_loses_nothing(run, prompts, alone):
    async def dialogue(engine):
        slow = engine.submit(Request(prompts[1], 0, FRAMES), streaming=True)
        quick = await _heard(engine.submit(Request(prompts[0], 3, FRAMES), streaming=True))
        await _heard(engine.submit(Request(prompts[0], 3, FRAMES), streaming=True))
        ahead = slow.frames
        return ahead, quick, await _heard(slow), slow.truncated

    ahead, quick, slow, truncated = run(dialogue, lead_frames=4)
    assert 4 < ahead < FRAMES, "it should rest before its end, one chunk after its lead"
    np.testing.assert_allclose(quick, alone[0], atol=1e-6)
    np.testing.assert_allclose(slow, alone[1], atol=1e-6)
    assert truncated


def test_a_reader_who_never_takes_anything_is_given_up(run, prompts, monkeypatch):
    monkeypatch.setattr("revox.serving.engine.STALL_SECONDS", 0.1)

    async def dialogue(engine):
        stream = engine.submit(Request(prompts[1], 0, FRAMES), streaming=True)
        while not (stream.frames and not engine.active):
            await asyncio.sleep(0.01)
        await anext(stream)
        with pytest.raises(ApiError) as told:
            await _heard(stream)
        return told.value.status

    assert run(dialogue, lead_frames=2) == 408


def test_who_cancels_gives_the_place_to_the_next(run, held, prompts, alone):
    async def dialogue(engine):
        with held(engine, 20):
            first = engine.submit(Request(prompts[1], 0), streaming=True)
            waits = engine.submit(Request(prompts[1], 0), streaming=True)
            second = engine.submit(Request(prompts[0], 3, FRAMES))
            await anext(first)
            waits.cancel()
            first.cancel()
        heard = await _heard(second)
        return (
            first.frames,
            heard,
            engine.active,
            _value(engine, "revox_utterances_total", outcome="cancelled"),
        )

    frames, heard, active, cancelled = run(dialogue, max_streams=1)
    assert frames < 60
    np.testing.assert_allclose(heard, alone[0], atol=1e-6)
    assert active == 0
    assert cancelled == 2


def test_who_hangs_up_while_waiting_leaves_the_queue_to_others_at_once(run, held, prompts):
    async def dialogue(engine):
        with held(engine, 8), held(engine, 5) as go:
            speaks = engine.submit(Request(prompts[1], 0), streaming=True)
            await anext(speaks)
            waits = engine.submit(Request(prompts[0], 3, FRAMES))
            with pytest.raises(ApiError), engine.place():
                pass
            waits.cancel()
            go.set()
            while _value(engine, "revox_queue_length"):
                await asyncio.sleep(0.005)
            assert engine.active == 1, "its place is taken as before"
            with engine.place():
                pass
            assert _value(engine, "revox_utterances_total", outcome="cancelled") == 1
            speaks.cancel()

    run(dialogue, max_streams=1, max_queue=1)


def test_a_full_queue_is_a_429_that_says_when_to_ask_again(run, prompts):
    async def dialogue(engine):
        with engine.place():
            streams = [engine.submit(Request(prompts[0], 3, FRAMES)) for _ in range(2)]
            with pytest.raises(ApiError) as told, engine.place():
                pass
            streams.append(engine.submit(Request(prompts[0], 3, FRAMES)))
        for stream in streams:
            assert (await _heard(stream)).size
        with engine.place():
            pass
        return told.value

    error = run(dialogue, max_streams=1, max_queue=2)
    assert (error.status, error.code) == (429, "queue_full")
    assert int(error.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("where", ["join", "step", "decode"])
def test_a_request_that_fails_is_alone_with_it(run, prompts, alone, tts, monkeypatch, where, caplog):
    bad = prompts[2].clone()
    bad[-1] += 1000.0

    async def dialogue(engine):
        frames = engine._engine
        victims = []
        real = {"join": frames.join, "step": frames.step, "decode": frames.decode}

        def join(requests):
            [request] = requests
            if request.prompt is bad and where == "join":
                raise RuntimeError("no room for this one")
            [one] = real["join"](requests)
            victims.extend([one] if request.prompt is bad else [])
            return [one]

        def step(only=None):
            taking_part = frames.speaking if only is None else [only]
            if any(one in victims and len(one.frames) == 2 for one in taking_part):
                raise RuntimeError("a broken frame")
            return real["step"](only)

        def decoded(several):
            if any(one in victims for one in several):
                raise RuntimeError("a broken codec")
            return real["decode"](several)

        monkeypatch.setattr(frames, "join", join)
        if where == "step":
            monkeypatch.setattr(frames, "step", step)
        if where == "decode":
            monkeypatch.setattr(frames, "decode", decoded)
        streams = [
            engine.submit(Request(p, s, FRAMES)) for p, s in ((prompts[0], 3), (bad, 1), (prompts[1], 0))
        ]
        return await asyncio.gather(*map(_heard, streams), return_exceptions=True)

    first, failed, last = run(dialogue)
    assert isinstance(failed, ApiError)
    assert failed.status == 500
    assert "broken" not in failed.message, "the inside is for the log"
    assert "RuntimeError" in caplog.text
    np.testing.assert_allclose(first, alone[0], atol=1e-6)
    np.testing.assert_allclose(last, alone[1], atol=1e-6)


def test_sound_that_is_no_number_fails_its_own_request_only(run, prompts, alone, monkeypatch):
    real, calls = Engine.decode, []

    def decode(engine, several):
        samples = real(engine, several)
        calls.extend(samples)
        return [one * torch.nan for one in samples] if len(calls) == 1 else samples

    monkeypatch.setattr(Engine, "decode", decode)

    async def dialogue(engine):
        with pytest.raises(ApiError, match="finite"):
            await _heard(engine.submit(Request(prompts[0], 3, FRAMES)))
        return await _heard(engine.submit(Request(prompts[0], 3, FRAMES)))

    np.testing.assert_allclose(run(dialogue), alone[0], atol=1e-6)


def test_a_defect_of_the_engine_itself_does_not_end_it(run, prompts, alone, monkeypatch):
    async def dialogue(engine):
        real, fails = engine._sweep, iter([True])

        def sweep():
            if engine._active and next(fails, False):
                raise KeyError("a defect")
            real()

        monkeypatch.setattr(engine, "_sweep", sweep)
        with pytest.raises(ApiError) as told:
            await _heard(engine.submit(Request(prompts[0], 3, FRAMES)))
        return told.value.status, await _heard(engine.submit(Request(prompts[0], 3, FRAMES)))

    status, heard = run(dialogue)
    assert status == 500
    np.testing.assert_allclose(heard, alone[0], atol=1e-6)


def test_when_even_giving_up_fails_everybody_is_told_and_the_next_is_spoken(run, prompts, alone, monkeypatch):
    async def dialogue(engine):
        frames = engine._engine

        def broken(*_):
            raise RuntimeError("no memory")

        for name in ("step", "leave"):
            monkeypatch.setattr(frames, name, broken)
        with pytest.raises(ApiError) as told:
            await _heard(engine.submit(Request(prompts[0], 3, FRAMES)))
        assert told.value.status == 500
        return await _heard(engine.submit(Request(prompts[0], 3, FRAMES)))

    np.testing.assert_allclose(run(dialogue), alone[0], atol=1e-6)


def test_nobody_waits_for_a_thread_that_has_ended(run, prompts):
    async def dialogue(engine):
        await asyncio.to_thread(engine.close)
        with pytest.raises(ApiError) as told:
            engine.submit(Request(prompts[0], 3, FRAMES))
        return told.value.status

    assert run(dialogue) == 503


def test_whoever_still_speaks_or_waits_at_the_end_is_told(run, prompts):
    async def dialogue(engine):
        streams = [engine.submit(Request(prompts[1], 0), streaming=True) for _ in range(2)]
        await anext(streams[0])
        await asyncio.to_thread(engine.close)
        with pytest.raises(ApiError) as late:
            engine.submit(Request(prompts[1], 0))
        heard = await asyncio.gather(*map(_heard, streams), return_exceptions=True)
        return [error.status for error in heard] + [late.value.status]

    assert run(dialogue, max_streams=1) == [503, 503, 503]


def test_what_was_done_is_counted(run, prompts):
    async def dialogue(engine):
        await _heard(engine.submit(Request(prompts[1], 0, FRAMES)))
        return (
            _value(engine, "revox_utterances_total", outcome="cut"),
            _value(engine, "revox_speech_seconds_total"),
            _value(engine, "revox_first_audio_seconds_count"),
            _value(engine, "revox_real_time_factor_count"),
            _value(engine, "revox_active_streams"),
        )

    assert run(dialogue) == (1, pytest.approx(FRAMES / 12.5), 1, 1, 0)
