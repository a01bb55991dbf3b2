"""What an executor is: somewhere to run batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from droplens.runs._grid import Batch, Numbers, Work


class Executor(ABC):
    """Runs batches in any order. It knows neither the store nor what a batch measures."""

    @abstractmethod
    def results(self, work: Work, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Numbers]]:
        """Yield each batch with its numbers as soon as it is done; an error in one ends all."""
