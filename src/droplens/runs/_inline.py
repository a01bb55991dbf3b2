"""Runs one after the other, in this process."""

from collections.abc import Iterator, Sequence
from typing import final

from droplens.runs._executor import Executor
from droplens.runs._grid import Group, Numbers, Work


@final
class Inline(Executor):
    """No other process: the simplest to debug, and the first with a GPU."""

    def results(
        self, work: Work, groups: Sequence[Group]
    ) -> Iterator[tuple[Group, Sequence[Numbers]]]:
        """In the order given.

        Yields:
            Each group with its numbers.
        """
        for group in groups:
            yield group, work(group)
