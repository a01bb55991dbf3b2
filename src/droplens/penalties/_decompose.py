"""What dropout costs, by drawing masks: gap = spread + shift, with standard errors."""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from droplens._pairs import Pairs
from droplens.calling import check_inputs, check_outputs, device_of, predictions
from droplens.discovery import sites as find_sites
from droplens.estimates import (
    Estimate,
    exact,
    jackknife,
    note_on_untold,
    skewed_mean,
    told,
)
from droplens.gates import draw_masks, masks_off, masks_replaced
from droplens.losses import Family
from droplens.losses import family as family_of
from droplens.penalties._pooling import Group, check_sites, merged, pooled, shares, streamed
from droplens.randomness import private_generator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Outputs under masks that are kept for the jackknife; beyond, the same masks are drawn twice.
_HELD_NUMBERS = 1 << 24
UNSPLIT = (
    "the loss is known by its output Hessian alone, without the A(f) that tells spread from shift; "
    "droplens.losses.from_log_partition describes a loss by it"
)


@dataclass(frozen=True)
class Parts:
    """gap = spread + shift, in units of the loss, with standard errors over masks."""

    gap: Estimate
    spread: Estimate
    shift: Estimate

    def told(self) -> "Parts":
        """Without the errors that the draws do not tell."""
        return Parts(told(self.gap), told(self.spread), told(self.shift))


@dataclass(frozen=True)
class Decomposition:
    """What dropout costs a network on given data, by Monte Carlo over masks.

    Args:
        base: the loss without dropout (exact).
        gap: the mean loss under dropout minus `base`.
        spread: E A(f_z) − A(E f_z), never negative in truth: noise around the mean output. NaN
            where A is not known, as `notes` say.
        shift: the loss at the mean output minus `base`; NaN likewise.
        by_site: the same with one site dropping alone.
        draws: masks drawn, for each of these rows.
        seed: repeats the draws.
        unmeasured: sites without a law, and why; they were off.
        divisor: what the loss's mean divides by; None for a sum.
        notes: what a reader of the numbers should know.
    """

    base: Estimate
    gap: Estimate
    spread: Estimate
    shift: Estimate
    by_site: Mapping[str, Parts]
    draws: int
    seed: int
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    divisor: float | None = None
    notes: tuple[str, ...] = ()

    def all_reduce(self, group: "ProcessGroup | None" = None) -> "Decomposition":
        """The decomposition over the data of all processes, the same on each.

        Every process decomposes on its own part of the data, with its own masks, and calls this.

        Args:
            group: of torch.distributed; the default group if not given.

        Raises:
            RuntimeError: if torch.distributed has not been initialised.
            ValueError: if the processes met different sites, or drew from one seed.
        """
        processes = Group(self.divisor, self.by_site, group)
        processes.check_seeds(self.seed)
        rows: list[Decomposition | Parts] = [self, *self.by_site.values()]
        found = processes.pooled(
            [self.base, *(v for row in rows for v in (row.gap, row.spread, row.shift))]
        )
        joint, *alone = (Parts(*found[k : k + 3]) for k in range(1, len(found), 3))
        return Decomposition(
            found[0],
            joint.gap,
            joint.spread,
            joint.shift,
            dict(zip(self.by_site, alone, strict=True)),
            self.draws,
            self.seed,
            self.unmeasured,
            processes.divisor,
            self.notes,
        )


def decompose(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None,
    loss: object,
    draws: int = 200,
    *,
    sites: Collection[str] | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Decomposition:
    """Split what dropout costs into spread and shift by drawing masks (theory §3.1).

    E_z ℓ(f_z, y) − ℓ(f_1, y) = [E_z A(f_z) − A(f̄)] + [ℓ(f̄, y) − ℓ(f_1, y)], f̄ = E_z f_z. The
    spread from K draws is biased by ½ tr(H Σ_f)/K; the jackknife removes that. The gap is
    unbiased as it is, and equals spread + shift to rounding. Only sums over the draws are held;
    where the outputs under all masks take much memory, the same masks are drawn a second time.
    Of a loss that is known by its output Hessian alone only the gap can be told. Where a few rare
    masks make most of a number (p near 0 or 1 on few units) it has no error, and `notes` say so.

    Args:
        model: any torch module; its sites' train-mode laws count, whatever mode it is in.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or a loader or
            data set of (inputs, targets), streamed, each batch with masks of its own.
        targets: what the loss compares with; None for a loader, which brings them.
        loss: a loss object; units and reduction are its own.
        draws: masks to draw, jointly and for each site alone; at least 2.
        sites: names of the sites to list alone; all of them if not given, none if empty.
        generator: where the masks come from; a private one seeded by the system if not given.
        seed: in place of a generator.

    Returns:
        Estimates with standard errors over masks, the data held fixed.

    Raises:
        TypeError: if the loss is not known or the model returns no tensor.
        ValueError: for fewer than 2 draws, bad inputs or targets, or an unknown site.
    """
    given = (model, inputs, targets, loss, draws)
    found = decompose_part(*given, sites=sites, generator=generator, seed=seed)
    joint = Parts(found.gap, found.spread, found.shift).told()
    by_site = {name: alone.told() for name, alone in found.by_site.items()}
    rows = vars(joint) | {
        f"{part} at {name!r}": v
        for name, alone in by_site.items()
        for part, v in vars(alone).items()
    }
    return replace(
        found, **vars(joint), by_site=by_site, notes=(*found.notes, *note_on_untold(rows))
    )


def decompose_part(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None,
    loss: object,
    draws: int,
    *,
    sites: Collection[str] | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Decomposition:
    """As `decompose`, of data that are only part of what counts: all errors are kept.

    Raises:
        TypeError: as `decompose`.
        ValueError: as `decompose`.
    """
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"draws has to be an int, but got {type(draws).__name__}")
    if draws < 2:
        raise ValueError(f"draws has to be at least 2, but got {draws}")
    check_sites(sites)
    family = family_of(loss)
    batches = streamed(inputs, targets, model, loss)
    if batches is None:
        check_inputs(inputs)
    source, used_seed = private_generator(generator, seed, device_of(model, inputs))
    given = _Given(model, family, loss, draws, sites, source)
    if batches is None:
        return given.decomposed(inputs, targets, used_seed)
    return _pooled([given.decomposed(x, y, used_seed) for x, y in batches])


def _pooled(found: Sequence[Decomposition]) -> Decomposition:
    """Of all batches together; each drew its own masks, so their errors are independent."""
    weights = shares([part.divisor for part in found])
    first = found[0]
    joint = pooled_parts(weights, found)
    divisors = [part.divisor for part in found if part.divisor is not None]
    return Decomposition(
        pooled(weights, [part.base for part in found]),
        joint.gap,
        joint.spread,
        joint.shift,
        pooled_by_site(weights, [part.by_site for part in found]),
        first.draws,
        first.seed,
        merged(part.unmeasured for part in found),
        sum(divisors) if divisors else None,
        first.notes,
    )


def pooled_parts(weights: Sequence[float], parts: Sequence[Parts | Decomposition]) -> Parts:
    """Parts of several batches, each with masks of its own, put together."""
    return Parts(
        pooled(weights, [part.gap for part in parts]),
        pooled(weights, [part.spread for part in parts]),
        pooled(weights, [part.shift for part in parts]),
    )


def pooled_by_site(
    weights: Sequence[float], parts: Sequence[Mapping[str, Parts]]
) -> dict[str, Parts]:
    """Every site that a batch met; one that a batch did not meet costs nothing there."""
    met: dict[str, list[tuple[float, Parts]]] = {}
    for weight, of_batch in zip(weights, parts, strict=True):
        for name, alone in of_batch.items():
            met.setdefault(name, []).append((weight, alone))
    return {
        name: pooled_parts([w for w, _ in some], [alone for _, alone in some])
        for name, some in met.items()
    }


@dataclass(frozen=True)
class _Given:
    """What is asked of every batch."""

    model: nn.Module
    family: Family
    loss: Any
    draws: int
    sites: Collection[str] | None
    source: torch.Generator

    def decomposed(self, inputs: Any, targets: Tensor | None, seed: int) -> Decomposition:
        """One batch.

        Raises:
            ValueError: if it has no targets, or a site asked for is not met.
        """
        model, family = self.model, self.family
        if targets is None:
            raise ValueError("targets has to be given: gap and shift compare with them")
        found = find_sites(model, inputs)
        lawful = [site.name for site in found if site.law is not None]
        # A site at rate zero keeps everything; drawing its masks would only take time.
        idle = {s.name for s in found if s.law is not None and getattr(s.law, "p", None) == 0}
        alone = lawful if self.sites is None else list(self.sites)
        for name in alone:
            if name not in lawful:
                raise ValueError(f"sites holds {name!r}, which is not a site with a law: {lawful}")
        with torch.no_grad(), masks_off(model):
            outputs = predictions(model, inputs)
        check_outputs(model, outputs)
        family.check_targets(outputs, targets)
        scorer = _Scorer(family, self.loss, outputs, targets)

        def measure(names: Collection[str]) -> Parts:
            if idle.issuperset(names):
                return Parts(exact(0.0), exact(0.0), exact(0.0))

            def drawn(look: Callable[[Tensor], None]) -> None:
                with torch.no_grad(), masks_replaced(model, draw_masks(self.source, names)):
                    for _ in range(self.draws):
                        look(predictions(model, inputs))

            return scorer.parts(drawn, self.draws, self.source)

        joint = measure(lawful)
        by_site = {name: joint if lawful == [name] else measure((name,)) for name in alone}
        return Decomposition(
            exact(scorer.base),
            joint.gap,
            joint.spread,
            joint.shift,
            by_site,
            self.draws,
            seed,
            {site.name: site.reason or "" for site in found if site.law is None},
            family.divisor(outputs, targets),
            () if family.splits else (UNSPLIT,),
        )


class _Scorer:
    """Turns outputs under K masks into gap, spread and shift."""

    def __init__(self, family: Family, loss: Any, outputs: Tensor, targets: Tensor) -> None:
        # In double: gaps are small differences of large sums. Class weights have to follow.
        self.family, self.loss = family, copy.deepcopy(loss).double()
        self.targets = targets.double() if targets.is_floating_point() else targets
        self.outputs = outputs
        self.weights = family.weights(outputs, targets).double()  # (n, T)
        self.base = self.loss_at(outputs)

    def loss_at(self, outputs: Tensor) -> float:
        return float(self.loss(outputs.double(), self.targets))

    def partition_at(self, outputs: Tensor) -> float:
        """Σ w A(f)."""
        f = self.family.natural(outputs.double())
        return float((self.weights * self.family.log_partition(f)).sum())

    def at(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """F and ∇A(f): (n, T, C) each."""
        f = self.family.natural(outputs.double())
        return f, self.family.mean(f)

    def parts(
        self, drawn: Callable[[Callable[[Tensor], None]], None], draws: int, source: torch.Generator
    ) -> Parts:
        """From outputs under masks: `drawn(look)` shows `look` those under K masks of `source`."""
        if not self.family.splits:
            return self._unsplit(drawn)
        start = source.get_state()
        hold = draws * self.outputs.numel() <= _HELD_NUMBERS
        held: list[Tensor] = []
        found: list[tuple[float, float]] = []
        total = torch.zeros_like(self.outputs, dtype=torch.float64)

        def sum_up(f: Tensor) -> None:
            nonlocal total
            total = total + f
            found.append((self.loss_at(f), self.partition_at(f)))
            if hold:
                held.append(f)

        drawn(sum_up)
        centre = total / draws
        # The linear term −yᵀf cancels between ℓ(f̄) and the mean of ℓ(f_z), so the spread needs
        # A alone, also at the leave-one-out means.
        without: list[float] = []
        middle, slope = self.at(centre)
        products, last = list[float](), torch.zeros_like(slope)

        def leave_out(f: Tensor) -> None:
            nonlocal last
            mean = (total - f) / (draws - 1)
            without.append(self.partition_at(mean))
            # Without a draw the mean moves by 1/(K − 1) of what that draw is away from it.
            f_mean, its_slope = self.at(mean)
            step = self.weights.unsqueeze(-1) * (f_mean - middle)
            products.append((draws - 1) ** 2 * float((step * last).sum()))
            last = its_slope - slope

        if hold:
            for f in held:
                leave_out(f)
        else:
            source.set_state(start)
            drawn(leave_out)
        losses, partitions = torch.tensor(found, dtype=torch.float64).unbind(1)
        left_out = torch.tensor(without, dtype=torch.float64)
        neighbours = torch.tensor(products[1:], dtype=torch.float64)
        return self._parts(losses, partitions, left_out, centre, neighbours)

    def _unsplit(self, drawn: Callable[[Callable[[Tensor], None]], None]) -> Parts:
        """The gap alone, which needs no A."""
        losses: list[float] = []
        drawn(lambda f: losses.append(self.loss_at(f)))
        unknown = Estimate(math.nan, math.nan, len(losses))
        gaps = torch.tensor(losses, dtype=torch.float64) - self.base
        return Parts(skewed_mean(gaps), unknown, unknown)

    def _parts(
        self,
        losses: Tensor,
        partitions: Tensor,
        left_out: Tensor,
        centre: Tensor,
        neighbours: Tensor,
    ) -> Parts:
        draws = len(losses)
        others = (draws * partitions.mean() - partitions) / (draws - 1)
        plug_in = float(partitions.mean()) - self.partition_at(centre)
        spread = jackknife(plug_in, others - left_out, pairs=Pairs(neighbours, draws, -0.5))
        gap = skewed_mean(losses - self.base)
        mean_losses = (draws * losses.mean() - losses) / (draws - 1)
        shift = jackknife(
            float(losses.mean() - partitions.mean()) + self.partition_at(centre) - self.base,
            mean_losses - others + left_out - self.base,
            pairs=Pairs(neighbours, draws, 0.5),
        )
        return Parts(gap, spread, shift)
