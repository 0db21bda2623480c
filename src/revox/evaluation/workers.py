"""The same work for many clips, in several processes, interrupted and resumed at any time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from revox.evaluation.errors import EvaluationError
from revox.progress import Progress, ProgressCallback, ignore_progress


def for_each(
    work: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int = 1,
    progress: ProgressCallback = ignore_progress,
    what: str = "",
) -> list[Any]:
    """`work(*task)` of every task, in the tasks' order, in `jobs` processes.

    `work` saves its own results, so that nothing is lost when Ctrl-C (KeyboardInterrupt) or an error ends
    the call. `progress` gets `what`. Raises EvaluationError when a process is killed, as systems do when
    memory runs out.
    """
    results: list[Any] = [None] * len(tasks)
    progress(Progress(what, 0, len(tasks)))
    if jobs <= 1 or len(tasks) <= 1:
        for i, task in enumerate(tasks):
            results[i] = work(*task)
            progress(Progress(what, i + 1, len(tasks)))
        return results
    # A fresh interpreter: a forked one would inherit torch's threads and locks in the middle of their work.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, _start, (threads,))
    try:
        with _ctrl_c_blocked():
            places = {pool.submit(work, *task): i for i, task in enumerate(tasks)}
        for done, future in enumerate(as_completed(places), start=1):
            results[places[future]] = future.result()
            progress(Progress(what, done, len(tasks)))
    except BaseException as error:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            raise EvaluationError(
                "a worker process was killed, perhaps because memory ran out; what is done is saved: run the "
                "same command again with fewer --jobs"
            ) from None
        raise
    pool.shutdown()
    return results


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


def _start(threads: int) -> None:
    # Read by torch when the work imports it, after this.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers; they would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
