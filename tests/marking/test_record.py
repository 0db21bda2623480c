from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone

import pytest

from revox.marking import MarkError, new_record, stream_headers


def test_a_record_has_the_time_in_utc_to_the_second():
    local = datetime(2026, 11, 21, 14, 0, 1, 5, tzinfo=timezone(timedelta(hours=2)))
    assert new_record("lab", "ada", now=local).plain()["created_at"] == "2026-11-21T12:00:01Z"


@pytest.mark.parametrize(("model", "voice"), [("", "ada"), ("lab", ""), ("lab", " \n"), ("lab", "x" * 201)])
def test_names_that_cannot_be_are_a_sentence(model, voice):
    with pytest.raises(MarkError, match="1 to 200 characters"):
        new_record(model, voice)


def test_headers_say_it_in_structured_fields_and_as_json():
    when = datetime(2026, 11, 21, 12, 0, 1, tzinfo=timezone.utc)
    headers = stream_headers(new_record("lab", "ada", now=when))
    assert headers["X-Revox-Synthetic"] == "?1"
    record = json.loads(headers["X-Revox-Mark"])
    assert (record["synthetic"], record["model"], record["voice"]) == (True, "lab", "ada")
    # RFC 9651 3.2: members of a dictionary are separated by commas; 3.3.7: a date is @ and seconds.
    assert re.fullmatch(
        r'mode=machine-generated, model="lab", provider="revox [^"]+", date=@1795262401',
        headers["AI-Disclosure"],
    )


@pytest.mark.parametrize(
    "name", ["a\r\nSet-Cookie: x=1", 'q"uo\\te', "naïve 声", "tab\there", "nul\0", "\x1b[31m"]
)
def test_no_name_breaks_out_of_a_header(name):
    for value in stream_headers(new_record(name, name)).values():
        assert re.fullmatch(r"[ -~]+", value), value
    disclosure = stream_headers(new_record(name, name))["AI-Disclosure"]
    # RFC 9651 3.3.3: outside of its escapes a string has no quote.
    assert re.fullmatch(r'mode=[a-z-]+, model="(?:[^"\\]|\\["\\])*", provider="[^"]*", date=@\d+', disclosure)
