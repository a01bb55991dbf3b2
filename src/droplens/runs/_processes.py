"""Runs side by side, in a pool of processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import final

from droplens.runs._executor import Executor
from droplens.runs._grid import Group, Numbers, Work


@final
class Processes(Executor):
    """`jobs` processes of one thread each, started fresh, so that nothing is shared.

    Raises:
        ValueError: if `jobs` is not positive.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs has to be at least 1, but got {jobs}")
        self._jobs = jobs

    def results(
        self, work: Work, groups: Sequence[Group]
    ) -> Iterator[tuple[Group, Sequence[Numbers]]]:
        """As they finish.

        Yields:
            Each group with its numbers.

        Raises:
            OSError: if a process was killed from outside, as for want of memory.
        """
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            min(self._jobs, max(1, len(groups))), context, initializer=_prepare
        )
        try:
            # Those of few runs last, so that no process ends alone with a large group.
            running: dict[Future[Sequence[Numbers]], Group] = {
                pool.submit(work, group): group for group in sorted(groups, key=_runs, reverse=True)
            }
            for future in as_completed(running):
                yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process of the pool was killed (out of memory?); fewer --jobs need less"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _runs(group: Group) -> int:
    return sum(len(batch.seeds) for batch in group)


def _prepare() -> None:
    # Ctrl-C reaches the whole group; the parent alone tells the user.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # Read by torch and NumPy when the first piece of work imports them.
    os.environ["OMP_NUM_THREADS"] = "1"


def _leave_with_parent() -> None:
    # A pool whose parent was killed would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
