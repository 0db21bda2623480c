"""The same work on many things in several processes, results in order, memory bounded."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from revox.training.data.errors import DataError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_AHEAD = 3  # tasks of each worker that are taken before their turn
_FEW = 3  # tasks that are not worth starting a process for


def in_order(
    work: Callable[[_Task], _Result], tasks: Iterable[_Task], workers: int | None, ahead: int = _AHEAD
) -> Generator[_Result, None, None]:
    """`work(task)` of every task, in the tasks' order, in `workers` processes (None: all cores; 0: this one).

    What `work` raises is raised here. Raises DataError when a worker dies.
    """
    tasks = iter(tasks)
    if workers is None:  # macOS and Windows do not know which cores a process may use
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = list(itertools.islice(tasks, _FEW)) if workers else []
    if len(first) < _FEW:
        yield from map(work, itertools.chain(first, tasks))
        return
    pending: deque[Future[_Result]] = deque()
    # Fresh interpreters: forked ones would inherit torch's threads and locks as they are.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        for task in itertools.chain(first, tasks):
            pending.append(pool.submit(work, task))
            if len(pending) >= ahead * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, often for lack of memory or because the calling script has no "
            '`if __name__ == "__main__":`; try again with fewer workers'
        ) from None
    finally:
        with contextlib.suppress(RuntimeError):  # the interpreter is ending
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's business, and a worker takes one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
