"""A network's predictions as a function of its weights, plain or averaged over held masks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn

from droplens.batches import checked_passes, n_examples, rows_of
from droplens.calling import ForwardError
from droplens.discovery import Call
from droplens.gates import draw_masks, masks_off, masks_replaced
from droplens.losses import Family
from droplens.measure._checks import trainable
from droplens.measure._coordinates import Connection, coordinates
from droplens.measure._risk import Caller

# Examples a pass: their activations in double precision stay below a training step's.
EXAMPLES: Final = 256


class Piece(NamedTuple):
    """Some examples, and the number they carry in the order of all pieces."""

    inputs: Any
    number: int
    size: int


@final
class Predictor:
    """The model in the precision it bears, and its inputs piece by piece."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        family: Family,
        connection: Connection,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.family, self.connection, self.dtype = model, family, connection, dtype
        self.caller = Caller(model)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        fixed = [*model.named_parameters(), *model.named_buffers()]
        self.fixed = {name: _cast(t.detach(), dtype) for name, t in fixed if name not in trains}
        self._batches = checked_passes(inputs, model, in_order=True)

    def pieces(self) -> Iterator[Piece]:
        """All examples, at most 256 at a time.

        Yields:
            Each piece.
        """
        number = 0
        for batch in self._batches:
            n = n_examples(batch.inputs)
            for start in range(0, n, EXAMPLES):
                part = (
                    rows_of(batch.inputs, slice(start, start + EXAMPLES))
                    if (n > EXAMPLES)
                    else batch.inputs
                )
                yield Piece(_cast(part, self.dtype), number, n_examples(part))
                number += 1

    def point(self, state: Mapping[str, Tensor], inputs: Any) -> tuple[Tensor, Tensor]:
        """Natural parameters f and coordinates z of some examples, (n, T, C) both."""
        f = self.family.natural(self.caller.at({**state, **self.fixed}, inputs))
        return f, coordinates(self.family, f, self.connection)

    @contextmanager
    def opened(self, draws: int | None, seed: int) -> Iterator["Opened"]:
        """While open, dropout is off, or each draw's masks are in its place.

        Yields:
            The predictor with the masks under our control.
        """
        if draws is None:
            with masks_off(self.model):
                yield Opened(self, None, seed, False)
            return
        masks = torch.Generator(device=next(self.model.parameters()).device)
        shared = self._shares_masks()

        def again() -> None:
            masks.manual_seed(masks.initial_seed())

        with masks_replaced(self.model, draw_masks(masks), again):
            yield Opened(self, masks, seed, shared)

    def _shares_masks(self) -> bool:
        """Whether all examples of a pass share a mask, as under DropConnect."""
        found: list[bool] = []

        def note(call: Call, x: Tensor) -> Tensor:
            found.append(call.of_weights)
            return x

        state = {n: _cast(p.detach(), self.dtype) for n, p in trainable(self.model).items()}
        with torch.no_grad(), masks_replaced(self.model, note):
            self.point(state, next(iter(self.pieces())).inputs)
        return any(found)


@dataclass(frozen=True)
class Opened:
    """A predictor whose masks are ours, and the generator they come from."""

    predictor: Predictor
    masks: torch.Generator | None
    seed: int
    shared: bool

    def point(
        self, state: Mapping[str, Tensor], piece: Piece, draws: range
    ) -> tuple[Tensor, Tensor]:
        """Sums of f and z over `draws`, whose masks are the same in every call."""
        if self.masks is None:
            return self.predictor.point(state, piece.inputs)
        self.masks.manual_seed(_mixed(self.seed, draws.start, len(draws), piece.number))
        f, z = self.predictor.point(state, _repeated(piece, len(draws)))
        each = (len(draws), piece.size, *f.shape[1:])
        return f.view(each).sum(0), z.view(each).sum(0)


def _repeated(piece: Piece, times: int) -> Any:
    """The examples of a piece, one copy after the other: each gets masks of its own."""

    def repeat(inputs: Any) -> Any:
        if isinstance(inputs, Tensor):
            own = inputs.dim() and len(inputs) == piece.size
            return inputs.repeat(times, *(1,) * (inputs.dim() - 1)) if own else inputs
        if isinstance(inputs, Mapping):
            return {name: repeat(value) for name, value in inputs.items()}
        if isinstance(inputs, list | tuple):
            return tuple(repeat(value) for value in inputs)
        return inputs

    return repeat(piece.inputs)


def _mixed(seed: int, *numbers: int) -> int:
    for number in numbers:
        seed = (seed * 6364136223846793005 + 1442695040888963407 + number) % 2**63
    return seed


def predictor_of(
    model: nn.Module, inputs: Any, family: Family, connection: Connection
) -> Predictor:
    """In double precision if the model runs in it, else in its own."""
    fine = Predictor(model, inputs, family, connection, torch.float64)
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if own == torch.float64:
        return fine
    state = {name: p.detach().double() for name, p in trainable(model).items()}
    try:
        with torch.no_grad(), masks_off(model):
            fine.point(state, next(iter(fine.pieces())).inputs)
    except (ForwardError, ValueError):
        # Its own precision either works or says what is wrong.
        return Predictor(model, inputs, family, connection, own)
    return fine


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: _cast(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return tuple(_cast(value, dtype) for value in inputs)
    return inputs
