"""The same work for many clips, in several processes, stopped and taken up again at any time."""

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

Progress = Callable[[int, int, str], None]


def for_each(
    work: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int = 1,
    progress: Progress | None = None,
    what: str = "",
) -> list[Any]:
    """`work(*task)` of every task, in the tasks' order; `jobs` processes share them.

    `work` keeps its own results, so that nothing is lost when Ctrl-C (KeyboardInterrupt) or an error ends it
    all. `progress` is told how many are done, of how many, and `what`. Raises EvaluationError when a process
    is ended from outside, as systems do when the memory runs out.
    """
    done = 0

    def tell() -> None:
        if progress is not None:
            progress(done, len(tasks), what)

    tell()
    results: list[Any] = [None] * len(tasks)
    if jobs <= 1 or len(tasks) <= 1:
        for i, task in enumerate(tasks):
            results[i] = work(*task)
            done += 1
            tell()
        return results
    # A fresh interpreter: a forked one would inherit torch's threads and locks in the middle of their work.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, _start, (threads,))
    try:
        with _deaf_to_ctrl_c():
            places = {pool.submit(work, *task): i for i, task in enumerate(tasks)}
        for future in as_completed(places):
            results[places[future]] = future.result()
            done += 1
            tell()
    except BaseException as error:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            raise EvaluationError(
                "a process that shared the work was ended from outside, perhaps for want of memory: what is "
                "done is kept; try again with fewer --jobs"
            ) from None
        raise
    pool.shutdown()
    return results


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started meanwhile never hears Ctrl-C, which reaches every process of a terminal.

    The first process hears it afterwards, and ends the others. (Ignoring it only once a process runs would
    leave the second that it takes to start.)
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
    """A first process that is killed cannot end the others; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
