"""The same work for many clips, in several processes, stopped and taken up again at any time."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

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
    all. `progress` is told how many are done, of how many, and `what`.
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
        places = {pool.submit(work, *task): i for i, task in enumerate(tasks)}
        for future in as_completed(places):
            results[places[future]] = future.result()
            done += 1
            tell()
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()
    return results


def _start(threads: int) -> None:
    # Ctrl-C reaches every process of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Read by torch when the work imports it, after this.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
