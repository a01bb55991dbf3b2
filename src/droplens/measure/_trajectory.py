"""The inverse variance–flatness relation along a trajectory (papers.md §2.9; Feng & Tu 2021)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from droplens.batches import Batches, checked_passes
from droplens.estimates import Estimate
from droplens.measure._checks import trainable
from droplens.measure._directions import Direction
from droplens.measure._flatness import Moved
from droplens.measure._masks import Masking, Masks
from droplens.measure._risk import Loss, losses_at
from droplens.randomness import private_generator

_DOUBLINGS = 40
_BISECTIONS = 20
# Components whose variance is below this share of the first are rounding.
_NEGLIGIBLE = 1e-10
# Numbers of all checkpoints that are looked at together, 8 MB.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class VarianceFlatness:
    """How far the weights moved along their principal directions, and how flat the loss is there.

    Args:
        variance: σ_i², of the weights along direction i over the checkpoints, falling, (k,).
        flatness: F_i, the width of the interval around the weights in which the loss along
            direction i is at most `factor` times its value there, (k,), in units of the weights;
            infinite where no such end was found.
        ends: the interval's ends (k, 2), the left one negative.
        slope: of log σ² on log F over the directions of finite width, with its standard error;
            negative is the inverse relation. `n` − 1 are its degrees of freedom, k − 2.
        directions: the principal directions, of length 1, by parameter.
        base: the loss at the weights.
        factor: e, unless asked otherwise.
        checkpoints: how many.
        masks: "off", "fixed" or "expected", as for `flatness`.
        draws: of masks; 0 for "off".
        seed: repeats the masks; None for "off".
    """

    variance: Tensor
    flatness: Tensor
    ends: Tensor
    slope: Estimate
    directions: tuple[Direction, ...] = field(repr=False)
    base: float
    factor: float
    checkpoints: int
    masks: Masks
    draws: int
    seed: int | None


def variance_flatness(  # noqa: PLR0913  # all but four have defaults
    model: nn.Module,
    checkpoints: Iterable[Mapping[str, Tensor]],
    batches: Any,
    loss: Any,
    components: int = 10,
    masks: Masks = "off",
    *,
    parameters: Sequence[str] | None = None,
    factor: float = math.e,
    draws: int = 16,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> VarianceFlatness:
    """Flatness intervals along the principal directions of a trajectory (P2's predecessor §2.9).

    The directions are those of the principal components of the recorded weights, found from the
    Gram matrix of the checkpoints (T × T); no matrix over weights is formed. Norm layers are in
    eval. A loss that is NaN counts as one that has left the interval.

    Args:
        model: any torch module; its weights are the middle, where the loss should be near a
            minimum (the last checkpoint, or the checkpoints' mean).
        checkpoints: state dicts of one training, at least 3; tensors by parameter name. Mappings
            that read a tensor when it is asked for (from a file) are read so, one at a time, and
            again for every direction; none of their tensors is held.
        batches: what `as_batches` takes, with targets; read in every step of the search.
        loss: a loss object; its value at the model has to be positive.
        components: how many principal directions at most.
        masks: as for `flatness`.
        parameters: names of the weights to look at, such as one layer's; all trainable ones by
            default.
        factor: the loss at the ends over the loss in the middle.
        draws: of masks, for `"expected"`; at least 2.
        seed: repeats the masks.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if data or weights are bad, checkpoints are too few, lack a weight, do not
            differ, or the loss is not positive at the model, or an argument is out of range.
    """
    if isinstance(components, bool) or not isinstance(components, int) or components < 1:
        raise ValueError(f"components has to be at least 1, but got {components!r}")
    if not 1 < factor < math.inf:
        raise ValueError(f"factor has to be above 1, but got {factor}")
    start = {name: p.detach() for name, p in trainable(model).items()}
    trajectory = _recorded(start, checkpoints, parameters)
    variance, directions = principal_directions(trajectory, components)
    _, used_seed = private_generator(generator, seed)
    masking = Masking(masks, draws, used_seed)
    data = checked_passes(batches, model, loss, in_order=masks != "off")
    still = {name: torch.zeros_like(p) for name, p in start.items()}
    steps = [still | dict(direction) for direction in directions]
    search = _Search(model, start, data, Loss(loss), masking, factor)
    ends = search.ends(steps, variance.sqrt())
    width = ends[:, 1] - ends[:, 0]
    return VarianceFlatness(
        variance,
        width,
        ends,
        _slope(variance, width),
        tuple(directions),
        search.base,
        factor,
        len(trajectory),
        masks,
        search.draws,
        masking.seed_used,
    )


def principal_directions(
    trajectory: Sequence[Mapping[str, Tensor]], components: int
) -> tuple[Tensor, list[Direction]]:
    """Variances (T − 1 in the denominator, falling) and unit directions of the weights' PCA.

    With W (T, d) the centred weights, WWᵀ a = κ a gives the direction Wᵀa/√κ of variance
    κ/(T − 1): only T × T numbers are formed.

    Raises:
        ValueError: if the checkpoints do not differ.
    """
    n = len(trajectory)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for name, weight in trajectory[0].items():
        # A few numbers of every checkpoint at a time: all of a large weight take too much room.
        length = max(1, _AT_ONCE // n)
        for first in range(0, weight.numel(), length):
            rows = torch.empty(n, min(length, weight.numel() - first), dtype=torch.float64)
            for row, state in zip(rows, trajectory, strict=True):
                row.copy_(state[name].detach().flatten()[first : first + length])
            rows -= rows.mean(0)
            gram += rows @ rows.T
    values, vectors = torch.linalg.eigh(gram)
    kept = [i for i in range(n - 1, -1, -1) if values[i] > _NEGLIGIBLE * values[-1]]
    if not kept or not float(values[-1]) > 0:
        raise ValueError("checkpoints do not differ, so there are no principal directions")
    kept = kept[: min(components, n - 1)]
    directions: list[Direction] = []
    for i in kept:
        # The shares sum to zero, so the mean need not be taken off again.
        shares = (vectors[:, i] / values[i].sqrt()).tolist()
        directions.append({name: _mixed(shares, trajectory, name) for name in trajectory[0]})
    return values[kept] / (n - 1), directions


def _mixed(
    shares: Sequence[float], trajectory: Sequence[Mapping[str, Tensor]], name: str
) -> Tensor:
    total = torch.zeros_like(trajectory[0][name], requires_grad=False)
    for share, state in zip(shares, trajectory, strict=True):
        total += share * state[name].detach()
    return total


def _recorded(
    start: Mapping[str, Tensor],
    checkpoints: Iterable[Mapping[str, Tensor]],
    parameters: Sequence[str] | None,
) -> list[Mapping[str, Tensor]]:
    """The weights looked at, by checkpoint.

    Raises:
        TypeError: if a checkpoint is no mapping.
        ValueError: if there are fewer than three, or one lacks a weight or holds a bad one.
    """
    names = list(start) if parameters is None else list(parameters)
    unknown = [name for name in names if name not in start]
    if unknown or not names:
        raise ValueError(
            f"parameters names {unknown[0]!r}, which is no trainable parameter of the model"
            if unknown
            else "parameters is empty; name at least one"
        )
    found: list[Mapping[str, Tensor]] = []
    for k, state in enumerate(checkpoints):
        if not isinstance(state, Mapping):
            raise TypeError(
                f"checkpoints has to hold mappings of tensors, but holds a {type(state).__name__}"
            )
        for name in names:
            weight = state.get(name)
            if weight is None or weight.shape != start[name].shape:
                raise ValueError(
                    f"checkpoints[{k}] has to hold {name!r} of shape {tuple(start[name].shape)}"
                )
            if not bool(weight.isfinite().all()):
                raise ValueError(f"checkpoints[{k}] holds NaN or Inf in {name!r}")
        found.append(_Weights(state, {name: start[name] for name in names}))
    if len(found) < 3:
        raise ValueError(f"checkpoints has to hold at least 3, but got {len(found)}")
    return found


@final
class _Weights(Mapping[str, Tensor]):
    """Some of a checkpoint's weights, each read when it is asked for, and in the model's type."""

    def __init__(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        self._state, self._like = state, like

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].detach().to(self._like[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


class _Search:
    """Finds where the loss along a direction first exceeds `factor` times its value."""

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor],
        data: Batches,
        loss: Loss,
        masking: Masking,
        factor: float,
    ) -> None:
        self._model, self._start, self._data = model, start, data
        self._loss, self._masking = loss, masking
        found = losses_at(model, [start], data, loss, masking)
        self.base, self.draws = float(found.mean()), 0 if masking.mode == "off" else len(found)
        if not 0 < self.base < math.inf:
            raise ValueError(
                f"the loss at the model is {self.base:.4g}; an interval in multiples of it needs a "
                "positive one"
            )
        self._limit = factor * self.base

    def ends(self, steps: Sequence[Direction], scale: Tensor) -> Tensor:
        """(k, 2): by doubling from 1% of `scale` until outside, then bisection on log distance."""
        signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        inside = torch.zeros(len(steps), 2, dtype=torch.float64)
        outside = torch.full_like(inside, math.inf)
        reach = 0.01 * scale[:, None].expand(-1, 2).clone()
        for _ in range(_DOUBLINGS):
            open_ = outside.isinf()
            if not bool(open_.any()):
                break
            left = self._outside(steps, reach * signs, open_)
            outside = torch.where(left, reach, outside)
            inside = torch.where(open_ & ~left, reach, inside)
            reach = torch.where(open_ & ~left, 2 * reach, reach)
        found = outside.isfinite()
        for _ in range(_BISECTIONS):
            middle = torch.where(found, (inside + outside) / 2, 0.0)
            left = self._outside(steps, middle * signs, found)
            outside = torch.where(left, middle, outside)
            inside = torch.where(found & ~left, middle, inside)
        return signs * torch.where(found, (inside + outside) / 2, math.inf)

    def _outside(self, steps: Sequence[Direction], at: Tensor, wanted: Tensor) -> Tensor:
        """Which of the wanted points (k, 2) have a loss above the limit, or none."""
        where = wanted.nonzero().tolist()
        states = [Moved(self._start, [(float(at[i, j]), steps[i])]) for i, j in where]
        found = losses_at(self._model, states, self._data, self._loss, self._masking).mean(0)
        left = torch.zeros_like(wanted)
        left[wanted] = ~(found <= self._limit)
        return left


def _slope(variance: Tensor, width: Tensor) -> Estimate:
    """Least squares of log σ² on log F, over the directions whose width is finite."""
    kept = width.isfinite() & (width > 0)
    x, y = width[kept].log(), variance[kept].log()
    n = len(x)
    spread = float((x - x.mean()).square().sum()) if n else 0.0
    if n < 3 or not spread > 0:
        return Estimate(math.nan, math.nan, max(1, n - 1), "directions")
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    rest = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt(float(rest.square().sum()) / (n - 2) / spread)
    return Estimate(slope, error, n - 1, "directions")
