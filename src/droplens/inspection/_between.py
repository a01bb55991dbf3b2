"""Measures on request of what lies between the networks of a comparison."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from torch import nn

from droplens.batches import Batches
from droplens.estimates import Estimate, exact, mean_estimate
from droplens.inspection._attempt import attempt
from droplens.measure import Interpolation, interpolation

_POINTS: Final = 21
# Relative difference of two ways to add up one loss.
_SLACK: Final = 1e-3


class Member(NamedTuple):
    """A network of a comparison, and its loss on the data with dropout off."""

    model: nn.Module
    base: float


@dataclass(frozen=True)
class Line:
    """The loss on the straight lines from networks of one set to those of another, dropout off.

    Args:
        alphas: α; 0 is the network of the first set, 1 that of the second.
        loss: the mean over pairs at every α; no network is in two pairs, so that they are
            independent. With one pair it is exact.
        barrier: how far the loss rises above the straight line between its two ends, likewise.
        pairs: every pair's own line.
    """

    alphas: tuple[float, ...]
    loss: tuple[Estimate, ...]
    barrier: Estimate
    pairs: tuple[Interpolation, ...]


@dataclass(frozen=True)
class Lines:
    """Lines between networks, by the names of their sets: "a – b", or "a" within one set."""

    between: Mapping[str, Line]


def _lines(
    sets: Mapping[str, Sequence[Member]],
    batches: Batches,
    loss: nn.Module,
    not_measured: dict[str, str],
) -> Lines | None:
    found = {}
    for name, pairs in _pairs(sets):
        line = attempt(
            not_measured, f"interpolation ({name})", partial(_line, pairs, batches, loss)
        )
        if line is not None:
            found[name] = line
    if not found:
        not_measured["interpolation"] = "there are no two networks with a line between them"
    return Lines(found) if found else None


def _pairs(
    sets: Mapping[str, Sequence[Member]],
) -> Iterator[tuple[str, list[tuple[Member, Member]]]]:
    """The first set with every other, in order; and within a set, two by two.

    Yields:
        What the pairs are called, and the pairs.
    """
    names = list(sets)
    for other in names[1:]:
        yield f"{names[0]} – {other}", list(zip(sets[names[0]], sets[other], strict=False))
    for name, members in sets.items():
        if len(members) > 1:
            yield name, list(zip(members[::2], members[1::2], strict=False))


def _line(pairs: Sequence[tuple[Member, Member]], batches: Batches, loss: nn.Module) -> Line:
    found = tuple(_pair(a, b, batches, loss) for a, b in pairs)
    alphas = found[0].alphas.tolist()
    values = zip(*(line.loss.tolist() for line in found), strict=True)
    return Line(
        tuple(alphas),
        tuple(_over_pairs(at) for at in values),
        _over_pairs([line.barrier for line in found]),
        found,
    )


def _pair(first: Member, second: Member, batches: Batches, loss: nn.Module) -> Interpolation:
    """One line.

    Raises:
        ValueError: if the networks are not of one architecture, or the loss is not finite.
    """
    found = interpolation(first.model, second.model, batches, loss, _POINTS)
    if found.not_finite:
        raise ValueError(
            f"the loss is NaN or infinite at {found.not_finite} of {_POINTS} points of a line"
        )
    # Weights of the same shapes may still belong to another forward.
    end = float(found.loss[-1])
    if abs(end - second.base) > _SLACK * max(abs(second.base), abs(first.base)):
        raise ValueError(
            "the architectures differ: the first network has a loss of "
            f"{end:.4g} with the weights of the second, which has {second.base:.4g} itself"
        )
    return found


def _over_pairs(values: Sequence[float]) -> Estimate:
    over = "pairs of networks"
    return exact(values[0], over) if len(values) == 1 else mean_estimate(values, over)


@dataclass(frozen=True)
class Pairwise:
    """A measure of several networks together, made when it is asked for by name.

    Args:
        measure: from the sets, the data, the loss and what is not measured (it adds to that) to a
            dataclass that the report room knows how to show, or None.
        offer: what it gives, as a continuation of "not asked for; measures=('name',) ...".
    """

    measure: Callable[
        [Mapping[str, Sequence[Member]], Batches, nn.Module, dict[str, str]], Any | None
    ]
    offer: str


BETWEEN: Final[Mapping[str, Pairwise]] = {
    "interpolation": Pairwise(
        _lines, "gives the loss on the lines between networks, and its barrier"
    ),
}
