"""How far a network's weights wander under further training, held against the loss's flatness."""

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from droplens.batches import Batch, as_batches, n_examples, rows_of
from droplens.calling import predictions
from droplens.gates import draw_masks, masks_replaced
from droplens.inspection._subject import Subject
from droplens.inspection._training import some
from droplens.measure import VarianceFlatness, variance_flatness
from droplens.measure._checks import trainable
from droplens.measure._risk import Loss, labelled
from droplens.randomness import private_generator

_STEP_SIZE: Final = 0.01
_EXAMPLES: Final = 32
# Between two checkpoints, so that they are not all but one.
_STEPS: Final = 5
_CHECKPOINTS: Final = 100
_COMPONENTS: Final = 20
# Numbers written in checkpoints, 256 MB of float32.
_MOST_NUMBERS: Final = 1 << 26


@dataclass(frozen=True)
class Wandering:
    """A few more epochs of a copy of the network, and how flat the loss is where it went.

    Args:
        found: variance of the copy's weights, about a straight line in time, along its principal
            directions, and the flatness interval of the network's own loss along these, dropout
            off.
        steps: of gradient descent that the copy took, with the network's own masks.
        step_size: of each, for the mean over examples; constant.
        batch: examples a step.
        examples: how many of the data, the first ones.
    """

    found: VarianceFlatness
    steps: int
    step_size: float
    batch: int
    examples: int


def wandering(on: Subject) -> Wandering:
    """Train a copy, and measure where its weights went.

    Raises:
        ValueError: if there is but one batch, the weights are too many, the descent diverges, or
            the flatness is refused.
    """
    loss = Loss(on.loss)
    data = [batch for batch in some(on) if loss.counts(batch.targets)]
    examples = sum(n_examples(batch.inputs) for batch in data)
    if examples <= _EXAMPLES:
        raise ValueError(
            f"it trains a copy in batches of {_EXAMPLES} examples, and the data has only {examples}"
        )
    if on.sizes.weights * _CHECKPOINTS > _MOST_NUMBERS:
        raise ValueError(
            f"its {_CHECKPOINTS} checkpoints are too large for a page ({on.sizes.weights:,} "
            "trainable numbers); droplens.measure.variance_flatness takes those of your training"
        )
    # All checkpoints take far more room than the training that they come from.
    with tempfile.TemporaryDirectory(prefix="droplens-") as folder:
        states = [_Stored(path) for path in _trained(on, data, loss, Path(folder))]
        kept = _without_drift(states)
        whole = as_batches(data, loss=on.loss)
        found = variance_flatness(on.model, kept, whole, on.loss, _COMPONENTS)
    return Wandering(found, _CHECKPOINTS * _STEPS, _STEP_SIZE, _EXAMPLES, examples)


@final
class _Stored(Mapping[str, Tensor]):
    """A checkpoint in a file, of which each tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _opened(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.load(self._path, mmap=True, weights_only=True)
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self._opened()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened())

    def __len__(self) -> int:
        return len(self._opened())


@final
class _Driftless(Mapping[str, Tensor]):
    """A checkpoint less what the drift has added to it until then."""

    def __init__(self, state: Mapping[str, Tensor], drift: Mapping[str, Tensor], at: float) -> None:
        self._state, self._drift, self._at = state, drift, at

    def __getitem__(self, name: str) -> Tensor:
        return torch.sub(self._state[name], self._drift[name], alpha=self._at)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _trained(on: Subject, data: Sequence[Batch], loss: Loss, folder: Path) -> list[Path]:
    """Checkpoints of a copy under plain stochastic gradient descent, norm layers in eval.

    Raises:
        ValueError: if the loss or the weights leave the finite numbers.
    """
    twin = copy.deepcopy(on.model)
    weights = trainable(twin)
    source, _ = private_generator(None, on.seed, next(iter(weights.values())).device)
    batches = _drawn(data, loss, source)
    paths = []
    with torch.enable_grad(), masks_replaced(twin, draw_masks(source)):
        for step in range(_CHECKPOINTS * _STEPS):
            batch, targets = next(batches)
            value = loss.value(predictions(twin, batch.inputs), targets)
            # Of the mean over examples, also where the loss is their sum.
            value = value * (loss.whole(float(len(targets))) / len(targets))
            slopes = torch.autograd.grad(
                value, list(weights.values()), allow_unused=True, materialize_grads=True
            )
            with torch.no_grad():
                for weight, slope in zip(weights.values(), slopes, strict=True):
                    weight.sub_(slope, alpha=_STEP_SIZE)
            if not (step + 1) % _STEPS:
                paths.append(folder / f"{step}.pt")
                torch.save({name: w.detach().cpu() for name, w in weights.items()}, paths[-1])
    if not all(bool(w.isfinite().all()) for w in weights.values()):
        raise ValueError(f"gradient descent of step size {_STEP_SIZE:g} diverges from the network")
    return paths


def _without_drift(states: Sequence[Mapping[str, Tensor]]) -> list[_Driftless]:
    """Each weight less the straight line in time that fits it best, about its mean.

    Training that has not ended has one direction that is far the largest, and says where it is
    going instead of how far it wanders.
    """
    time = torch.linspace(-1, 1, len(states)).tolist()
    drift = {name: torch.zeros_like(weight) for name, weight in states[0].items()}
    for state, at in zip(states, time, strict=True):
        for name, total in drift.items():
            # Of the distance from where it began, which is smaller than the weight.
            total.add_(state[name] - states[0][name], alpha=at / sum(t * t for t in time))
    return [_Driftless(state, drift, at) for state, at in zip(states, time, strict=True)]


def _drawn(
    data: Sequence[Batch], loss: Loss, source: torch.Generator
) -> Iterator[tuple[Batch, Tensor]]:
    """Small batches in an order of their own in every epoch, without end.

    Yields:
        Each, with its targets.
    """
    while True:
        for batch, targets in labelled(data):
            order = torch.randperm(len(targets), generator=source, device=source.device)
            for rows in order.to(targets.device).split(_EXAMPLES):
                if loss.counts(targets[rows]):
                    yield Batch(rows_of(batch.inputs, rows), targets[rows]), targets[rows]
