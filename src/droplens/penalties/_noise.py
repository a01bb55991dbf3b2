"""The network opened at its gates, and the output noise that masks there would make."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from droplens._memory import keep_freed_memory
from droplens.batches import n_examples, rows_of
from droplens.calling import ForwardError, agree, check_inputs, check_outputs, predictions
from droplens.gates import Opened, draw_masks, masks_replaced, open_gates
from droplens.losses import Family
from droplens.penalties._layout import layouts, leads_back
from droplens.penalties._sources import Source, Units, source_of, tensors_of
from droplens.products import pull_back, term_jacobian

# Numbers of Jacobians held at once where no graph is kept: a few of a training step's activations.
_HELD_NUMBERS = 7 << 20

# Tensors like a site's that a pass makes: gradients, scores, what these are multiplied into.
_AT_ONCE = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """A network without dropout, ready to be differentiated in its gates.

    Args:
        family: of the loss.
        f: natural parameters (n, T, C), with a graph to the gates.
        weights: of the loss's terms, (n, T).
        sources: the sites' coins, where examples can be told apart.
        unmeasured: the other sites, and why.
        divisor: what the loss's mean divides by; None for a sum.
        notes: what a reader of the numbers should know.
    """

    family: Family
    f: Tensor
    weights: Tensor
    sources: tuple[Source, ...]
    unmeasured: dict[str, str]
    divisor: float | None
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """What to differentiate in."""
        return [tensor for source in self.sources for tensor in source.tensors]

    def room(self, m: int) -> list[Tensor]:
        """For what is kept of m passes."""
        return [tensor for source in self.sources for tensor in source.room(m)]

    def scores(self, gradients: Sequence[Tensor], into: Sequence[Tensor] | None) -> list[Tensor]:
        """What the sources keep of one backward pass to `tensors`, tensor by tensor."""
        places = self.by_source(into or [None] * len(gradients))
        pairs = zip(self.by_source(gradients), places, strict=True)
        return [score for (source, own), (_, to) in pairs for score in source.scores(own, to)]

    def by_source(self, scores: Sequence[T]) -> Iterator[tuple[Source, Sequence[T]]]:
        """What belongs to `tensors`, handed to the sources they came from.

        Yields:
            Each source with its own.
        """
        start = 0
        for source in self.sources:
            end = start + len(source.tensors)
            yield source, scores[start:end]
            start = end


def open_network(
    model: nn.Module,
    inputs: Any,
    family: Family,
    targets: Tensor | None,
    names: Sequence[str] | None,
    keep: bool = False,
) -> Network:
    """Run `model` once with its gates open; gradients have to be recorded by the caller.

    Args:
        model: any torch module.
        inputs: as the model takes them.
        family: of the loss.
        targets: only where they weigh examples.
        names: of the sites to open.
        keep: whether what comes out will be differentiated again.

    Raises:
        ValueError: if the inputs are bad, a name is not met, its mask mixes examples, or a norm
            layer does.
    """
    keep_freed_memory()
    check_inputs(inputs)
    outputs, network = _unweighed(model, inputs, family, names, keep)
    if targets is not None:
        family.check_targets(outputs, targets)
    divisor = family.divisor(outputs.detach(), targets)
    return replace(network, weights=family.weights(outputs, targets), divisor=divisor)


def _unweighed(
    model: nn.Module, inputs: Any, family: Family, names: Sequence[str] | None, keep: bool
) -> tuple[Tensor, Network]:
    """The outputs, and the network as if all terms counted alike.

    Raises:
        ValueError: as `open_network`, but for inputs and targets.
    """
    _check_norms(model)
    opened = _without_cut(model, inputs, open_gates(model, inputs, names))
    check_outputs(model, opened.outputs)
    _check_names(names, opened)
    f = family.natural(opened.outputs)
    sources, mixing = _sources(f, opened, keep)
    if names is not None and mixing:
        raise ValueError(next(iter(mixing.values())))
    unmeasured = {**opened.unmeasured, **mixing}
    weights = f.new_ones(f.shape[:2])
    network = Network(family, f, weights, sources, unmeasured, None, _notes(model, sources))
    return opened.outputs, network


_RUNNING = (
    "norm layers used their running statistics, as in eval mode, though they are in train mode"
)
_MATHS_KERNEL = (
    "attention ran on torch's maths kernel, because the fused ones have no double backward"
)


def _notes(model: nn.Module, sources: Sequence[Source]) -> tuple[str, ...]:
    """Kernels and statistics that were switched."""
    attention = any(source.name.split("#")[0].endswith("attention") for source in sources)
    batch = any(isinstance(m, _BatchNorm) and m.training for m in model.modules())
    return (_RUNNING,) * batch + (_MATHS_KERNEL,) * attention


def _check_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"the model's {name or 'whole'!r} is a {type(module).__name__} without running "
                "statistics, which mixes examples also in eval mode, so they have no noise of "
                "their own; use track_running_stats=True, or method='masks'"
            )


def opened_in_parts(
    model: nn.Module,
    inputs: Any,
    family: Family,
    targets: Tensor | None,
    names: Sequence[str] | None,
    keep: bool,
    stacked: bool = True,
) -> Iterator[Network]:
    """The network opened on all examples, or part after part where its Jacobians take much room.

    Examples do not mix, so parts add up; whether they do not is seen from the outputs, which have
    to be those of the whole. A graph that will be differentiated again is kept whole.

    Args:
        model: any torch module.
        inputs: as the model takes them.
        family: of the loss.
        targets: only where they weigh examples.
        names: of the sites to open.
        keep: whether what comes out will be differentiated again.
        stacked: whether the scores of all contrasts live together, not one pass's at a time.

    Yields:
        One network, or several that share the weights and the divisor of the whole.

    Raises:
        ValueError: if outputs of examples depend on the examples beside them.
    """
    whole = open_network(model, inputs, family, targets, names, keep)
    n, numbers = len(whole.f), _AT_ONCE * sum(t.numel() for t in whole.tensors)
    if stacked:
        kept = sum(math.prod(shape) for source in whole.sources for shape in source.shapes)
        numbers = max(numbers, len(family.contrasts(whole.f[:1])) * kept)
    # Every part is opened anew, which takes the longer the more sites there are.
    limit = _HELD_NUMBERS * max(1, len(whole.sources) // 4)
    if keep or numbers <= limit or n_examples(inputs) != n:
        yield whole
        return
    f, weights, divisor = whole.f.detach(), whole.weights.detach(), whole.divisor
    del whole  # its graph, before those of the parts
    size = math.ceil(n / math.ceil(numbers / limit))  # parts alike
    for start in range(0, n, size):
        rows = slice(start, start + size)
        try:
            _, part = _unweighed(model, rows_of(inputs, rows), family, names, keep)
        except (ForwardError, ValueError):
            break  # a forward that knows this many examples only
        if not agree(part.f, f[rows]):
            break
        yield replace(part, weights=weights[rows], divisor=divisor)
    else:
        return
    if start:
        raise ValueError(
            "the outputs of some examples change with the examples beside them, so their noise "
            "cannot be told apart; look for an operation across the batch"
        )
    yield open_network(model, inputs, family, targets, names)


def _check_names(names: Sequence[str] | None, opened: Opened) -> None:
    if names is None:
        return
    known = {gate.name for gate in opened.gates}
    for name in names:
        if name in opened.unmeasured:
            raise ValueError(f"site {name!r} has no penalty: {opened.unmeasured[name]}")
        if name not in known:
            raise ValueError(
                f"sites holds {name!r}, which the forward pass does not meet; "
                "droplens.sites(model, inputs) lists the names"
            )


def _sources(f: Tensor, opened: Opened, keep: bool) -> tuple[tuple[Source, ...], dict[str, str]]:
    """The sites whose examples can be told apart, and why the others' cannot."""
    tensors = [tensors_of(gate) for gate in opened.gates]
    flat = [tensor for some in tensors for tensor in some]
    found = iter(layouts(f, flat, opened.reordered))
    kept, mixing = [], {}
    for gate, some in zip(opened.gates, tensors, strict=True):
        own = [next(found) for _ in some]
        try:
            kept.append(source_of(gate, own, f, keep))
        except ValueError as error:
            mixing[gate.name] = str(error)
    return tuple(kept), mixing


_CUT = (
    "no derivative of the outputs leads back to it, though they depend on it: the forward cuts the "
    "graph behind it (detach, numpy, argmax, ...); droplens.decompose draws its masks all the same"
)


def _without_cut(model: nn.Module, inputs: Any, opened: Opened) -> Opened:
    """The gates that derivatives can reach; the others that matter are not measured."""
    cut: dict[str, str] = {}
    tensors = [tensors_of(gate) for gate in opened.gates]
    linked = iter(leads_back(opened.outputs, [tensor for some in tensors for tensor in some]))
    for gate, some in zip(opened.gates, tensors, strict=True):
        reached = [next(linked) for _ in some]
        if any(reached) or not reached:  # a weight may be read in a way not known
            continue
        source = torch.Generator(device=gate.units.device).manual_seed(0)
        with torch.no_grad(), masks_replaced(model, draw_masks(source, [gate.name])):
            moved = predictions(model, inputs)
        if not torch.equal(moved, opened.outputs):
            cut[gate.name] = _CUT
    if not cut:
        return opened
    gates = tuple(gate for gate in opened.gates if gate.name not in cut)
    return replace(opened, gates=gates, unmeasured={**opened.unmeasured, **cut})


@dataclass(frozen=True)
class Term:
    """One of the T terms of every example: its natural parameters and the gates' Jacobians.

    `scores` holds what the sources keep of each pass, per tensor of the network: (m, n, …); m
    counts the contrasts of f (n, C).
    """

    f: Tensor
    weight: Tensor
    scores: Sequence[Tensor]


def terms(network: Network, create_graph: bool) -> Iterator[Term]:
    """Every term with its Jacobians, one backward pass a contrast, one term in memory at a time.

    Yields:
        The terms in order.
    """
    f = network.f
    contrasts = network.family.contrasts(f)
    for term in range(f.shape[1] if network.sources else 0):
        scores: Sequence[Tensor]
        if create_graph:
            scores = term_jacobian(f, term, contrasts, network.tensors, network.scores)
        else:
            scores = _jacobian(network, term, contrasts)
        here = f[:, term] if create_graph else f[:, term].detach()
        yield Term(here, network.weights[:, term], scores)


def _jacobian(network: Network, term: int, contrasts: Tensor) -> list[Tensor]:
    """Scores of one term without a graph.

    Where the outputs are linear in the units of a site alone, their gradient is one for all
    examples, and the passes begin there.
    """
    f, stacks = network.f, network.room(len(contrasts))
    found = (source for source in network.sources if isinstance(source, Units) and source.last)
    last = next(found, None)
    if last is None or last.last is None:
        term_jacobian(f, term, contrasts, network.tensors, network.scores, stacks)
        return stacks
    slopes = contrasts @ last.last.slope
    before = replace(network, sources=tuple(s for s in network.sources if s is not last))
    rest: list[Tensor] = []
    for source, own in network.by_source(stacks):
        if source is last:
            last.fill(slopes, own[0])
        else:
            rest += own
    if not before.sources:
        return stacks
    for slope, *stack in zip(slopes, *rest, strict=True):
        gradients = pull_back(last.last.edge, slope.expand_as(last.tensors[0]), before.tensors)
        before.scores(gradients, stack)
        del gradients  # so that the next pass writes where this one did
    return stacks
