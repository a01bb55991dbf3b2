"""What dropout costs without drawing a mask: the second-order and the Gaussian spread."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from droplens.calling import check_inputs, check_outputs
from droplens.gates import Gate, Opened, open_gates
from droplens.losses import POINTS, Family
from droplens.losses import family as family_of
from droplens.penalties._layout import (
    check_law_along,
    example_axis,
    output_covariance,
    quadratic_total,
)
from droplens.products import pull_back, term_jacobian

# Examples × points × classes evaluated at once: what stays in a core's cache.
_CACHED_NUMBERS = 1 << 17

Method = Literal["gaussian", "second_order"]


@dataclass(frozen=True)
class Penalty:
    """What dropout adds to the loss: the spread, in units of the loss.

    Args:
        total: differentiable scalar; all sites together.
        by_site: scalar per site, that site alone. Second-order values add up to the total;
            Gaussian values need not.
        method: how it was computed.
        approximation: of what order the value is, in words.
        unmeasured: sites that are not counted (no law, or a mask that mixes examples), and why.
    """

    total: Tensor
    by_site: dict[str, Tensor]
    method: str
    approximation: str
    unmeasured: dict[str, str] = field(default_factory=dict)

    def __float__(self) -> float:
        return float(self.total.detach())


_ORDER = {
    "gaussian": "Gaussian output noise: exact as every unit's share of the noise becomes small",
    "second_order": "second order in the output noise: exact as the noise becomes small",
}
_EXACT = "exact in the spread: A is quadratic, so only the noise's covariance counts"


def penalty(
    model: nn.Module,
    inputs: Any,
    loss: object,
    method: Method = "gaussian",
    *,
    targets: Tensor | None = None,
    sites: Sequence[str] | None = None,
) -> Penalty:
    """The spread that dropout adds to the loss, without drawing a mask (theory §3.1).

    Second order: ½ E_x Σ_c j_cᵀ C̄ j_c with j_c = h ∘ (Jᵀ H^{1/2})_c per site. Gaussian: the
    output noise has covariance K = Σ_sites J_h C̄ J_hᵀ per example, and the spread is
    E_ε[A(f + ε) − A(f) − ∇A(f)ᵀε] with ε ~ N(0, K). For squared loss both are the same number.
    The value leaves out the shift, which vanishes where the outputs are affine in the gates.

    Args:
        model: any torch module; its sites' train-mode laws count, whatever mode it is in.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        loss: a loss object such as `nn.CrossEntropyLoss()`; units and reduction are its own.
        method: "gaussian" or "second_order".
        targets: needed only where they weigh examples (class weights, an ignore_index).
        sites: names of the sites to count; all of them if not given.

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
        raise ValueError(f"method has to be 'gaussian' or 'second_order', but got {method!r}")
    family = family_of(loss)
    check_inputs(inputs)
    opened = open_gates(model, inputs, sites)
    check_outputs(model, opened.outputs)
    _check_names(sites, opened)
    if targets is not None:
        family.check_targets(opened.outputs, targets)
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        f = family.natural(opened.outputs)
        weights = family.weights(opened.outputs, targets)  # (n, T)
        gates, axes, mixing = _laid_out(f, opened.gates)
        if sites is not None and mixing:
            raise ValueError(next(iter(mixing.values())))
        if method == "second_order" or family.quadratic:
            by_site = _second_order(family, f, weights, gates, axes, keep)
            total = sum(by_site.values(), start=f.new_zeros(()))
        else:
            total, by_site = _gaussian(family, f, weights, gates, axes, keep)
    if not keep:
        total, by_site = total.detach(), {k: v.detach() for k, v in by_site.items()}
    order = _EXACT if family.quadratic else _ORDER[method]
    return Penalty(total, by_site, method, order, {**opened.unmeasured, **mixing})


def _laid_out(f: Tensor, gates: Sequence[Gate]) -> tuple[list[Gate], list[int], dict[str, str]]:
    """The gates whose examples can be told apart, along which axis, and why the others cannot."""
    kept, axes, mixing = [], [], {}
    for gate in gates:
        try:
            axis = example_axis(f, gate)
            check_law_along(gate, axis)
        except ValueError as error:
            mixing[gate.name] = str(error)
            continue
        kept.append(gate)
        axes.append(axis)
    return kept, axes, mixing


def _check_names(names: Sequence[str] | None, opened: Opened) -> None:
    if names is None:
        return
    known = {gate.name for gate in opened.gates}
    for name in names:
        if name in opened.unmeasured:
            raise ValueError(f"site {name!r} has no law: {opened.unmeasured[name]}")
        if name not in known:
            raise ValueError(
                f"sites holds {name!r}, which the forward pass does not meet; "
                "droplens.sites(model, inputs) lists the names"
            )


def _second_order(
    family: Family,
    f: Tensor,
    weights: Tensor,
    gates: Sequence[Gate],
    axes: Sequence[int],
    keep: bool,
) -> dict[str, Tensor]:
    """½ Σ_c j_cᵀ C̄ j_c per site, one backward pass per term and column of H^{1/2}."""
    values = {gate.name: f.new_zeros(()) for gate in gates}
    if not gates:
        return values
    root = family.root(f) * weights.sqrt()[..., None, None]  # (n, T, C, C)
    tensors = [gate.tensor for gate in gates]
    for term in range(f.shape[1]):
        for c in range(f.shape[2]):
            cotangent = torch.zeros_like(f)
            cotangent[:, term] = root[:, term, :, c]
            scores = pull_back(f, cotangent, tensors, create_graph=keep)
            for gate, axis, score in zip(gates, axes, scores, strict=True):
                value = 0.5 * quadratic_total(gate, axis, score)
                values[gate.name] = values[gate.name] + (value if keep else value.detach())
    return values


def _gaussian(
    family: Family,
    f: Tensor,
    weights: Tensor,
    gates: Sequence[Gate],
    axes: Sequence[int],
    keep: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The Gaussian spread of all sites together and of each alone."""
    total = f.new_zeros(())
    values = {gate.name: f.new_zeros(()) for gate in gates}
    if not gates:
        return total, values
    n, n_terms, _ = f.shape
    tensors = [gate.tensor for gate in gates]
    contrasts = family.contrasts(f)
    for term in range(n_terms):
        jacobians = term_jacobian(f, term, contrasts, tensors, create_graph=keep)
        here = f[:, term] if keep else f[:, term].detach()
        weight = weights[:, term]
        noises = [
            output_covariance(gate, axis, scores, n)
            for gate, axis, scores in zip(gates, axes, jacobians, strict=True)
        ]
        for gate, noise in zip(gates, noises, strict=True):
            spread = (weight * gaussian_spread(family, here, noise)).sum()
            values[gate.name] = values[gate.name] + spread
        if len(gates) > 1:
            joint = torch.stack(noises).sum(0)
            total = total + (weight * gaussian_spread(family, here, joint)).sum()
    return (total if len(gates) > 1 else values[gates[0].name]), values


def gaussian_spread(family: Family, f: Tensor, covariance: Tensor) -> Tensor:
    """Spread of one term under output noise of `covariance` (n, m, m) at f (n, C): (n)."""
    rows = max(1, _CACHED_NUMBERS // (POINTS * f.shape[-1]))
    parts = zip(f.split(rows), covariance.split(rows), strict=True)
    return torch.cat([family.noise_spread(here, noise) for here, noise in parts])
