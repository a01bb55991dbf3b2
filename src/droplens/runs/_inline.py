"""Runs one after the other, in this process."""

from collections.abc import Iterator, Sequence
from typing import final

from droplens.runs._executor import Executor
from droplens.runs._grid import Batch, Numbers, Work


@final
class Inline(Executor):
    """No other process: the simplest to debug, and the first with a GPU."""

    def results(self, work: Work, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Numbers]]:
        """In the order given.

        Yields:
            Each batch with its numbers.
        """
        for batch in batches:
            yield batch, work(batch)
