"""Symmetric matrices of the size of the weights, as products alone: Hessian and Gauss–Newton."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from droplens._memory import keep_freed_memory
from droplens.batches import Batch, Batches, in_parts, is_one_batch
from droplens.calling import check_outputs, predictions
from droplens.labels import NO_LABEL
from droplens.losses import Family
from droplens.measure._checks import trainable
from droplens.measure._directions import Direction
from droplens.measure._masks import Applied
from droplens.measure._parts import WHOLE, copied, copies_at_once, rows_at_once
from droplens.measure._risk import Loss, labelled
from droplens.products import GaussNewtonGraph, differentiable_gradient, edges, hessian_product

# Of float64, or of float32 where the weights are and memory counts.
Vector = NDArray[Any]
Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class FlatError(Exception):
    """The matrix is zero, and Lanczos has nothing to work on."""


class WeightMatrix(ABC):
    """A symmetric matrix over the trainable weights, the mean over draws of masks of one a draw.

    It works on flat vectors. Gradients have to be on and the masks in force (`masks`).

    Args:
        model: whose trainable weights they are.
        batches: read once for every call of `products`, a part of a batch at a time; a single
            batch's graph is kept instead, where there is one draw.
        loss: says how batches add up.
        masks: the draws.
    """

    def __init__(self, model: nn.Module, batches: Batches, loss: Loss, masks: Applied) -> None:
        keep_freed_memory()
        self.model, self.batches, self.loss, self.masks = model, batches, loss, masks
        parameters = trainable(model)
        self._names, self.parameters = list(parameters), list(parameters.values())
        self.size = sum(p.numel() for p in self.parameters)
        single = all(p.dtype == torch.float32 for p in self.parameters)
        self.dtype: type[np.floating[Any]] = np.float32 if single else np.float64
        self.divisor = 1.0  # what the loss divides by over all data, known after a product
        self._curved = False
        self._copies = 1  # of a batch, side by side in one pass: as many draws
        self.moves = False  # whether some derivative in the weights is not zero, if that is known
        # Of a part; known after a look at the first batch. Parts of a graph that is kept would
        # save an eighth of the room and cost a tenth of the time.
        keep = masks.count == 1 and is_one_batch(batches)
        self._rows = WHOLE if keep or loss.family is None else None
        self._held: list[tuple[int, float, Product]] | None = None
        # Whether anything is dropped shows in the first graph, which may be all there is.
        graphs = self._graphs(range(1))
        first = next(graphs)
        masks.settle()
        if masks.count == 1 and is_one_batch(batches):
            self._held = [first, *graphs]
        graphs.close()

    @abstractmethod
    def graph(self, batch: Batch, outputs: Tensor) -> tuple[float, Product]:
        """How much a batch counts, and the product with its own matrix.

        Raises:
            ValueError: if the loss does not depend on the weights, or targets are bad.
        """

    @abstractmethod
    def pairs(self) -> Iterator[Batch]:
        """The batches, checked for what `graph` needs."""

    def products(self, V: Vector, draws: range | None = None) -> Vector:
        """M V for the columns of V (d, k): one pass over the data for all of them.

        Where masks are averaged over, `draws` may be others than the first ones.
        """
        if draws is None or self.masks.count == 1:
            draws = range(self.masks.count)
        result = self._sum(V, draws)
        result /= len(draws)
        return result

    def products_of_draw(self, draw: int, V: Vector) -> Vector:
        """The same for the matrix of one draw of masks."""
        return self._sum(V, range(draw, draw + 1))

    def product(self, vector: Vector, draws: range | None = None) -> Vector:
        """M v for one vector (d,).

        Raises:
            FlatError: if the first product is zero, and with it (the vector is random) M.
        """
        found = self.products(np.reshape(vector, (-1, 1)), draws)[:, 0]
        self._curved = self._curved or bool(found.any())
        if not self._curved:
            raise FlatError
        return found

    @contextmanager
    def gathered(self) -> Iterator[int]:
        """While open, a pass over a small batch holds several draws: a row for each of them.

        Yields:
            How many passes make `masks.count` draws.
        """
        if self.loss.family is not None:
            first = next(iter(self.pairs()))
            self._copies = copies_at_once(self.model, first, self.masks)
        try:
            yield self.masks.count // self._copies
        finally:
            self._copies = 1

    def named(self, vector: Vector) -> Direction:
        """A flat vector as tensors by parameter name."""
        return dict(zip(self._names, self._split(vector), strict=True))

    def weights(self) -> Vector:
        """The weights themselves, flat."""
        return _flat(self.parameters, np.dtype(self.dtype))

    def _sum(self, V: Vector, draws: range) -> Vector:
        result = np.zeros_like(V)
        masses = 0.0
        for draw, mass, product in self._held or self._graphs(draws):
            if self._held or draw == draws[0]:
                masses += mass
            if not mass:  # its value is 0/0
                continue
            for k, column in enumerate(V.T):
                own = _flat(product(self._split(column)), V.dtype)
                own *= mass
                result[:, k] += own
            del product  # or its graph would live on while the next one is built
        self.divisor = self.loss.whole(masses)
        result /= self.divisor
        return result

    def _graphs(self, draws: range) -> Generator[tuple[int, float, Product]]:
        """One part of the data after the other, and for each one draw after the other.

        Yields:
            The draw, the mass, and the product.

        Raises:
            ValueError: if no label counts.
        """
        found = False
        for index, part in enumerate(self._parts()):
            if not self.loss.counts(part.targets):
                continue
            found = True
            for draw in draws:
                self.masks.hold(draw, index)
                outputs = predictions(self.model, part.inputs)
                check_outputs(self.model, outputs)
                mass, product = self.graph(part, outputs)
                del outputs
                yield draw, mass / self._copies, product
                del product
        if not found:
            raise ValueError(NO_LABEL)

    def _parts(self) -> Iterator[Batch]:
        """The data in parts; in batches, where the loss is not known to be a sum over examples.

        Yields:
            Each part.
        """
        for batch in self.pairs():
            if self._copies > 1:
                yield copied(batch, self._copies)
                continue
            if self._rows is None:
                self._rows = rows_at_once(self.model, batch, self.masks)
            yield from in_parts(batch, self._rows)

    def _split(self, vector: Vector) -> list[Tensor]:
        flat = torch.from_numpy(np.ascontiguousarray(vector))
        parts = flat.split([p.numel() for p in self.parameters])
        return [
            part.view(p.shape).to(dtype=p.dtype, device=p.device)
            for part, p in zip(parts, self.parameters, strict=True)
        ]


def _flat(tensors: Sequence[Tensor], dtype: np.dtype[Any]) -> Vector:
    joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
    array: Vector = joined.cpu().numpy()
    return array.astype(dtype, copy=False)


@final
class LossHessian(WeightMatrix):
    """The Hessian of the loss over all batches."""

    def pairs(self) -> Iterator[Batch]:
        """Batches with targets.

        Yields:
            Each of them.
        """
        for batch, _ in labelled(self.batches):
            yield batch

    def graph(self, batch: Batch, outputs: Tensor) -> tuple[float, Product]:
        """From the gradient's own graph.

        Raises:
            ValueError: if the loss does not depend on the weights, or targets are bad.
        """
        targets: Any = batch.targets
        self.loss.check(outputs, targets)
        value = self.loss.value(outputs, targets)
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on the model's trainable parameters; look for "
                "detach() or no_grad() in its forward"
            )
        found = differentiable_gradient(value, self.parameters)
        self.moves = self.moves or any(bool(part.any()) for part in found)
        gradient = edges(found)
        del found

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor]:
            return hessian_product(gradient, self.parameters, vector)

        return self.loss.mass(batch, outputs), product


@final
class GaussNewton(WeightMatrix):
    """F = Σ w JᵀHJ over the loss's terms: the Fisher information of the weights."""

    def __init__(
        self, model: nn.Module, batches: Batches, loss: Loss, masks: Applied, family: Family
    ) -> None:
        self._family = family
        super().__init__(model, batches, loss, masks)

    def pairs(self) -> Iterator[Batch]:
        """Every batch; targets are needed only where they weigh terms."""
        return iter(self.batches)

    def graph(self, batch: Batch, outputs: Tensor) -> tuple[float, Product]:
        """From the graph of a backward pass.

        Raises:
            ValueError: if the predictions do not depend on the weights, or targets are bad.
        """
        if not outputs.requires_grad:
            raise ValueError(
                "the model's predictions do not depend on its trainable parameters; look for "
                "detach() or no_grad() in its forward"
            )
        f = self._family.natural(outputs)
        if batch.targets is not None:
            self._family.check_targets(outputs, batch.targets)
        # w·RRᵀ: its root is what both sides of the product are multiplied by.
        weights = self._family.weights(outputs.detach(), batch.targets)
        root = self._family.root(f.detach()) * weights.sqrt()[..., None, None]
        graph = GaussNewtonGraph(f, self.parameters)

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor]:
            pushed = graph.push(vector).unsqueeze(-1)
            return graph.pull((root @ (root.mT @ pushed)).squeeze(-1))

        return self.loss.mass(batch, outputs), product
