"""The loss on the line between two networks (theory §4; P2 §2.5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import as_batches
from droplens.measure._checks import trainable
from droplens.measure._masks import Masking, Masks
from droplens.measure._risk import Loss, losses_at
from droplens.randomness import private_generator


@dataclass(frozen=True)
class Interpolation:
    """The loss at (1 − α)θ_a + αθ_b.

    Args:
        alphas: α, (k,), float64.
        loss: the loss there, (k,), float64, its mean over masks; NaN or infinite where it is.
        standard_error: of `loss` over masks; 0 where they are not averaged over.
        barrier: how far the loss rises above the straight line between its values at the two
            networks, at most, over the α in [0, 1] that were looked at; 0 if nowhere, NaN if the
            loss is NaN at one of them.
        barrier_error: standard error over masks of the rise where it may be highest: at the α
            inside (0, 1) with the largest mean rise plus two of its errors, also where no mean
            rise lies above 0. A highest of noisy rises is biased upwards (by up to an eighth of
            this in small networks); the 95% interval of a barrier within twice this of 0 holds
            it about 97 times in 100, and of none more often still.
        not_finite: at how many α the loss is NaN or infinite.
        masks: "off", "fixed" or "expected", as for `flatness`.
        draws: of masks; 0 for "off".
        seed: repeats the masks; None for "off".
    """

    alphas: Tensor
    loss: Tensor
    standard_error: Tensor
    barrier: float
    barrier_error: float
    not_finite: int
    masks: Masks
    draws: int
    seed: int | None


def interpolation(  # noqa: PLR0913  # the last three are keywords with defaults
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Any,
    loss: Any,
    points: int | Sequence[float] = 21,
    masks: Masks = "off",
    *,
    draws: int = 16,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Interpolation:
    """The loss along the straight line from one network to another (theory §4; P2 §2.5).

    Floating point buffers (running statistics of norm layers) are interpolated with the weights;
    norm layers are in eval. One pass over the data.

    Args:
        model_a: the network at α = 0; its forward and its dropout are used.
        model_b: the network at α = 1, of the same architecture.
        batches: what `as_batches` takes, with targets.
        loss: a loss object; units and reduction are its own.
        points: how many α from 0 to 1, or the α themselves (P2 takes −0.5 to 1.5).
        masks: as for `flatness`; the same draws at every α.
        draws: of masks, for `"expected"`; at least 2.
        seed: repeats the masks.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the architectures differ, data or weights are bad, there are too few points,
            or `masks` or `draws` is out of range.
    """
    alphas = _checked_points(points)
    loss_of, data = Loss(loss), as_batches(batches, model_a, loss)
    _, used_seed = private_generator(generator, seed)
    masking = Masking(masks, draws, used_seed)
    start, end = _states(model_a, model_b)
    states = [_Mixed(start, end, float(alpha)) for alpha in (0.0, 1.0, *alphas)]
    found = losses_at(model_a, states, data, loss_of, masking)  # (masks, 2 + points)
    first, last, values = found[:, :1], found[:, 1:2], found[:, 2:]
    rise = values - (1 - alphas) * first - alphas * last
    barrier, barrier_error = _barrier(rise, alphas)
    mean = values.mean(0)
    return Interpolation(
        alphas,
        mean,
        _error(values),
        barrier,
        barrier_error,
        int((~mean.isfinite()).sum()),
        masks,
        0 if masks == "off" else len(found),
        masking.seed_used,
    )


def _error(values: Tensor) -> Tensor:
    """Standard error over the rows; 0 for a single one, which is held fixed."""
    n = len(values)
    return values.std(0) / n**0.5 if n > 1 else torch.zeros_like(values[0])


def _barrier(rise: Tensor, alphas: Tensor) -> tuple[float, float]:
    """The highest mean rise (masks, points), none below zero, and its error."""
    mean, error = rise.mean(0), _error(rise)
    if bool(mean[(alphas >= 0) & (alphas <= 1)].isnan().any()):
        return float("nan"), float("nan")
    inside = (alphas > 0) & (alphas < 1)
    if not bool(inside.any()):
        return 0.0, 0.0
    # Towards the ends rise and error vanish together: where noise hides a barrier the highest mean
    # lies there, and its own error would pass a guess for a certainty.
    reach = (mean + 2 * error).where(inside, -torch.inf)
    return max(0.0, float(mean[inside].max())), float(error[int(reach.argmax())])


class _Mixed(Mapping[str, Tensor]):
    """A point of the line, formed only when it is asked for."""

    def __init__(self, start: dict[str, Tensor], end: dict[str, Tensor], alpha: float) -> None:
        self._start, self._end, self._alpha = start, end, alpha

    def __getitem__(self, name: str) -> Tensor:
        a, b = self._start[name], self._end[name]
        if not a.is_floating_point():
            return a
        # Both ends come out exactly, which lerp's a + α(b − a) does not promise.
        return (1 - self._alpha) * a + self._alpha * b

    def __iter__(self) -> Any:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


def _checked_points(points: int | Sequence[float]) -> Tensor:
    if isinstance(points, int) and not isinstance(points, bool):
        if points < 2:
            raise ValueError(f"points has to be at least 2, but got {points}")
        return torch.linspace(0, 1, points, dtype=torch.float64)
    alphas = torch.as_tensor(points, dtype=torch.float64).flatten()
    if len(alphas) == 0 or not bool(alphas.isfinite().all()):
        raise ValueError("points has to hold at least one finite number")
    return alphas


def _states(model_a: nn.Module, model_b: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} has to be a torch module, but got {type(model).__name__}")
        trainable(model)
    start, end = (
        {
            name: value.detach()
            for group in (model.named_parameters(), model.named_buffers())
            for name, value in group
        }
        for model in (model_a, model_b)
    )
    shapes = [{name: v.shape for name, v in state.items()} for state in (start, end)]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise ValueError(
            f"model_a and model_b have to share an architecture, but differ in {odd!r}"
        )
    return start, end
