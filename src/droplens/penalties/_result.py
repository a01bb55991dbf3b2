"""A penalty as a result: what it tells, and how parts of the data and processes add up."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from droplens.estimates import Estimate, cumulants, from_cumulants
from droplens.penalties._pooling import Group, by_name, merged, pooled, shares, weighted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Penalty:
    """What dropout adds to the loss: the spread, in units of the loss.

    Args:
        total: differentiable scalar; all sites together.
        by_site: scalar per site, that site alone. Second-order values add up to the total;
            Gaussian values need not. Empty for "masks", which drop together: `decompose` draws
            for each site alone.
        per_example: the total's parts, (n), weighted as the loss weighs examples.
        method: how it was computed.
        approximation: of what order the value is, in words.
        participation: by site, how many equal coins would make the output noise of an example;
            for the Gaussian value, which leans on many.
        standard_error: of the total over probes, for "sampled", or masks, for "masks"; else 0. Of a
            single probe an upper bound, which takes 16 examples; of fewer NaN. Of masks NaN where
            a few rare ones make most of it.
        seed: repeats the probes or masks; None if none were drawn.
        notes: what a reader of the number should know.
        unmeasured: sites that are not counted (no law, or a mask that mixes examples), and why.
        divisor: what the loss's mean divides by; None for a sum.
        site_errors: standard errors of `by_site`; empty where nothing was sampled.
        example_errors: those of `per_example`, (n); None where nothing was sampled, NaN of a single
            probe and of fewer than 100 masks.
        variance_slope: of the total over masks, as `Estimate` has it; else 0.
        skewness: likewise.
        draws: how many probes or masks were drawn of a batch; 0 if none.
    """

    total: Tensor
    by_site: Mapping[str, Tensor]
    per_example: Tensor
    method: str
    approximation: str
    participation: Mapping[str, float] = field(default_factory=dict)
    standard_error: float = 0.0
    seed: int | None = None
    notes: tuple[str, ...] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    divisor: float | None = None
    site_errors: Mapping[str, float] = field(default_factory=dict)
    example_errors: Tensor | None = None
    variance_slope: float = 0.0
    draws: int = 0
    skewness: float = 0.0

    def __float__(self) -> float:
        return float(self.total.detach())

    def sampled(self) -> Estimate:
        """The total as a sampled number."""
        return Estimate(
            float(self),
            self.standard_error,
            max(1, self.draws),
            "masks" if self.method == "masks" else "probes",
            self.variance_slope,
            self.skewness,
        )

    def all_reduce(self, group: "ProcessGroup | None" = None) -> "Penalty":
        """The penalty over the data of all processes, the same on each, without a graph.

        Every process computes its own part and calls this. `per_example` stays that of the
        process's own examples, weighed as the whole weighs them.

        Args:
            group: of torch.distributed; the default group if not given.

        Raises:
            RuntimeError: if torch.distributed has not been initialised.
            ValueError: if the processes met different sites, or drew from one seed.
        """
        processes = Group(self.divisor, [self.method, *self.by_site], group)
        processes.check_seeds(self.seed)
        share = processes.share
        mine = [self.total, *self.by_site.values()]
        counts = list(self.participation)
        packed = processes.summed(
            [float(value.detach()) * share for value in mine]
            + [share * self.participation[name] for name in counts]
            + [(share * error) ** 2 for error in self.site_errors.values()]
            + [*cumulants(self.sampled(), share)[1:], share]
        )
        squares = packed[len(mine) + len(counts) : -4]
        joint = from_cumulants((packed[0], *packed[-4:-1]), self.sampled())
        total, *sites = (self.total.new_tensor(value) for value in packed[: len(mine)])
        return replace(
            self,
            total=total.detach(),
            by_site=dict(zip(self.by_site, sites, strict=True)),
            per_example=self.per_example.detach() * share,
            participation={
                name: packed[len(mine) + k] / packed[-1] for k, name in enumerate(counts)
            },
            standard_error=joint.standard_error,
            variance_slope=joint.variance_slope,
            skewness=joint.skewness,
            divisor=processes.divisor,
            site_errors={n: s**0.5 for n, s in zip(self.site_errors, squares, strict=True)},
            example_errors=None if self.example_errors is None else share * self.example_errors,
        )


@final
class WhenAsked(Mapping[str, Tensor]):
    """Values by site that are computed at the first look: a total needs none of them."""

    def __init__(self, compute: Mapping[str, Callable[[], Tensor]]) -> None:
        self._compute = compute
        self._known: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            self._known[name] = self._compute[name]()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._compute)

    def __len__(self) -> int:
        return len(self._compute)

    def __repr__(self) -> str:
        return repr(dict(self))


def together(parts: Sequence[Penalty]) -> Penalty:
    """Parts of one batch, weighed as the whole weighs them."""
    counts = [len(part.per_example) for part in parts]
    counted = [count / sum(counts) for count in counts]

    def alone(name: str) -> Tensor:
        return torch.stack([part.by_site[name] for part in parts]).sum()

    return replace(
        parts[0],
        total=torch.stack([part.total for part in parts]).sum(),
        by_site=WhenAsked({name: partial(alone, name) for name in parts[0].by_site}),
        per_example=torch.cat([part.per_example for part in parts]),
        participation=by_name(counted, [part.participation for part in parts]),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def pooled_penalty(found: Sequence[Penalty]) -> Penalty:
    """Of all batches together."""
    weights = shares([part.divisor for part in found])
    divisors = [part.divisor for part in found if part.divisor is not None]
    counted = [w / sum(weights) for w in weights]
    squares = [{name: e**2 for name, e in part.site_errors.items()} for part in found]
    joint = pooled(weights, [part.sampled() for part in found])
    return replace(
        found[0],
        total=weighted(weights, [part.total for part in found]),
        by_site=by_name(weights, [part.by_site for part in found]),
        per_example=torch.cat([w * p.per_example for w, p in zip(weights, found, strict=True)]),
        participation=by_name(counted, [part.participation for part in found]),
        standard_error=joint.standard_error,
        variance_slope=joint.variance_slope,
        skewness=joint.skewness,
        notes=tuple(dict.fromkeys(note for part in found for note in part.notes)),
        unmeasured=merged(part.unmeasured for part in found),
        divisor=sum(divisors) if divisors else None,
        site_errors={n: s**0.5 for n, s in by_name([w**2 for w in weights], squares).items()},
        example_errors=_pooled_errors(weights, [part.example_errors for part in found]),
    )


def _pooled_errors(weights: Sequence[float], errors: Sequence[Tensor | None]) -> Tensor | None:
    parts = [w * e for w, e in zip(weights, errors, strict=True) if e is not None]
    return torch.cat(parts) if parts else None
