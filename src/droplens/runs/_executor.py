"""What an executor is: somewhere to run groups of batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from droplens.runs._grid import Group, Numbers, Work


class Executor(ABC):
    """Runs groups in any order. It knows neither the store nor what a batch measures."""

    @abstractmethod
    def results(
        self, work: Work, groups: Sequence[Group]
    ) -> Iterator[tuple[Group, Sequence[Numbers]]]:
        """Yield each group with its numbers as soon as it is done; an error in one ends all."""
