from __future__ import annotations

import json
import os
import pickle

import pytest

from revox.evaluation.cache import Cache, file_identity, folder_identity, key_of
from revox.evaluation.errors import EvaluationError
from revox.evaluation.workers import for_each


def squared(x):
    if x < 0:
        raise EvaluationError("a number below 0; give another")
    return x * x, os.getpid()


def test_processes_share_the_work_and_keep_its_order():
    seen = []
    results = for_each(squared, [(x,) for x in range(5)], 2, lambda done, of, what: seen.append((done, of)))
    assert [value for value, _ in results] == [0, 1, 4, 9, 16]
    assert os.getpid() not in {process for _, process in results}
    assert seen == [(i, 5) for i in range(6)]


def test_an_error_crosses_processes_as_the_same_sentence():
    error = pickle.loads(pickle.dumps(EvaluationError("a number below 0; give another")))
    assert isinstance(error, EvaluationError)
    assert str(error) == "a number below 0; give another"
    with pytest.raises(EvaluationError, match="a number below 0"):
        for_each(squared, [(1,), (-1,)])


def test_what_was_done_before_an_interruption_is_not_done_again(tmp_path):
    cache, calls = Cache(tmp_path), []

    def work(x):
        def make():
            calls.append(x)
            if x == 2 and calls.count(2) == 1:
                raise KeyboardInterrupt
            return {"x": x}

        return cache.record(key_of(x=x), make)

    tasks = [(x,) for x in range(4)]
    with pytest.raises(KeyboardInterrupt):
        for_each(work, tasks)
    assert for_each(work, tasks) == [{"x": x} for x in range(4)]
    assert calls == [0, 1, 2, 2, 3]


def test_a_damaged_record_is_made_again(tmp_path):
    cache = Cache(tmp_path)
    cache.record("k", lambda: {"a": 1})
    (tmp_path / "k.json").write_text("{")
    assert cache.record("k", lambda: {"a": 2}) == {"a": 2}
    assert json.loads((tmp_path / "k.json").read_text()) == {"a": 2}


def test_codes_come_back_from_the_cache_as_they_were(tmp_path):
    import torch  # here, so that the processes of the first test need not load it

    codes = torch.randint(8192, (37, 5))
    cache = Cache(tmp_path)
    cache.codes("k", lambda: (codes, False))
    kept, ended = cache.codes("k", lambda: pytest.fail("made again"))
    assert torch.equal(kept, codes)
    assert ended is False


def test_a_checkpoint_is_told_by_its_content(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    first = folder_identity(tmp_path)
    (tmp_path / "notes.txt").write_text("of no matter")
    assert folder_identity(tmp_path) == first
    (tmp_path / "params.json").write_text("{ }")
    assert folder_identity(tmp_path) != first


def test_a_large_file_is_told_by_blocks_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("revox.evaluation.cache.WHOLE", 10)
    monkeypatch.setattr("revox.evaluation.cache.BLOCK", 4)
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))
    os.utime(path, ns=(1, 1))
    first = file_identity(path)
    path.write_bytes(bytes(999) + b"x")
    os.utime(path, ns=(1, 1))
    assert file_identity(path) != first
