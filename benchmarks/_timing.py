"""Ratios measured in one run: both sides take turns, so that a busy machine slows both."""

import statistics
import time
from collections.abc import Callable


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], limit: Callable[[], object], repeats: int = 15) -> float:
    """The median over turns of seconds(ours)/seconds(limit); one warm-up each."""
    ours(), limit()
    return statistics.median(seconds(ours) / seconds(limit) for _ in range(repeats))


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def cpu_ratio(ours: Callable[[], object], limit: Callable[[], object], repeats: int = 40) -> float:
    """As `ratio`, in processor time, which others' load on the machine lengthens little."""
    ours(), limit()
    return statistics.median(cpu_seconds(ours) / cpu_seconds(limit) for _ in range(repeats))


def row(what: str, measured: float, at_most: float) -> None:
    mark = "" if measured <= at_most else "  ABOVE THE LIMIT"
    print(f"{what} | {measured:.3g} | {at_most:g}{mark}")
