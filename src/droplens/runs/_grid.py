"""What is to be run: batches of seeds at a setting, named by plain data."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Numbers = Mapping[str, Sequence[float] | Sequence[Sequence[float]]]
"""Quantity -> a number, or a curve, for each seed of a batch."""


@dataclass(frozen=True)
class Batch:
    """Runs that differ in the seed alone and are made together.

    `claim` says what is measured, `broken` under which wrong theory ("" for the right one),
    `settings` is canonical JSON. A run is known by these three and its seed.

    >>> Batch.of("P1.objective", {"r": 4, "p": 0.5}, [0, 1]).settings
    '{"p":0.5,"r":4}'
    """

    claim: str
    broken: str
    settings: str
    seeds: tuple[int, ...]

    @classmethod
    def of(
        cls, claim: str, setting: Mapping[str, Any], seeds: Iterable[int], broken: str = ""
    ) -> "Batch":
        """A batch at a setting given as a mapping."""
        return cls(claim, broken, canonical(setting), tuple(seeds))

    @property
    def setting(self) -> dict[str, Any]:
        """The settings as a mapping."""
        return dict(json.loads(self.settings))


Work = Callable[[Batch], Numbers]
"""Makes a batch's runs. Executors send it to other processes: a function of a module."""


def canonical(setting: Mapping[str, Any]) -> str:
    """One text for equal settings, whatever their order."""
    return json.dumps(setting, sort_keys=True, separators=(",", ":"), allow_nan=False)


def batches(
    claim: str,
    setting: Mapping[str, Any],
    seeds: Sequence[int],
    size: int,
    broken: str = "",
) -> Iterator[Batch]:
    """The seeds in batches of at most `size`.

    Yields:
        The batches, in the seeds' order.
    """
    for first in range(0, len(seeds), size):
        yield Batch.of(claim, setting, seeds[first : first + size], broken)
