from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import pytest

from revox.evaluation.cache import Cache, file_identity, folder_identity
from revox.evaluation.errors import EvaluationError
from revox.workers import WorkerError, for_each


def squared(x):
    if x < 0:
        raise EvaluationError("a number below 0; give another")
    return x * x, os.getpid()


def test_processes_share_the_work_and_keep_its_order():
    seen = []
    results = for_each(squared, [(x,) for x in range(5)], 2, lambda at: seen.append((at.done, at.total)))
    assert [value for value, _ in results] == [0, 1, 4, 9, 16]
    assert os.getpid() not in {process for _, process in results}
    assert seen == [(i, 5) for i in range(6)]


def test_an_error_crosses_processes_as_the_same_sentence():
    error = pickle.loads(pickle.dumps(EvaluationError("a number below 0; give another")))
    assert isinstance(error, EvaluationError)
    assert str(error) == "a number below 0; give another"
    with pytest.raises(EvaluationError, match="a number below 0"):
        for_each(squared, [(1,), (-1,)])


def ended_from_outside(x):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_ends_is_a_sentence():
    with pytest.raises(WorkerError, match="fewer workers or --jobs"):
        for_each(ended_from_outside, [(1,), (2,)], 2)


def ctrl_c_is_blocked(x):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_is_for_the_first_process_alone():
    # The mask is the system's own and set before a process begins: there is no moment at which one hears it.
    assert for_each(ctrl_c_is_blocked, [(1,), (2,)], 2) == [True, True]
    assert not ctrl_c_is_blocked(0)


def told_and_asleep(x):
    os.write(1, b".")
    multiprocessing.Event().wait()


def test_processes_end_with_the_first_one_even_when_that_is_killed(tmp_path):
    script = tmp_path / "first.py"
    script.write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('under_test', {__file__!r})\n"
        "sys.modules['under_test'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "if __name__ == '__main__':\n"
        "    module.for_each(module.told_and_asleep, [(1,), (2,)], 2)\n"
    )
    first = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert first.stdout.read(2) == b".."
    first.kill()
    # Each process that is left holds the pipe open: it ends when the last of them has.
    assert first.communicate(timeout=60)[0] == b""


def test_what_was_done_before_an_interruption_is_not_done_again(tmp_path):
    cache, calls = Cache(tmp_path), []

    def work(x):
        def make():
            calls.append(x)
            if x == 2 and calls.count(2) == 1:
                raise KeyboardInterrupt
            return {"x": x}

        return cache.record(str(x), make)

    tasks = [(x,) for x in range(4)]
    with pytest.raises(KeyboardInterrupt):
        for_each(work, tasks)
    assert for_each(work, tasks) == [{"x": x} for x in range(4)]
    assert calls == [0, 1, 2, 2, 3]


def test_a_damaged_record_is_made_again(tmp_path):
    cache = Cache(tmp_path)
    cache.record("k", lambda: {"a": 1})
    path = tmp_path / "k.record"
    whole = path.read_bytes()
    digit = whole.replace(b"1}", b"7}")
    for damage in (
        b"",
        whole[:-1],
        digit,
        b'{"a": 7}',
        b"[" * 100_000,
        whole.split(b"\n")[0] + b"\n{}",
        b"\xff",
    ):
        path.write_bytes(damage)
        assert cache.record("k", lambda: {"a": 2}) == {"a": 2}
        assert cache.record("k", lambda: pytest.fail("made again")) == {"a": 2}


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
