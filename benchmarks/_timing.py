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


def ratio_of_best(
    ours: Callable[[], object], limit: Callable[[], object], repeats: int = 60
) -> float:
    """The quickest of ours over the quickest of the limit: what others' load adds is in neither."""
    ours(), limit()
    pairs = [(seconds(ours), seconds(limit)) for _ in range(repeats)]
    return min(own for own, _ in pairs) / min(other for _, other in pairs)


def row(what: str, measured: float, at_most: float) -> None:
    mark = "" if measured <= at_most else "  ABOVE THE LIMIT"
    print(f"{what} | {measured:.3g} | {at_most:g}{mark}")
