"""The same work on many things in several processes, results in order, memory bounded."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from revox.training.data.errors import DataError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def in_order(
    work: Callable[[_Task], _Result], tasks: Iterable[_Task], workers: int, ahead: int = 3
) -> Iterator[_Result]:
    """`work(task)` of every task, in the tasks' order, in `workers` processes (0: in this one).

    At most `ahead` tasks for each worker are taken before their turn; an empty task ([], None) is worked on
    here, so that nobody is started for nothing. What `work` raises is raised here; a worker that dies is a
    DataError.
    """
    if workers <= 0:
        yield from map(work, tasks)
        return
    pool: ProcessPoolExecutor | None = None
    pending: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            if task:
                if pool is None:
                    # A fresh interpreter: a forked one would inherit torch's threads and locks as they are.
                    context = multiprocessing.get_context("spawn")
                    pool = ProcessPoolExecutor(workers, context, quiet_worker)
                pending.append(pool.submit(work, task))
            else:
                pending.append(Future())
                pending[-1].set_result(work(task))
            if len(pending) >= ahead * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, often for want of memory or because the calling script has no "
            '`if __name__ == "__main__":`; try again with fewer workers'
        ) from None
    finally:
        if pool is not None:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=not pending, cancel_futures=True)
            for process in processes if pending else ():
                process.terminate()


def quiet_worker() -> None:
    """For the start of a worker: Ctrl-C is the parent's business, and one worker takes one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
