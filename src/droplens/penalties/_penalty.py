"""What dropout costs without drawing a mask: three evaluations of the spread."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn

from droplens.calling import device_of
from droplens.losses import POINTS, Family
from droplens.losses import family as family_of
from droplens.penalties._noise import Network, Term, open_network, opened_in_parts, terms
from droplens.penalties._pooling import Group, by_name, merged, shares, streamed, weighted
from droplens.products import pull_back
from droplens.randomness import private_generator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Method = Literal["gaussian", "second_order", "sampled"]

# Examples × points × classes evaluated at once: what stays in a core's cache.
_CACHED_NUMBERS = 1 << 19
# Rows of scores that a second-order value holds.
_AT_ONCE = 4
# Fewer equal coins than this do not make Gaussian noise: 10 strong units erred by up to 70%.
FEW_UNITS = 12.0


@dataclass(frozen=True)
class Penalty:
    """What dropout adds to the loss: the spread, in units of the loss.

    Args:
        total: differentiable scalar; all sites together.
        by_site: scalar per site, that site alone. Second-order values add up to the total;
            Gaussian values need not.
        per_example: the total's parts, (n), weighted as the loss weighs examples.
        method: how it was computed.
        approximation: of what order the value is, in words.
        participation: by site, how many equal coins would make the output noise of an example;
            for the Gaussian value, which leans on many.
        standard_error: of the total over probes, for "sampled"; 0 otherwise.
        seed: repeats the probes; None if none were drawn.
        notes: what a reader of the number should know.
        unmeasured: sites that are not counted (no law, or a mask that mixes examples), and why.
        divisor: what the loss's mean divides by; None for a sum.
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

    def __float__(self) -> float:
        return float(self.total.detach())

    def all_reduce(self, group: "ProcessGroup | None" = None) -> "Penalty":
        """The penalty over the data of all processes, the same on each, without a graph.

        Every process computes its own part and calls this. `per_example` stays that of the
        process's own examples, weighed as the whole weighs them.

        Args:
            group: of torch.distributed; the default group if not given.

        Raises:
            RuntimeError: if torch.distributed has not been initialised.
            ValueError: if the processes met different sites.
        """
        processes = Group(self.divisor, [self.method, *self.by_site], group)
        share = processes.share
        mine = [self.total, *self.by_site.values()]
        counts = list(self.participation)
        packed = processes.summed(
            [float(value.detach()) * share for value in mine]
            + [share * self.participation[name] for name in counts]
            + [(share * self.standard_error) ** 2, share]
        )
        total, *sites = (self.total.new_tensor(value) for value in packed[: len(mine)])
        return replace(
            self,
            total=total.detach(),
            by_site=dict(zip(self.by_site, sites, strict=True)),
            per_example=self.per_example.detach() * share,
            participation={
                name: packed[len(mine) + k] / packed[-1] for k, name in enumerate(counts)
            },
            standard_error=packed[-2] ** 0.5,
            divisor=processes.divisor,
        )


_ORDER = {
    "gaussian": "Gaussian output noise: exact as every unit's share of the noise becomes small",
    "second_order": "second order in the output noise: exact as the noise becomes small",
    "sampled": "second order in the output noise, by random probes: unbiased for it",
}
_EXACT = "exact in the spread: A is quadratic, so only the noise's covariance counts"
_MATHS_KERNEL = (
    "attention ran on torch's maths kernel, because the fused ones have no double backward"
)


def penalty(  # noqa: PLR0913  # the last five are keywords with defaults
    model: nn.Module,
    inputs: Any,
    loss: object,
    method: Method = "gaussian",
    *,
    targets: Tensor | None = None,
    sites: Sequence[str] | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Penalty:
    """The spread that dropout adds to the loss, without drawing a mask (theory §3.1).

    Second order: ½ E_x Σ_c j_cᵀ C̄ j_c with j_c = h ∘ (Jᵀ H^{1/2})_c per site. Sampled: the same
    with one backward pass, ½ E_x sᵀ C̄ s with s = h ∘ Jᵀ H^{1/2} ξ and random signs ξ, which is
    unbiased for it and for its gradient (a drawn label ŷ in place of ξ, as in P5, is unbiased for
    the value alone). Gaussian: the output noise has covariance K = Σ_sites J_h C̄ J_hᵀ per
    example, and the spread is E_ε[A(f + ε) − A(f) − ∇A(f)ᵀε] with ε ~ N(0, K). For squared loss
    the first and the last are the same number. The value leaves out the shift, which vanishes
    where the outputs are affine in the gates.

    Args:
        model: any torch module; its sites' train-mode laws count, whatever mode it is in.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or a loader or
            data set, streamed: no batch and no graph is held, so the result carries no gradient.
        loss: a loss object such as `nn.CrossEntropyLoss()`; units and reduction are its own.
        method: "gaussian", "second_order" or "sampled".
        targets: needed only where they weigh examples (class weights, an ignore_index); a loader
            brings its own.
        sites: names of the sites to count; all of them if not given.
        draws: probes, for "sampled"; one backward pass each. With one, the standard error is an
            upper bound.
        generator: where the probes come from; a private one seeded by the system if not given.
        seed: in place of a generator.

    Returns:
        `.total` (a graph is kept unless gradients are off) and `.by_site`.

    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight)
    >>> round(float(penalty(net, torch.tensor([[1.0, 2.0]]), nn.MSELoss())), 4)
    5.0

    Raises:
        TypeError: if the loss is not known or the model returns no tensor.
        ValueError: for an unknown method or site, p = 1, bad inputs, or missing targets.
    """
    if method not in _ORDER:
        known = ", ".join(repr(name) for name in _ORDER)
        raise ValueError(f"method has to be one of {known}, but got {method!r}")
    if not draws >= 1:
        raise ValueError(f"draws has to be at least 1, but got {draws}")
    asked = _Asked(model, family_of(loss), method, sites, draws)
    source, used_seed = None, None
    if method == "sampled":
        source, used_seed = private_generator(generator, seed, device_of(model, inputs))
    batches = streamed(inputs, targets, model)
    if batches is None:
        return asked.priced(inputs, targets, torch.is_grad_enabled(), source, used_seed)
    found = []
    for x, y in batches:
        part = asked.priced(x, y, False, source, used_seed)
        # Values by site are computed at once, or the noise of every example would be held.
        found.append(replace(part, by_site=dict(part.by_site)))
    return _pooled(found)


@dataclass(frozen=True)
class _Asked:
    """What is asked of every batch."""

    model: nn.Module
    family: Family
    method: Method
    sites: Sequence[str] | None
    draws: int

    def priced(
        self,
        inputs: Any,
        targets: Tensor | None,
        keep: bool,
        source: torch.Generator | None,
        seed: int | None,
    ) -> Penalty:
        """The penalty of one batch; `keep` its graph."""
        parts = []
        with torch.enable_grad():
            for network in self._opened(inputs, targets, keep):
                error, counts = 0.0, dict[str, float]()
                by_site: Mapping[str, Tensor]
                if source is not None:
                    by_site, each, error = _sampled(network, self.draws, source, keep)
                elif self._to_second_order:
                    by_site, each = _second_order(network, keep)
                else:
                    by_site, each, counts = _gaussian(network, keep)
                parts.append(
                    Penalty(
                        each.sum() if keep else each.sum().detach(),
                        by_site,
                        each if keep else each.detach(),
                        self.method,
                        self._approximation,
                        counts,
                        error,
                        seed,
                        notes_on(network, counts),
                        network.unmeasured,
                        network.divisor,
                    )
                )
        return parts[0] if len(parts) == 1 else _together(parts)

    @property
    def _to_second_order(self) -> bool:
        return self.method == "second_order" or self.family.quadratic

    @property
    def _approximation(self) -> str:
        exact = self.family.quadratic and self.method != "sampled"
        return _EXACT if exact else _ORDER[self.method]

    def _opened(self, inputs: Any, targets: Tensor | None, keep: bool) -> Iterator[Network]:
        given = (self.model, inputs, self.family, targets, self.sites, keep)
        if self.method == "sampled":
            return iter([open_network(*given)])
        # A class at a time: its scores, and what they are multiplied into.
        return opened_in_parts(*given, _AT_ONCE if self._to_second_order else None)


def _together(parts: Sequence[Penalty]) -> Penalty:
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


def _pooled(found: Sequence[Penalty]) -> Penalty:
    """Of all batches together."""
    weights = shares([part.divisor for part in found])
    divisors = [part.divisor for part in found if part.divisor is not None]
    counted = [w / sum(weights) for w in weights]
    return replace(
        found[0],
        total=weighted(weights, [part.total for part in found]),
        by_site=by_name(weights, [part.by_site for part in found]),
        per_example=torch.cat([w * p.per_example for w, p in zip(weights, found, strict=True)]),
        participation=by_name(counted, [part.participation for part in found]),
        standard_error=math.hypot(
            *(w * part.standard_error for w, part in zip(weights, found, strict=True))
        ),
        notes=tuple(dict.fromkeys(note for part in found for note in part.notes)),
        unmeasured=merged(part.unmeasured for part in found),
        divisor=sum(divisors) if divisors else None,
    )


def notes_on(network: Network, counts: Mapping[str, float]) -> tuple[str, ...]:
    """What a reader should know: few strong units, kernels that were switched."""
    notes = [
        f"few strong units: the noise at {name!r} is that of about {count:.1f} equal coins, too "
        "few for a Gaussian; trust Monte Carlo (droplens.decompose)"
        for name, count in counts.items()
        if 0 < count < FEW_UNITS
    ]
    if any(source.name.split("#")[0].endswith("attention") for source in network.sources):
        notes.append(_MATHS_KERNEL)
    return tuple(notes)


def _nothing(network: Network) -> tuple[dict[str, Tensor], Tensor]:
    """Zeros to add to: a scalar by site, and a number per example."""
    f = network.f
    return {source.name: f.new_zeros(()) for source in network.sources}, f.new_zeros(len(f))


def _second_order(network: Network, keep: bool) -> tuple[dict[str, Tensor], Tensor]:
    """½ Σ_c j_cᵀ C̄ j_c by site and by example, a backward pass per term and column of H^{1/2}."""
    f = network.f
    by_site, total = _nothing(network)
    if not by_site:
        return by_site, total
    root = network.family.root(f) * network.weights.sqrt()[..., None, None]  # (n, T, C, C)
    for term in range(f.shape[1]):
        for c in range(f.shape[2]):
            cotangent = torch.zeros_like(f)
            cotangent[:, term] = root[:, term, :, c]
            for name, each in _half_quadratics(network, cotangent, keep).items():
                by_site[name] = by_site[name] + each.sum()
                total = total + each
    return by_site, total


def _sampled(
    network: Network, draws: int, generator: torch.Generator, keep: bool
) -> tuple[dict[str, Tensor], Tensor, float]:
    """½ sᵀ C̄ s for s pulled back from random probes, by site and example; the total's error."""
    by_site, total = _nothing(network)
    if not by_site:
        return by_site, total, 0.0
    scale = network.weights.sqrt().unsqueeze(-1)
    found = []
    for _ in range(draws):
        probe = network.family.probe(network.f, generator)
        whole = torch.zeros_like(total)
        for name, each in _half_quadratics(network, scale * probe, keep).items():
            by_site[name] = by_site[name] + each.sum() / draws
            whole = whole + each
        total = total + whole / draws
        found.append(whole.detach().double())
    drawn = torch.stack(found)  # (draws, n), independent over draws and examples
    # One draw shows no spread around its own mean; its square bounds the variance from above.
    variance = drawn.var(0) if draws > 1 else drawn[0].square()
    return by_site, total, float((variance / draws).sum().sqrt())


def _half_quadratics(network: Network, cotangent: Tensor, keep: bool) -> dict[str, Tensor]:
    """½ sᵀ C̄ s of every example (n) by site, s the cotangent pulled back to the gates."""
    scores = pull_back(network.f, cotangent, network.tensors, create_graph=keep)
    found = {}
    for source, own in network.by_source(scores):
        value = 0.5 * source.quadratics(own, len(network.f))
        found[source.name] = value if keep else value.detach()
    return found


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


def _gaussian(
    network: Network, keep: bool
) -> tuple[Mapping[str, Tensor], Tensor, dict[str, float]]:
    """The Gaussian spread of each site alone, of all together by example; units taking part."""
    family, n = network.family, len(network.f)
    _, total = _nothing(network)
    counts: dict[str, float] = {}
    found: dict[str, list[tuple[Term, Tensor]]] = {source.name: [] for source in network.sources}
    for term in terms(network, create_graph=keep):
        noises = []
        for source, scores in network.by_source(term.scores):
            noises.append(source.noise(scores, n, source.law))
            if source.name not in counts:
                counts[source.name] = source.participation(scores, n)
        kept = replace(term, scores=())  # the Jacobians are spent
        for source, noise in zip(network.sources, noises, strict=True):
            found[source.name].append((kept, noise))
        joint = torch.stack(noises).sum(0)
        total = total + term.weight * gaussian_spread(family, term.f, joint)

    def alone(name: str) -> Tensor:
        with torch.set_grad_enabled(keep):
            parts = [
                (term.weight * gaussian_spread(family, term.f, noise)).sum()
                for term, noise in found[name]
            ]
            return torch.stack(parts).sum()

    return WhenAsked({name: partial(alone, name) for name in found}), total, counts


def gaussian_spread(family: Family, f: Tensor, covariance: Tensor) -> Tensor:
    """Spread of one term under output noise of `covariance` (n, m, m) at f (n, C): (n)."""
    rows = max(1, _CACHED_NUMBERS // (POINTS * f.shape[-1]))
    parts = zip(f.split(rows), covariance.split(rows), strict=True)
    return torch.cat([family.noise_spread(here, noise) for here, noise in parts])
