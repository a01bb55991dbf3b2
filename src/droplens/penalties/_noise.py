"""The network opened at its gates, and the output noise that masks there would make."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens._memory import keep_freed_memory
from droplens.calling import check_inputs, check_outputs
from droplens.gates import Gate, Opened, open_gates
from droplens.losses import Family
from droplens.penalties._layout import check_law_along, covariance_of, example_axis
from droplens.products import term_jacobian

# Examples looked at to count how many units share a site's noise.
_COUNTED_EXAMPLES = 64


@dataclass(frozen=True)
class Network:
    """A network without dropout, ready to be differentiated in its gates.

    Args:
        family: of the loss.
        f: natural parameters (n, T, C), with a graph to the gates.
        weights: of the loss's terms, (n, T).
        gates: open gates whose examples can be told apart.
        axes: along which axis of each gate the examples lie.
        unmeasured: the other sites, and why.
    """

    family: Family
    f: Tensor
    weights: Tensor
    gates: tuple[Gate, ...]
    axes: tuple[int, ...]
    unmeasured: dict[str, str]

    @property
    def tensors(self) -> list[Tensor]:
        """The gates to differentiate in."""
        return [gate.tensor for gate in self.gates]


def open_network(
    model: nn.Module,
    inputs: Any,
    family: Family,
    targets: Tensor | None,
    names: Sequence[str] | None,
) -> Network:
    """Run `model` once with its gates open; gradients have to be recorded by the caller.

    Raises:
        ValueError: if the inputs are bad, a name is not met, or its mask mixes examples.
    """
    keep_freed_memory()
    check_inputs(inputs)
    opened = open_gates(model, inputs, names)
    check_outputs(model, opened.outputs)
    _check_names(names, opened)
    if targets is not None:
        family.check_targets(opened.outputs, targets)
    f = family.natural(opened.outputs)
    weights = family.weights(opened.outputs, targets)
    gates, axes, mixing = _laid_out(f, opened.gates)
    if names is not None and mixing:
        raise ValueError(next(iter(mixing.values())))
    return Network(family, f, weights, gates, axes, {**opened.unmeasured, **mixing})


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


def _laid_out(
    f: Tensor, gates: Sequence[Gate]
) -> tuple[tuple[Gate, ...], tuple[int, ...], dict[str, str]]:
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
    return tuple(kept), tuple(axes), mixing


@dataclass(frozen=True)
class Term:
    """One of the T terms of every example: its natural parameters and the gates' Jacobians.

    `rows` holds a tensor (m, n_rows, *units) per gate; m counts the contrasts of f (n, C).
    """

    f: Tensor
    weight: Tensor
    rows: tuple[Tensor, ...]


def terms(network: Network, create_graph: bool) -> Iterator[Term]:
    """Every term with its Jacobians, one backward pass a contrast, one term in memory at a time.

    Yields:
        The terms in order.
    """
    f = network.f
    contrasts = network.family.contrasts(f)
    for term in range(f.shape[1] if network.gates else 0):
        scores = term_jacobian(f, term, contrasts, network.tensors, create_graph)
        here = f[:, term] if create_graph else f[:, term].detach()
        rows = tuple(
            score.movedim(axis + 1, 1) for axis, score in zip(network.axes, scores, strict=True)
        )
        yield Term(here, network.weights[:, term], rows)


def participation(gate: Gate, rows: Tensor, n: int) -> float:
    """How many equal coins would make the site's output noise, averaged over examples.

    (Σt)²/Σt² of t_a = Σ_c j_ca² over an example's coins, examples weighted by their noise; `rows`
    as in `Term`. The Gaussian value leans on many small contributions, so a small number is a
    warning.
    """
    step = max(1, n // _COUNTED_EXAMPLES)
    scores = rows.detach().unflatten(1, (n, -1))[:, ::step]  # (m, examples, rows of one, *units)
    folded = covariance_of(gate, scores[0, 0]).fold(scores)
    shares = folded.square().sum(0).flatten(1)  # (examples, coins of an example)
    whole = shares.sum(1)
    if not bool((whole > 0).any()):
        return 0.0
    counts = whole.square() / shares.square().sum(1).clamp_min(torch.finfo(shares.dtype).tiny)
    return float((whole * counts).sum() / whole.sum())
