from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from revox.marking import MarkError, log_mark

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing, FIPS 180-4


def sha256_of(data):
    return hashlib.sha256(data).hexdigest()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_time_voice_and_hash_and_the_text_only_where_asked(state, record):
    log_mark(record, format="wav", sha256=sha256_of(b""), how="manifest")
    path = log_mark(record, format="pcm", sha256=sha256_of(b""), how="none", text="ten to five")
    first, second = lines(path)
    assert path == state / "marked.jsonl"
    assert first == {
        "time": "2026-11-21T12:30:05+00:00", "mark": "manifest", "voice": "pt_male", "model": "lab",
        "software": record.software, "format": "wav", "sha256": EMPTY,
    }  # fmt: skip
    assert second["text"] == "ten to five"
    assert path.stat().st_mode & 0o077 == 0


def test_lines_written_at_the_same_time_stay_whole(state, record):
    def write(i):
        return log_mark(record, format="wav", sha256=sha256_of(b"%d" % i), how="tags", text="x" * 20_000)

    with ThreadPoolExecutor(8) as pool:
        (path,) = set(pool.map(write, range(40)))
    assert {line["sha256"] for line in lines(path)} == {sha256_of(b"%d" % i) for i in range(40)}


def test_nothing_that_was_written_is_touched_and_a_line_cut_off_stays_apart(state, record):
    path = log_mark(record, format="wav", sha256=EMPTY, how="tags")
    with path.open("a") as file:
        file.write('{"time": "2026')  # a command was killed here
    before = path.read_bytes()
    log_mark(record, format="flac", sha256=EMPTY, how="tags")
    assert path.read_bytes().startswith(before + b"\n")
    assert json.loads(path.read_text().splitlines()[-1])["format"] == "flac"


def test_a_log_that_cannot_be_written_is_a_sentence(state, record):
    state.write_text("in the way")
    with pytest.raises(MarkError, match="set REVOX_STATE"):
        log_mark(record, format="wav", sha256=EMPTY, how="tags")
