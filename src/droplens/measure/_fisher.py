"""Fisher information of the weights: trace and diagonal (theory §4; P3, P11)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from droplens.batches import Batch, as_batches, rows_of
from droplens.calling import check_outputs, predictions
from droplens.estimates import Estimate, exact, mean_estimate
from droplens.gates import masks_off
from droplens.losses import Family, family
from droplens.measure._checks import trainable
from droplens.measure._layers import (
    Use,
    Uses,
    example_gradients,
    pull_to_edges,
    settle_axes,
    watched,
)
from droplens.measure._risk import Loss
from droplens.products import pull_back
from droplens.randomness import private_generator

Method = Literal["exact", "sampled", "empirical"]

LAYER, AUTOGRAD = "layer by layer", "example by example"


@dataclass(frozen=True)
class Fisher:
    """Diagonal of F = Σ wₜ Jₜᵀ Hₜ Jₜ over the loss's terms, in its units, and its trace.

    Args:
        trace: with a standard error over drawn labels for `"sampled"`.
        diagonal: by parameter, of its shape, float64.
        standard_error: of the diagonal, by parameter; None unless `"sampled"` (0 then).
        method: how the labels were treated; `"empirical"` is not the Fisher information.
        how: by parameter, "layer by layer" or "example by example" (slower, same number).
        masks: "off", dropout was the identity.
        seed: repeats the drawn labels; None if none were drawn.
    """

    trace: Estimate
    diagonal: Mapping[str, Tensor]
    standard_error: Mapping[str, Tensor] | None
    method: Method
    how: Mapping[str, str]
    masks: str
    seed: int | None


def fisher(
    model: nn.Module,
    inputs: Any,
    loss: Any,
    method: Method = "exact",
    *,
    targets: Tensor | None = None,
    draws: int = 10,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Fisher:
    """Trace and diagonal of the Fisher information (= Gauss–Newton) matrix (theory §4).

    F = Σ_terms w·Jᵀ H J, J the Jacobian of a term's natural parameters in the weights, H the
    Hessian of its log-partition, w its weight in the loss: F is the Hessian of the loss where the
    network is linear in its weights. Dropout is the identity and norm layers are in eval. Data
    are read once; memory is that of a backward pass.

    `"exact"` sums over classes: one backward pass per natural parameter and term, through the
    layers alone. `"sampled"` draws labels from the model: one pass a draw, unbiased (P11's Î₁).
    `"empirical"` takes the data's own labels, which is not the Fisher information away from a
    perfect model.

    Args:
        model: any torch module that treats the examples of a batch alone.
        inputs: what `as_batches` takes; with `targets`, the inputs of a pair.
        loss: a loss of exponential-family form, as for `penalty`.
        method: see above.
        targets: needed for `"empirical"`, and where they weigh examples.
        draws: labels to draw per term, for `"sampled"`.
        seed: repeats the labels.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if the loss is not known, or the model returns no tensor.
        ValueError: if data or weights are bad, targets are missing, no parameter is trainable, or
            `method` or `draws` is out of range.
    """
    if method not in {"exact", "sampled", "empirical"}:
        raise ValueError(f"method has to be 'exact', 'sampled' or 'empirical', but got {method!r}")
    if draws < 1:
        raise ValueError(f"draws has to be at least 1, but got {draws}")
    parameters = trainable(model)
    batches = as_batches(inputs if targets is None else (inputs, targets), model)
    family_of, loss_of = family(loss), Loss(loss)
    device = next(iter(parameters.values())).device
    source, used_seed = private_generator(generator, seed, device)
    runs = draws if method == "sampled" else 1
    sums = _Sums(parameters, runs)
    with torch.enable_grad(), masks_off(model):
        for batch in batches:
            with watched(model, {id(p): name for name, p in parameters.items()}) as uses:
                outputs = predictions(model, batch.inputs)
            check_outputs(model, outputs)
            if batch.targets is not None:
                family_of.check_targets(outputs, batch.targets)
            labels = _Labels(method, family_of, loss_of, batch, outputs, source)
            one = _Pass(model, batch, family_of, outputs, uses, parameters)
            one.layered = sums.layered(one)
            found = [one.squares(labels.cotangents()) for _ in range(runs)]
            sums.add(loss_of.mass(batch, outputs), found)
    return sums.result(method, loss_of, used_seed)


# --- Labels: exact, drawn, given ---------------------------------------------------------------


@dataclass(frozen=True)
class _Cotangents:
    """Cotangents v_k (n, T, C) with Σ_k E v_k v_kᵀ = w·H per term, and nothing between terms."""

    columns: Tensor
    by_class: bool

    def __len__(self) -> int:
        n_terms, n_classes = self.columns.shape[1:3]
        return n_terms * n_classes if self.by_class else 1

    def at(self, k: int, rows: slice) -> Tensor:
        columns = self.columns[rows]
        if not self.by_class:
            return columns
        term, c = divmod(k, columns.shape[2])
        cotangent = torch.zeros_like(columns[..., 0])
        cotangent[:, term] = columns[:, term, :, c]
        return cotangent


class _Labels:
    """Makes a batch's cotangents by the chosen method."""

    def __init__(
        self,
        method: Method,
        family_of: Family,
        loss_of: Loss,
        batch: Batch,
        outputs: Tensor,
        source: torch.Generator,
    ) -> None:
        self._method, self._family, self._source = method, family_of, source
        self._f = family_of.natural(outputs.detach())
        self._roots = family_of.weights(outputs.detach(), batch.targets).sqrt().unsqueeze(-1)
        self._given = _scores(family_of, loss_of, batch, outputs) if method == "empirical" else None

    def cotangents(self) -> _Cotangents:
        if self._method == "exact":
            return _Cotangents(self._family.root(self._f) * self._roots.unsqueeze(-1), True)
        if self._given is None:
            drawn = self._family.residual(self._f, self._source)
            return _Cotangents(drawn * self._roots, False)
        # The loss's gradient is w·(∇A − y); one root of w is already in the squares' weight.
        scores = torch.where(self._roots > 0, self._given / self._roots, 0.0)
        return _Cotangents(scores, False)


def _scores(family_of: Family, loss_of: Loss, batch: Batch, outputs: Tensor) -> Tensor:
    if batch.targets is None:
        raise ValueError("method='empirical' needs the data's labels; pass targets=")
    leaf = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of.value(leaf, batch.targets), leaf)
    return family_of.natural(gradient)


# --- One batch ---------------------------------------------------------------------------------


class _Pass:
    """The network on one batch, and sums of squared gradients of its examples."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        family_of: Family,
        outputs: Tensor,
        uses: Uses,
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        if not outputs.requires_grad:
            raise ValueError(
                "the model's predictions do not depend on its trainable parameters; look for "
                "detach() or no_grad() in its forward"
            )
        self.model, self.batch, self.family = model, batch, family_of
        self.f, self.uses, self.parameters = family_of.natural(outputs), uses, parameters
        self.n = self.f.shape[0]
        self.layered: set[str] = set()

    def squares(self, cotangents: _Cotangents) -> dict[str, Tensor]:
        """Σ over cotangents and examples of each parameter's squared gradient, float64."""
        found = self._by_layers(cotangents) if self.layered else {}
        rest = {name: p for name, p in self.parameters.items() if name not in self.layered}
        return found | (self._by_examples(cotangents, rest) if rest else {})

    def _by_layers(self, cotangents: _Cotangents) -> dict[str, Tensor]:
        names = sorted(self.layered)
        edges = self.uses.edges(names)
        found = {name: torch.zeros_like(self.parameters[name]).double() for name in names}
        # A linear layer that sees an example once has gradient δ hᵀ, whose square is δ² (h²)ᵀ: its
        # δ² can be summed over cotangents before any product is formed.
        once = [name for name in names if _seen_once(self.uses.by_parameter[name], self.n)]
        deltas: dict[Any, Tensor] = {}
        for k in range(len(cotangents)):
            sent = pull_to_edges(self.f, cotangents.at(k, slice(None)), edges)
            for key in {_key(self.uses.by_parameter[name][0]) for name in once}:
                delta = sent[key]
                if delta is not None:
                    deltas[key] = deltas[key] + delta.square() if key in deltas else delta.square()
            for name in names:
                if name not in once:
                    uses = self.uses.by_parameter[name]
                    for _, own in example_gradients(uses, sent, self.n):
                        found[name] += own.square().sum(0)
        for name in once:
            (use,) = self.uses.by_parameter[name]
            squares = deltas.get(_key(use))
            if squares is not None:
                found[name] += squares.sum(0) if use.local == "bias" else _outer(squares, use)
        return found

    def _by_examples(
        self, cotangents: _Cotangents, rest: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in rest.items()}
        for i in range(self.n):
            row = slice(i, i + 1)
            f = self.family.natural(predictions(self.model, rows_of(self.batch.inputs, row)))
            for k in range(len(cotangents)):
                grads = pull_back(f, cotangents.at(k, row), list(rest.values()))
                for name, own in zip(rest, grads, strict=True):
                    found[name] += own.square()
        return found


def _key(use: Use) -> Any:
    return use.edge.node, use.edge.output_nr


def _seen_once(uses: list[Use], n: int) -> bool:
    return len(uses) == 1 and isinstance(uses[0].module, nn.Linear) and uses[0].shape[:-1] == (n,)


def _outer(squares: Tensor, use: Use) -> Tensor:
    return squares.mT @ use.inputs.square()


# --- All batches -------------------------------------------------------------------------------


class _Sums:
    """Sums over batches, and what is known about each parameter's bookkeeping."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], runs: int) -> None:
        self._parameters, self._runs = parameters, runs
        self._total = {
            name: torch.zeros_like(p, dtype=torch.float64, requires_grad=False)
            for name, p in parameters.items()
        }
        self._variance = {name: torch.zeros_like(sum_) for name, sum_ in self._total.items()}
        self._traces = torch.zeros(runs, dtype=torch.float64)
        self._mass = 0.0
        self._axes: dict[str, list[int]] | None = None
        self._how = dict.fromkeys(parameters, LAYER)

    def layered(self, one: _Pass) -> set[str]:
        """The parameters whose gradients per example come from their layers; settled once."""
        uses = one.uses.by_parameter
        if self._axes is None:
            # Its draws decide nothing but which entries are compared.
            probe = torch.Generator(device=one.f.device).manual_seed(0)
            good = settle_axes(one.f, one.uses, self._parameters, probe)
            self._axes = {name: [use.axis for use in uses[name]] for name in good}
        good = {n for n, axes in self._axes.items() if len(uses.get(n, [])) == len(axes)}
        for name in good:
            for use, axis in zip(uses[name], self._axes[name], strict=True):
                use.axis = axis
        self._how |= {name: AUTOGRAD for name in self._parameters if name not in good}
        return good

    def add(self, mass: float, found: list[dict[str, Tensor]]) -> None:
        self._mass += mass
        for name, total in self._total.items():
            first = torch.zeros_like(total)
            second = torch.zeros_like(total)
            for run, squares in enumerate(found):
                first += squares[name]
                second += squares[name].square()
                self._traces[run] += mass * float(squares[name].sum())
            total += mass * first / self._runs
            if self._runs > 1:
                spread = (second - first.square() / self._runs) / (self._runs - 1)
                # Labels of different batches are independent.
                self._variance[name] += mass**2 * spread.clamp_min(0) / self._runs

    def result(self, method: Method, loss_of: Loss, seed: int) -> Fisher:
        whole = loss_of.whole(self._mass)
        traces = self._traces / whole
        sampled = method == "sampled"
        return Fisher(
            mean_estimate(traces, "labels") if sampled else exact(float(traces[0]), "labels"),
            {name: total / whole for name, total in self._total.items()},
            {n: v.sqrt() / whole for n, v in self._variance.items()} if sampled else None,
            method,
            self._how,
            "off",
            seed if sampled else None,
        )
