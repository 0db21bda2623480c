"""What is asked, in which order and how much at a time; what is kept when it ends early."""

from __future__ import annotations

import json
import threading

import pytest

from revox.bench.errors import BenchError
from revox.bench.plan import BenchPlan, BenchResult
from revox.bench.run import REQUESTS_FILE, BenchRun
from revox.endpoints import ReferenceClip, SpeechAnswer


def run(endpoint, plan, out, **changes):
    result = BenchResult({}, {})
    BenchRun(plan, result, out, **changes).measure([endpoint])
    return result


def test_every_level_is_asked_and_the_warm_up_is_apart(made, tmp_path):
    endpoint = made()
    result = run(endpoint, BenchPlan(requests=3, streams=(1, 5), warmup=2), tmp_path)
    modes = [(one.mode, one.streams) for one in result.requests]
    expected = {("warm-up", 1): 2, ("whole", 1): 3, ("stream", 1): 3, ("stream", 5): 5, ("formats", 1): 2}
    assert {key: modes.count(key) for key in modes} == expected
    assert [one.response_format for one in result.requests[-2:]] == ["wav", "flac"]
    assert set(result.walls) == set(("made", *key) for key in expected)
    assert all(not one.failed and not one.problems for one in result.requests)
    lines = (tmp_path / REQUESTS_FILE).read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [one.number for one in result.requests]


def test_the_same_requests_come_each_time(made, tmp_path):
    asked = []
    for name in ("a", "b"):
        endpoint = made(streams=False)
        run(endpoint, BenchPlan(texts=("One.", "Two.", "Three."), requests=4, streams=(1,)), tmp_path / name)
        asked.append(endpoint.asked)
    assert asked[0] == asked[1]
    whole = asked[0][1:5]
    assert [(q.text, q.voice, q.seed) for q in whole] == [
        ("One.", "ada", 0),
        ("Two.", "bea", 1),
        ("Three.", "ada", 2),
        ("One.", "bea", 3),
    ]


def test_as_many_requests_are_under_way_as_there_are_streams(made, tmp_path):
    together = threading.Barrier(4)
    endpoint = made(streams=False)

    def tell(query):
        if len(endpoint.asked) > 2:  # after the warm-up and the level of one
            together.wait(20)
        return endpoint.answer(query)

    endpoint.tell = tell
    run(endpoint, BenchPlan(requests=1, streams=(1, 4), formats=False), tmp_path)
    assert endpoint.most == 4


def test_a_refused_request_is_a_result(made, tmp_path):
    endpoint = made(streams=False, tell=lambda query: SpeechAnswer(503, message="starting", seconds=0.01))
    result = run(endpoint, BenchPlan(requests=2, streams=(1,), warmup=0, formats=False), tmp_path)
    assert [(one.status, one.failed, one.problems) for one in result.requests] == [
        (503, True, ("status 503: starting",))
    ] * 2
    assert not (tmp_path / "faulty").exists()


def test_a_faulty_file_is_saved(made, tmp_path):
    endpoint = made(name="a/b:1", streams=False, tell=lambda query: SpeechAnswer(200, "wav", 24_000, b"x"))
    run(endpoint, BenchPlan(requests=1, streams=(1,), warmup=0, formats=False), tmp_path)
    assert [path.name for path in (tmp_path / "faulty").iterdir()] == ["a_b_1-whole-1-0.wav"]


def test_a_player_that_would_wait_ran_dry(made, tmp_path):
    endpoint = made()

    def tell(query):
        answer = endpoint.answer(query)
        if query.stream and query.seed == 1:
            answer.arrivals = [(0.1, 0.5), (0.7, 2.0)]  # played to 0.6 s
        return answer

    endpoint.tell = tell
    result = run(endpoint, BenchPlan(requests=2, streams=(1,), warmup=0, formats=False), tmp_path)
    assert [one.ran_dry for one in result.requests if one.mode == "stream"] == [False, True]


def test_a_stop_keeps_what_was_measured(made, tmp_path):
    endpoint = made()

    def should_stop():
        return "enough" if len(endpoint.asked) > 4 else None

    result = run(endpoint, BenchPlan(requests=3, streams=(1, 2)), tmp_path, should_stop=should_stop)
    assert result.stopped == "enough"
    assert 1 <= len(result.requests) < 12
    assert {one.mode for one in result.requests} <= {"warm-up", "whole", "stream"}


def test_ctrl_c_keeps_what_was_measured(made, tmp_path):
    result = BenchResult({}, {})
    seen = []

    def interrupt(at):
        seen.append(at)
        if at.what == "made, whole" and at.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BenchRun(BenchPlan(requests=3), result, tmp_path, progress=interrupt).measure([made()])
    assert [one.mode for one in result.requests] == ["warm-up", "whole", "whole"]
    assert len((tmp_path / REQUESTS_FILE).read_text().splitlines()) == 3


def test_another_run_is_not_overwritten(made, tmp_path):
    run(made(), BenchPlan(requests=1, streams=(1,), formats=False), tmp_path)
    with pytest.raises(BenchError, match="another run"):
        run(made(), BenchPlan(), tmp_path)


def test_an_unknown_voice_is_a_sentence_before_anything_is_asked(made, tmp_path):
    endpoint = made()
    with pytest.raises(BenchError, match="no voice 'eve'"):
        run(endpoint, BenchPlan(voices=("Ada", "eve")), tmp_path)
    assert endpoint.asked == []


def test_endpoints_that_do_not_clone_are_left_out_where_a_clip_is_cloned(made, tmp_path):
    plan = BenchPlan(reference=ReferenceClip(b"clip"), requests=1, streams=(1,), formats=False)
    result = run(made(), plan, tmp_path / "a")
    assert result.requests == []
    assert "left out" in result.endpoints["made"]
    endpoint = made()
    endpoint.clones = True
    run(endpoint, plan, tmp_path / "b")
    assert {(query.voice, query.reference.content) for query in endpoint.asked} == {(None, b"clip")}
