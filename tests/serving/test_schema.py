"""Whatever fits the OpenAPI document, and much that does not, gets an answer that the document knows."""

from __future__ import annotations

import httpx
import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
SPEAKS = {"input": "ten", "voice": "neutral_male", "max_new_tokens": 1}


def test_every_operation_answers_as_the_document_says(serve):
    with serve(max_text_characters=200) as (url, _app):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        seen = {}
        for found in schema.get_all_operations():
            operation = found.ok()
            statuses = seen.setdefault(f"{operation.method.upper()} {operation.path}", set())
            _check(operation, statuses)
        speech = {path: statuses for path, statuses in seen.items() if "/speech" in path}
        assert len(seen) > 8
        assert len(speech) == 4
        assert all(200 in statuses for statuses in speech.values()), "some of it should be spoken"
        assert httpx.post(f"{url}/v1/audio/speech", json=SPEAKS, timeout=30).status_code == 200


def _check(operation, statuses):
    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    def check(case):
        speaks = "/speech" in operation.path and isinstance(case.body, dict)
        # Half of what fits the types is made to name a voice and to be short, so that it is spoken.
        if speaks and len(statuses) % 2 == 0:
            case.body.update({"voice": SPEAKS["voice"], "max_new_tokens": 1, "response_format": "pcm"})
            for name in ("speaker", "ref_audio", "ref_text", "consent", "model", "task_type", "sample_rate"):
                case.body.pop(name, None)
            case.body.pop("initial_codec_chunk_frames", None)
            if "items" in case.body:
                case.body["items"] = [{"input": "ten"}, *case.body["items"][:2]]
            else:
                case.body["input"] = "ten"
        response = case.call(timeout=60)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    check()
