"""The same work on many things in several processes: results in order, memory bounded."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from revox.progress import Progress, ProgressCallback, ignore_progress

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class WorkerError(ValueError):
    """A worker process died; the message is one sentence with the cause and the fix."""


def in_order(
    work: Callable[[_Task], _Result],
    tasks: Iterable[_Task],
    workers: int | None,
    *,
    ahead: int = 3,
    threads: int = 1,
) -> Generator[_Result, None, None]:
    """`work(task)` of every task, in the tasks' order, in `workers` processes (None: all cores; 0: this one).

    `ahead` tasks of each worker are taken before their turn; numpy and torch have so many `threads` in each.
    Closing the generator ends the workers at once, as Ctrl-C does. What `work` raises is raised here. Raises
    WorkerError when a worker dies.
    """
    tasks = iter(tasks)
    if workers is None:  # macOS and Windows do not know which cores a process may use
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = list(itertools.islice(tasks, 2)) if workers else []
    if len(first) < 2:  # a single task is not worth starting a process for
        yield from map(work, itertools.chain(first, tasks))
        return
    pending: deque[Future[_Result]] = deque()
    finished = False
    # Fresh interpreters: forked ones would inherit torch's threads and locks as they are.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (threads,))
    try:
        for task in itertools.chain(first, tasks):
            with _ctrl_c_blocked():
                pending.append(pool.submit(work, task))
            if len(pending) >= ahead * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        finished = True
    except BrokenProcessPool:
        raise WorkerError(
            "a worker process died, often for lack of memory or because the calling script has no "
            '`if __name__ == "__main__":`; try again with fewer workers or --jobs'
        ) from None
    finally:
        # Unless everything is done, nobody waits for what the workers still do.
        abandoned = [] if finished else list((pool._processes or {}).values())
        pool.shutdown(wait=finished, cancel_futures=True)
        for process in abandoned:
            process.terminate()
        for process in abandoned:
            process.join()


def for_each(
    work: Callable[..., _Result],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int = 1,
    progress: ProgressCallback = ignore_progress,
    what: str = "",
) -> list[_Result]:
    """`work(*task)` of every task, in the tasks' order, in `jobs` processes that share the cores.

    `work` saves its own results, so that nothing is lost when Ctrl-C (KeyboardInterrupt) or an error ends
    the call. `progress` gets `what`. Raises WorkerError when a process is killed.
    """
    progress(Progress(what, 0, len(tasks)))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    results: list[_Result] = []
    for result in in_order(partial(_apply, work), tasks, jobs if jobs > 1 else 0, threads=threads):
        results.append(result)
        progress(Progress(what, len(results), len(tasks)))
    return results


def _apply(work: Callable[..., _Result], task: tuple[Any, ...]) -> _Result:
    return work(*task)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Processes started meanwhile never get Ctrl-C, which the terminal sends to all of them.

    The first process gets it afterwards, and ends the others. (Ignoring it in a process that runs already
    would leave the second that it takes to start.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(threads: int) -> None:
    # Read by torch and numpy when the work imports them, after this.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers; they would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
