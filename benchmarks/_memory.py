"""Peak memory of a call, each in a process of its own, so that no other call's peak counts."""

import multiprocessing
import pathlib
from collections.abc import Callable
from multiprocessing.connection import Connection


def peak(prepare: Callable[[], Callable[[], object]]) -> float:
    """Bytes by which `prepare()()` raises the peak over what `prepare()` alone needs.

    `prepare` has to be a function that a fresh process can import.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(prepare, theirs))
    process.start()
    grown: float = ours.recv()
    process.join()
    return grown


def _measure(prepare: Callable[[], Callable[[], object]], ours: Connection) -> None:
    call = prepare()
    # Linux: the high-water mark of this process from here on, not what it inherits.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    call()
    ours.send(1024.0 * (kilobytes("VmHWM") - before))


def kilobytes(field: str) -> int:
    """A field of /proc/self/status. (rusage would count what the parent held at the fork.)"""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
