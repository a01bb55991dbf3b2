"""One batch's part in the Fisher information: cotangents of labels, gradients of examples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from droplens.batches import Batch, rows_of
from droplens.calling import ForwardError, predictions
from droplens.losses import Family, random_signs
from droplens.measure._layers import Use, Uses, example_gradients, pull_to_edges
from droplens.measure._risk import Loss
from droplens.products import differentiable_gradient, hessian_product, pull_back

Method = Literal["exact", "sampled", "sampled_hessian", "empirical"]

# How a parameter's part was found.
LAYER, AUTOGRAD = "layer by layer", "example by example"
PRODUCTS, PROBES = "a product a weight", "random probes"

# Up to this many weights the Hessian's diagonal is formed by as many products.
MOST_PRODUCTS = 1000


# --- Labels: exact, drawn, given ---------------------------------------------------------------


@dataclass(frozen=True)
class Cotangents:
    """Cotangents v_k (n, T, C) with Σ_k E v_k v_kᵀ = w·H per term, and nothing between terms."""

    columns: Tensor
    by_class: bool

    def __len__(self) -> int:
        return self.columns.shape[1] * self.columns.shape[-1] if self.by_class else 1

    def at(self, k: int, rows: slice) -> Tensor:
        """The k-th cotangent of some examples, (rows, T, C)."""
        columns = self.columns[rows]
        if not self.by_class:
            return columns
        term, c = divmod(k, columns.shape[-1])
        cotangent = torch.zeros_like(columns[..., 0])
        cotangent[:, term] = columns[:, term, :, c]
        return cotangent


class Labels:
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

    def cotangents(self) -> Cotangents:
        """Those of the method; drawn afresh where labels are."""
        if self._method == "exact":
            return Cotangents(self._family.root(self._f) * self._roots.unsqueeze(-1), True)
        if self._given is None:
            drawn = self._family.residual(self._f, self._source)
            return Cotangents(drawn * self._roots, False)
        # The loss's gradient is w·(∇A − y); one root of w is already in the squares' weight.
        scores = torch.where(self._roots > 0, self._given / self._roots, 0.0)
        return Cotangents(scores, False)

    def sampled_loss(self, f: Tensor) -> Tensor:
        """Σ w·(A(f) − ŷᵀf) over terms, ŷ drawn from the model: differentiable in f."""
        drawn = self._family.mean(self._f) - self._family.residual(self._f, self._source)
        terms = self._family.log_partition(f) - (drawn.detach() * f).sum(-1)
        return (self._roots.squeeze(-1).square() * terms).sum()


def _scores(family_of: Family, loss_of: Loss, batch: Batch, outputs: Tensor) -> Tensor:
    if batch.targets is None:
        raise ValueError("method='empirical' needs the data's labels; pass targets=")
    leaf = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of.value(leaf, batch.targets), leaf)
    return family_of.natural(gradient)


# --- One batch ---------------------------------------------------------------------------------


class Pass:
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
        self.alone = True  # an example's gradient may be had from the example alone

    def squares(self, cotangents: Cotangents) -> dict[str, Tensor]:
        """Σ over cotangents and examples of each parameter's squared gradient, float64."""
        found = self._by_layers(cotangents) if self.layered else {}
        rest = {name: p for name, p in self.parameters.items() if name not in self.layered}
        return found | (self._by_examples(cotangents, rest) if rest else {})

    def _by_layers(self, cotangents: Cotangents) -> dict[str, Tensor]:
        names = sorted(self.layered)
        edges = self.uses.edges(names)
        # A linear layer that sees an example once has gradient δ hᵀ, whose square is δ² (h²)ᵀ: its
        # δ² can be summed over cotangents before any product is formed.
        once = {name for name in names if _seen_once(self.uses.by_parameter[name], self.n)}
        found = {
            name: torch.zeros_like(
                self.parameters[name],
                dtype=None if name in once else torch.float64,
                requires_grad=False,
            )
            for name in names
        }
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

    def _by_examples(self, cotangents: Cotangents, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in rest.items()}
        for i in range(self.n):
            row = slice(i, i + 1)
            f = self._row(row)
            for k in range(len(cotangents)):
                own = cotangents.at(k, row)
                if not self.alone:
                    whole = torch.zeros_like(f)
                    whole[row] = own
                    own = whole
                grads = pull_back(f, own, list(rest.values()))
                for name, gradient in zip(rest, grads, strict=True):
                    found[name] += gradient.square()
        return found

    def _row(self, row: slice) -> Tensor:
        """The example's natural parameters, or those of all: masks belong to whole batches.

        Raises:
            ValueError: if the model takes no example alone.
        """
        if not self.alone:
            return self.f
        try:
            return self.family.natural(predictions(self.model, rows_of(self.batch.inputs, row)))
        except ForwardError as error:
            raise ValueError(
                f"the model takes a batch but not one example alone ({error}), so the squares of "
                "its examples' gradients are not known"
            ) from error

    def second_derivatives(
        self, labels: "Labels", source: torch.Generator
    ) -> tuple[dict[str, Tensor], str]:
        """Diagonal of the Hessian of the loss at drawn labels, float64, and how it was found.

        With random signs s on one parameter's entries alone, s ∘ Hs estimates the diagonal of its
        block; what a block holds beside its diagonal is the noise.
        """
        parameters = list(self.parameters.values())
        gradient = differentiable_gradient(labels.sampled_loss(self.f), parameters)
        exactly = sum(p.numel() for p in parameters) <= MOST_PRODUCTS
        found = {}
        for k, (name, parameter) in enumerate(self.parameters.items()):
            blank = [torch.zeros_like(p) for p in parameters]
            own = torch.zeros_like(parameter, dtype=torch.float64)
            for probe in _probes(parameter, exactly, source):
                blank[k] = probe
                block = hessian_product(gradient, parameters, blank)[k]
                own += (probe * block).double()
            found[name] = own.detach()
        return found, PRODUCTS if exactly else PROBES


def _probes(like: Tensor, exactly: bool, source: torch.Generator) -> Iterator[Tensor]:
    """All unit vectors of a parameter's entries, or random signs on them.

    Yields:
        Tensors of its shape.
    """
    if exactly:
        for i in range(like.numel()):
            unit = torch.zeros_like(like).flatten()
            unit[i] = 1.0
            yield unit.view_as(like)
        return
    yield random_signs(like, source)


def _key(use: Use) -> Any:
    return use.edge.node, use.edge.output_nr


def _seen_once(uses: list[Use], n: int) -> bool:
    return len(uses) == 1 and isinstance(uses[0].module, nn.Linear) and uses[0].shape[:-1] == (n,)


def _outer(squares: Tensor, use: Use) -> Tensor:
    return squares.mT @ use.inputs.square()
