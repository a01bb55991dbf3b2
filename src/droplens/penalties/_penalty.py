"""What dropout costs without drawing a mask: three evaluations of the spread."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from droplens.batches import n_examples
from droplens.calling import check_inputs, check_model, device_of
from droplens.estimates import told
from droplens.losses import POINTS, Family
from droplens.losses import family as family_of
from droplens.penalties._layout import joined
from droplens.penalties._masks import Draws, drawn_spread
from droplens.penalties._noise import Network, Term, open_network, opened_in_parts, terms
from droplens.penalties._pooling import check_sites, streamed
from droplens.penalties._result import Penalty, WhenAsked, pooled_penalty, together
from droplens.products import pull_back
from droplens.randomness import private_generator

Method = Literal["gaussian", "second_order", "sampled", "masks"]

# Masks drawn if it is not said how many, and of few examples so many that their intervals hold.
_FEWEST_MASKS, _MASKED_EXAMPLES = 16, 200
# Fewer examples than these do not make a bound out of the squares of a single probe.
_FEW_EXAMPLES = 16
_SAMPLED = ("sampled", "masks")

# Examples × points × classes evaluated at once: what stays in a core's cache.
_CACHED_NUMBERS = 1 << 19
# Fewer equal coins than this do not make Gaussian noise: 10 strong units erred by up to 70%.
FEW_UNITS = 12.0
# From this many sites on the Gaussian value has been seen off by half.
MANY_SITES = 4


_ORDER = {
    "gaussian": "Gaussian output noise: exact as every unit's share of the noise becomes small",
    "second_order": "second order in the output noise: exact as the noise becomes small",
    "sampled": "second order in the output noise, by random probes: unbiased for it",
    "masks": "Monte Carlo over masks: unbiased for the spread, up to the standard error",
}
_EXACT = "exact in the spread: A is quadratic, so only the noise's covariance counts"


def penalty(  # noqa: PLR0913  # the last five are keywords with defaults
    model: nn.Module,
    inputs: Any,
    loss: object,
    method: Method = "gaussian",
    *,
    targets: Tensor | None = None,
    sites: Sequence[str] | None = None,
    draws: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Penalty:
    """The spread that dropout adds to the loss (theory §3.1), without drawing a mask or by masks.

    Second order: ½ E_x Σ_c j_cᵀ C̄ j_c with j_c = h ∘ (Jᵀ H^{1/2})_c per site. Sampled: the same
    with one backward pass, ½ E_x sᵀ C̄ s with s = h ∘ Jᵀ H^{1/2} ξ and random signs ξ, which is
    unbiased for it and for its gradient (a drawn label ŷ in place of ξ, as in P5, is unbiased for
    the value alone). Gaussian: the output noise has covariance K = Σ_sites J_h C̄ J_hᵀ per
    example, and the spread is E_ε[A(f + ε) − A(f) − ∇A(f)ᵀε] with ε ~ N(0, K). For squared loss
    the first and the last are the same number. Its points are fixed, so that two calls agree; a
    network trained on them fits them, and `droplens.replace_dropout` turns them at every step.
    Masks: E_z A(f_z) − A(E_z f_z) itself from a few draws, without bias and with a standard error;
    where dropout works through many bent layers nothing else comes near (docs/gaussian.md). The
    value leaves out the shift, which vanishes where the outputs are affine in the gates.

    Args:
        model: any torch module; its sites' train-mode laws count, whatever mode it is in.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or a loader or
            data set, streamed: no batch and no graph is held, so the result carries no gradient.
        loss: a loss object such as `nn.CrossEntropyLoss()`; units and reduction are its own.
        method: "gaussian", "second_order", "sampled" or "masks".
        targets: needed only where they weigh examples (class weights, an ignore_index); a loader
            brings its own.
        sites: names of the sites to count; all of them if not given.
        draws: probes, for "sampled": one backward pass each, one if not given; with one, the
            standard error is an upper bound, and of fewer than 16 examples NaN. Masks, for "masks":
            one forward pass each; if not given 16, and of fewer than 13 examples as many as make
            200 masks of an example. Where a few rare masks make most of it the error is NaN.
        generator: where probes or masks come from; a private one seeded by the system if not
            given.
        seed: in place of a generator.

    Returns:
        `.total` (a graph is kept unless gradients are off) and `.by_site`.

    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight)
    >>> round(float(penalty(net, torch.tensor([[1.0, 2.0]]), nn.MSELoss())), 4)
    5.0

    Raises:
        TypeError: if the loss is not known, the model returns no tensor, or an argument is of the
            wrong type.
        ValueError: for an unknown method or site, p = 1, bad inputs, or missing targets.
    """
    if method not in _ORDER:
        known = ", ".join(repr(name) for name in _ORDER)
        raise ValueError(f"method has to be one of {known}, but got {method!r}")
    if isinstance(draws, bool) or not isinstance(draws, int | None):
        raise TypeError(f"draws has to be an int, but got {type(draws).__name__}")
    check_sites(sites)
    check_model(model)
    least = 2 if method == "masks" else 1
    if draws is not None and draws < least:
        raise ValueError(f"draws has to be at least {least}, but got {draws}")
    asked = _Asked(model, family_of(loss), method, sites, draws)
    source, used_seed = None, None
    if method in _SAMPLED:
        source, used_seed = private_generator(generator, seed, device_of(model, inputs))
    batches = streamed(inputs, targets, model, loss)
    if batches is None:
        keep = torch.is_grad_enabled()
        return asked.told(asked.priced(inputs, targets, keep, source, used_seed))
    found = []
    for x, y in batches:
        part = asked.priced(x, y, False, source, used_seed)
        # Values by site are computed at once, or the noise of every example would be held.
        found.append(replace(part, by_site=dict(part.by_site)))
    return asked.told(pooled_penalty(found))


@dataclass(frozen=True)
class _Asked:
    """What is asked of every batch."""

    model: nn.Module
    family: Family
    method: Method
    sites: Sequence[str] | None
    draws: int | None

    def told(self, found: Penalty) -> Penalty:
        """Without the errors that a single probe, or a few rare masks, do not tell."""
        if self.method == "masks":
            return replace(found, standard_error=told(found.sampled()).standard_error)
        if self.method != "sampled" or (self.draws or 1) > 1 or found.example_errors is None:
            return found
        each = found.example_errors
        found = replace(found, example_errors=torch.where(each > 0, math.nan, each))
        if len(each) >= _FEW_EXAMPLES:
            return found
        sites = {name: math.nan if error else 0.0 for name, error in found.site_errors.items()}
        return replace(
            found, standard_error=math.nan if found.standard_error else 0.0, site_errors=sites
        )

    def priced(
        self,
        inputs: Any,
        targets: Tensor | None,
        keep: bool,
        source: torch.Generator | None,
        seed: int | None,
    ) -> Penalty:
        """The penalty of one batch; `keep` its graph."""
        if source is not None and self.method == "masks":
            return self._drawn(inputs, targets, keep, source, seed)
        parts = []
        with torch.enable_grad():
            for network in self._opened(inputs, targets, keep):
                counts, site_errors = dict[str, float](), dict[str, float]()
                errors: Tensor | None = None
                by_site: Mapping[str, Tensor]
                if source is not None:
                    by_site, each, site_errors, errors = _sampled(
                        network, self.draws or 1, source, keep
                    )
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
                        0.0 if errors is None else float(errors.norm()),
                        seed,
                        notes_on(network, counts),
                        network.unmeasured,
                        network.divisor,
                        site_errors,
                        errors,
                        draws=(self.draws or 1) if source is not None else 0,
                    )
                )
        return parts[0] if len(parts) == 1 else together(parts)

    def _drawn(
        self,
        inputs: Any,
        targets: Tensor | None,
        keep: bool,
        source: torch.Generator,
        seed: int | None,
    ) -> Penalty:
        with torch.set_grad_enabled(keep):
            check_inputs(inputs)
            few = math.ceil(_MASKED_EXAMPLES / n_examples(inputs))
            draws = Draws(self.sites, self.draws or max(_FEWEST_MASKS, few), source)
            found = drawn_spread(self.model, inputs, self.family, targets, draws)
            return Penalty(
                found.per_example.sum(),
                {},
                found.per_example,
                self.method,
                _ORDER[self.method],
                standard_error=found.total.standard_error,
                seed=seed,
                unmeasured=found.unmeasured,
                divisor=found.divisor,
                example_errors=found.errors,
                variance_slope=found.total.variance_slope,
                draws=draws.count,
                skewness=found.total.skewness,
            )

    @property
    def _to_second_order(self) -> bool:
        return self.method == "second_order" or self.family.quadratic

    @property
    def _approximation(self) -> str:
        exact = self.family.quadratic and self.method not in _SAMPLED
        return _EXACT if exact else _ORDER[self.method]

    def _opened(self, inputs: Any, targets: Tensor | None, keep: bool) -> Iterator[Network]:
        given = (self.model, inputs, self.family, targets, self.sites, keep)
        if self.method == "sampled":
            return iter([open_network(*given)])
        return opened_in_parts(*given, stacked=not self._to_second_order)


def notes_on(network: Network, counts: Mapping[str, float]) -> tuple[str, ...]:
    """What a reader should know: few strong units, many sites, what was switched."""
    notes = [
        f"few strong units: the noise at {name!r} is that of about {count:.1f} equal coins, too "
        "few for a Gaussian; trust Monte Carlo (method='masks', droplens.decompose)"
        for name, count in counts.items()
        if 0 < count < FEW_UNITS
    ]
    notes += [
        f"no output moves with the units at {name!r} to first order, so they cost nothing here: "
        "the outputs do not depend on them, or by steps alone (round, sign); compare with "
        "droplens.decompose"
        for source in network.sources
        if counts.get(name := source.name) == 0 and getattr(source.law, "p", None) != 0
    ]
    if counts and len(network.sources) >= MANY_SITES:
        notes.append(
            f"{len(network.sources)} sites act through one another, which linearising leaves out; "
            "compare with method='masks' (docs/gaussian.md: off by up to half, either way)"
        )
    return (*notes, *network.notes)


def _nothing(network: Network) -> tuple[dict[str, Tensor], Tensor]:
    """Zeros to add to: a scalar by site, and a number per example."""
    f = network.f
    return {source.name: f.new_zeros(()) for source in network.sources}, f.new_zeros(len(f))


def _second_order(network: Network, keep: bool) -> tuple[dict[str, Tensor], Tensor]:
    """½ Σ_c j_cᵀ C̄ j_c by site and by example, a backward pass per term and column of H^{1/2}."""
    f = network.f if keep else network.f.detach()
    by_site, total = _nothing(network)
    if not by_site:
        return by_site, total
    root = network.family.root(f) * network.weights.sqrt()[..., None, None]  # (n, T, C, k)
    so_far: dict[str, Tensor] = {}
    for term in range(f.shape[1]):
        for column in root[:, term].unbind(-1):
            cotangent = torch.zeros_like(f)
            cotangent[:, term] = column
            scores = pull_back(network.f, cotangent, network.tensors, create_graph=keep)
            for source, own in network.by_source(scores):
                so_far[source.name] = source.add(own, so_far.get(source.name), len(f))
    for source in network.sources:
        each = 0.5 * source.added_up(so_far[source.name], len(f))
        by_site[source.name] = each.sum()
        total = total + each
    return by_site, total


def _sampled(
    network: Network, draws: int, generator: torch.Generator, keep: bool
) -> tuple[dict[str, Tensor], Tensor, dict[str, float], Tensor]:
    """½ sᵀ C̄ s for s pulled back from random probes, by site and by example, with their errors."""
    by_site, total = _nothing(network)
    if not by_site:
        return by_site, total, {}, total.detach()
    scale = network.weights.sqrt().unsqueeze(-1)
    alone: dict[str, list[Tensor]] = {name: [] for name in by_site}
    found = []
    for _ in range(draws):
        probe = network.family.probe(network.f, generator)
        whole = torch.zeros_like(total)
        for name, each in _half_quadratics(network, scale * probe, keep).items():
            by_site[name] = by_site[name] + each.sum() / draws
            alone[name].append(each.detach().double())
            whole = whole + each
        total = total + whole / draws
        found.append(whole.detach().double())
    site_errors = {name: float(_example_errors(drawn).norm()) for name, drawn in alone.items()}
    return by_site, total, site_errors, _example_errors(found)


def _example_errors(drawn: Sequence[Tensor]) -> Tensor:
    """Standard errors (n) of means over probes, independent of one another."""
    values, draws = torch.stack(list(drawn)), len(drawn)
    # One draw shows no spread around its own mean; its square bounds the variance from above.
    variance = values.var(0) if draws > 1 else values[0].square()
    return (variance / draws).sqrt()


def _half_quadratics(network: Network, cotangent: Tensor, keep: bool) -> dict[str, Tensor]:
    """½ sᵀ C̄ s of every example (n) by site, s the cotangent pulled back to the gates."""
    scores = pull_back(network.f, cotangent, network.tensors, create_graph=keep)
    found = {}
    for source, own in network.by_source(scores):
        value = 0.5 * source.quadratics(own, len(network.f))
        found[source.name] = value if keep else value.detach()
    return found


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
            noise = source.noise(scores, n, source.law)
            noises.append(noise.to(term.f.dtype))  # a site may run in double where outputs do not
            if source.name not in counts:
                # Where nothing is dropped (p = 0) no coin takes part, however large the scores.
                alive = bool(noises[-1].detach().any())
                counts[source.name] = source.participation(scores, n) if alive else 0.0
        kept = replace(term, scores=())  # the Jacobians are spent
        for source, noise in zip(network.sources, noises, strict=True):
            found[source.name].append((kept, noise))
        joint = reduce(torch.add, noises)
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
    spread = joined([family.noise_spread(here, noise) for here, noise in parts])
    # Without noise the rules leave their rounding behind.
    noisy = covariance.detach().diagonal(dim1=-2, dim2=-1).any(-1)
    return torch.where(noisy, spread, 0.0)
