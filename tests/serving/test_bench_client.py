"""The endpoints' adapter for revox, against a running server."""

from __future__ import annotations

import pytest

from revox.bench.plan import BenchPlan, BenchResult
from revox.bench.run import BenchRun
from revox.deploy.server import reference_clip
from revox.endpoints import ReferenceClip, SpeechQuery, open_endpoints

TEXTS = ("Good evening, doctor.", "The train leaves at ten past seven.")


def test_a_running_server_is_measured(serve, tmp_path):
    with serve() as (url, _):
        (endpoint,) = open_endpoints([url])
        assert endpoint.kind == "revox"
        assert endpoint.facts()["model"] == "tiny"
        assert len(endpoint.voices()) == 20
        result = BenchResult({}, {})
        BenchRun(BenchPlan(TEXTS, ("neutral_male",), None, 2, (1, 3)), result, tmp_path).measure([endpoint])
        endpoint.close()
    assert {one.status for one in result.requests} == {200}
    assert not any(one.failed for one in result.requests)
    streamed = [one for one in result.requests if one.mode == "stream"]
    assert len(streamed) == 2 + 3
    assert all(0 < one.first_audio <= one.seconds for one in streamed)
    assert {one.response_format for one in result.requests if one.mode == "formats"} == set(endpoint.formats)
    # The same query says the same, streamed or not: what was asked is what was meant.
    whole = [one for one in result.requests if one.mode == "whole"]
    assert [one.speech for one in whole] == pytest.approx([one.speech for one in streamed[:2]], abs=1e-3)


def test_a_refusal_and_a_reference_are_sent_as_the_server_expects(serve):
    with serve() as (url, _):
        (endpoint,) = open_endpoints([url])
        unknown = endpoint.speak(SpeechQuery("Hello.", "nobody"))
        # The tiny checkpoint has no encoder: the refusal must be of that, not of a wrong field.
        clip = ReferenceClip(reference_clip(), consent="A synthetic clip: nobody's voice.")
        cloned = endpoint.speak(SpeechQuery("Hello.", reference=clip))
        endpoint.close()
    assert (unknown.status, cloned.status) == (404, 400)
    assert "nobody" in unknown.message
    assert "encoder" in cloned.message
