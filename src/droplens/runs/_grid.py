"""What is to be run: batches of seeds at a setting, and groups of them, named by plain data."""

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
    `settings` is canonical JSON. A run is known by these three and its seed. `stacks` names the
    settings in which batches may differ and still be made together.

    >>> Batch.of("P1.objective", {"r": 4, "p": 0.5}, [0, 1]).settings
    '{"p":0.5,"r":4}'
    """

    claim: str
    broken: str
    settings: str
    seeds: tuple[int, ...]
    stacks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        claim: str,
        setting: Mapping[str, Any],
        seeds: Iterable[int],
        broken: str = "",
        stacks: Iterable[str] = (),
    ) -> "Batch":
        """A batch at a setting given as a mapping."""
        return cls(claim, broken, canonical(setting), tuple(seeds), tuple(stacks))

    @property
    def setting(self) -> dict[str, Any]:
        """The settings as a mapping."""
        return dict(json.loads(self.settings))


Group = tuple[Batch, ...]
"""Batches that are made together: of one claim, theory and seeds."""

Work = Callable[[Group], Sequence[Numbers]]
"""Makes a group's runs: numbers for each batch. Executors send it to other processes: a function
of a module."""


def canonical(setting: Mapping[str, Any]) -> str:
    """One text for equal settings, whatever their order."""
    return json.dumps(setting, sort_keys=True, separators=(",", ":"), allow_nan=False)


def batches(
    claim: str,
    setting: Mapping[str, Any],
    seeds: Sequence[int],
    size: int,
    broken: str = "",
    stacks: Iterable[str] = (),
) -> Iterator[Batch]:
    """The seeds in batches of at most `size`.

    Yields:
        The batches, in the seeds' order.
    """
    for first in range(0, len(seeds), size):
        yield Batch.of(claim, setting, seeds[first : first + size], broken, stacks)


def together(wanted: Iterable[Batch]) -> list[Group]:
    """Batches of the same seeds whose settings differ in their `stacks` alone, grouped.

    >>> slow, fast, wide = ({"rate": 0.1, "r": 4}, {"rate": 0.2, "r": 4}, {"rate": 0.1, "r": 8})
    >>> found = together(Batch.of("c", s, [0, 1], stacks=["rate"]) for s in (slow, fast, wide))
    >>> [[batch.settings for batch in group] for group in found]
    [['{"r":4,"rate":0.1}', '{"r":4,"rate":0.2}'], ['{"r":8,"rate":0.1}']]
    """
    groups: dict[tuple[object, ...], list[Batch]] = {}
    for batch in wanted:
        alike = {name: v for name, v in batch.setting.items() if name not in batch.stacks}
        key = (batch.claim, batch.broken, batch.seeds, canonical(alike))
        groups.setdefault(key, []).append(batch)
    return [tuple(group) for group in groups.values()]
