"""Curvature of a network's model manifold: its predictions as its weights move (theory §4; P3)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from droplens.calling import check_outputs
from droplens.estimates import Estimate, mean_estimate
from droplens.losses import Family, Squared
from droplens.losses import family as family_of
from droplens.measure._checks import trainable
from droplens.measure._coordinates import Connection, Metric, freedom, metric_at
from droplens.measure._directions import Direction, given_direction
from droplens.measure._manifold import ManifoldCurvature, TangentMap, curvature_along, not_twice
from droplens.measure._predictor import EXAMPLES, Opened, Piece, predictor_of
from droplens.measure._slices import Slice, slice_of
from droplens.randomness import private_generator

# What single precision can be asked for, where a model refuses double.
_COARSE: Final = 1e-4
# Of so few columns, and numbers, J is formed: one solve takes more products than it has columns.
_FORMED: Final = 64
_MOST_FORMED: Final = 2**22


@dataclass(frozen=True)
class Curvature:
    """Curvature of the manifold of predictions, in the mean metric over inputs.

    Over few directions, or in a slice of few parameters, the values are skewed (‖d‖ varies by
    multiples): their interval then covers less than it says, 91% instead of 95% over 8 directions
    of 227 parameters (94% over 40), 92% with 21 parameters.

    Raw curvatures are in 1/length, where length² is the metric's (units of the loss); scale-free
    ones are multiplied by `length`, the rms distance of the predictions from their mean.

    Args:
        connection: "e", in natural parameters with metric H; "m", in expectation parameters with
            metric H⁺.
        intrinsic: κ = ‖a_⊥‖/‖d‖², mean over directions.
        parameter_effects: ‖a_∥‖/‖d‖², mean over directions.
        scale_free: κ · length. In expectation parameters of a confident softmax the length is huge,
            because the metric divides by probabilities: compare raw values there.
        scale_free_parameter_effects: the same of the parameter effects.
        length: the predictions' rms metric distance from their mean over inputs.
        values: intrinsic and parameter effects of every direction, (directions, 2).
        residual: the largest of the least-squares solves.
        parameters: how many numbers of each parameter may move.
        outputs: free outputs, n·T·C (C − 1 for softmax), against which these count.
        draws: masks in the average, 1 for those of one draw; None for the network without dropout.
        mask_bias: what the finite number of masks adds to κ, judged from halves of them by its
            1/draws in κ²; subtract it for the limit of many masks. None for less than two.
        masks: "off", "fixed" or "averaged", the same masks held for every product.
        seed: repeats slice, directions and masks.
    """

    connection: Connection
    intrinsic: Estimate
    parameter_effects: Estimate
    scale_free: Estimate
    scale_free_parameter_effects: Estimate
    length: float
    values: Tensor
    residual: float
    parameters: Mapping[str, int]
    outputs: int
    draws: int | None
    mask_bias: Estimate | None
    masks: str
    seed: int


def curvature(  # noqa: PLR0913  # the last three are keywords with defaults
    model: nn.Module,
    inputs: Any,
    loss: Any,
    connection: Connection = "e",
    directions: int | Sequence[Direction] = 40,
    draws: int | None = None,
    *,
    parameters: Collection[str] | int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Curvature:
    """How the manifold of a network's predictions on `inputs` bends as its weights move (P3).

    The predictions on all inputs are one point z; along v in the weights it has velocity d = Jv and
    acceleration a = D²z[v, v], by jvp of jvp. a is split on the span of J by LSMR (theory §4),
    with J formed once where no more than 64 numbers move.
    Second derivatives of kinks (ReLU) are those almost everywhere. In double precision where the
    model allows it; norm layers are in eval.

    With `draws`, z is the average over that many masks per input, the same for every product:
    logits are averaged for "e", probabilities for "m". Their noise bends the manifold too, and
    adds O(1/draws) to κ²: `mask_bias` says how much, roughly. One draw is held as it is: the
    curvature of a network with those units dropped.

    Args:
        model: any torch module that can be differentiated twice.
        inputs: a tensor, tuple or mapping, or a loader; more free outputs than parameters move.
        loss: a loss object of exponential-family form; its reduction and the weights it gives to
            classes do not matter, because the metric is the mean over inputs.
        connection: "e" or "m".
        directions: how many Gaussian ones to draw, or a sequence of {parameter name: step}.
        draws: masks to average over, or 1 for one held draw; without them dropout is off.
        parameters: the slice of parameters that may move: names, or how many numbers to draw at
            random; all that are trainable if not given.
        seed: repeats the slice, the directions and the masks.
        generator: where the seed is drawn from instead.

    Returns:
        Curvatures with standard errors over directions; the data, the slice and the masks held.

    Raises:
        TypeError: if an argument is of the wrong type, or the loss's A(f) is not known.
        ValueError: if the parameters are at least as many as the free outputs (then J can span
            everything and κ vanishes), nothing is trainable, weights or data are bad, data change
            between passes, a direction moves nothing or leaves the slice, the model cannot be
            differentiated twice, or an argument is out of range.
        RuntimeError: if a least-squares solve does not reach 1e-8.
    """
    if connection not in {"e", "m"}:
        raise ValueError(f"connection has to be 'e' or 'm', but got {connection!r}")
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f"draws has to be a whole number of at least 1, or None, but got {draws}")
    family, (source, used_seed) = family_of(loss), private_generator(generator, seed)
    trainable(model)
    predictor = predictor_of(model, inputs, family, connection)
    moving = slice_of(model, parameters, predictor.dtype, source)
    steps = _steps(model, directions, moving, source)
    with predictor.opened(draws, used_seed) as opened:
        whole = _Network(opened, moving, range(draws or 1))
        found = [curvature_along(whole, step) for step in steps]
        bias = _mask_bias(opened, moving, draws, steps, found) if draws and draws > 1 else None
    values = torch.tensor([[c.intrinsic, c.parameter_effects] for c in found], dtype=torch.float64)
    return Curvature(
        connection,
        mean_estimate(values[:, 0], "directions"),
        mean_estimate(values[:, 1], "directions"),
        mean_estimate(values[:, 0] * whole.length, "directions"),
        mean_estimate(values[:, 1] * whole.length, "directions"),
        whole.length,
        values,
        max(c.residual for c in found),
        moving.counts,
        whole.freedom,
        draws,
        bias,
        "off" if draws is None else "fixed" if draws == 1 else "averaged",
        used_seed,
    )


def _mask_bias(
    opened: "Opened",
    moving: Slice,
    draws: int,
    steps: Sequence[Tensor],
    found: Sequence[ManifoldCurvature],
) -> Estimate:
    """What the masks' noise adds to κ: it adds to κ², in inverse proportion to their number."""
    half = draws // 2
    parts = [_Network(opened, moving, range(k * half, (k + 1) * half)) for k in range(2)]
    # From 1/half − 1/draws to 1/draws, for odd numbers of masks too.
    share = half / (draws - half)
    added = []
    for step, whole in zip(steps, found, strict=True):
        halves = sum(curvature_along(part, step).intrinsic ** 2 for part in parts) / 2
        square = whole.intrinsic**2 - share * (halves - whole.intrinsic**2)
        added.append(whole.intrinsic - max(0.0, square) ** 0.5)
    return mean_estimate(added, "directions")


def _steps(
    model: nn.Module,
    directions: int | Sequence[Direction],
    moving: Slice,
    source: torch.Generator,
) -> list[Tensor]:
    """Directions in the slice, (size,) each.

    Raises:
        TypeError: if `directions` is neither a number nor a sequence.
        ValueError: if there is none, or one is bad or leaves the slice.
    """
    like = moving.values()
    if isinstance(directions, int) and not isinstance(directions, bool):
        if directions < 1:
            raise ValueError(f"directions has to be at least 1, but got {directions}")
        drawn = (
            torch.randn(len(like), generator=source, device=source.device, dtype=torch.float64)
            for _ in range(directions)
        )
        return [step.to(like) for step in drawn]
    if isinstance(directions, bool | str) or not isinstance(directions, Sequence):
        raise TypeError(
            "directions has to be a number or a sequence of {parameter name: step}, but got "
            f"{type(directions).__name__}"
        )
    if not directions:
        raise ValueError("directions is empty; give at least one")
    steps = []
    for i, direction in enumerate(directions):
        given = given_direction(model, direction, i)
        if not moving.covers(given):
            raise ValueError(
                f"directions[{i}] moves parameters outside the slice {', '.join(moving.places)}"
            )
        steps.append(moving.of(given))
        if not bool(steps[-1].any()):
            raise ValueError(f"directions[{i}] is zero; it has to point somewhere")
    return steps


@final
class _Network(TangentMap):
    """The predictions of a network, or their average over masks, as a function of a slice."""

    def __init__(self, opened: Opened, moving: Slice, draws: range) -> None:
        self._opened, self._moving, self._draws = opened, moving, draws
        predictor = opened.predictor
        self._predictor, self._theta, self.size = predictor, moving.values(), moving.size
        if predictor.dtype != torch.float64:
            self.tolerance, self.stop = _COARSE, _COARSE / 100
        f, z = self._means()
        self.freedom = freedom(predictor.family, z)
        _check_room(self.size, self.freedom, z, predictor.family)
        scale = _scale(predictor.family, z)
        plain = f if len(draws) == 1 else None
        self._metric: Metric = metric_at(predictor.family, z, predictor.connection, plain, scale)
        self._shape = z.shape
        self.length = float(self._metric.weigh(z - z.mean(0)).norm())
        self._formed = self._form()
        self._held = self._hold() if self._formed is None else None

    def push(self, w: Tensor) -> Tensor:
        if self._formed is not None:
            return self._formed @ w.to(self._formed)
        return self._weighed(self._forwards(lambda point: point, w)[1])

    def pull(self, u: Tensor) -> Tensor:
        if self._formed is not None:
            return self._formed.mT @ u.to(self._formed)
        cotangent = self._metric.unweigh(u.to(self._theta).view(self._shape)) / len(self._draws)
        if self._held is not None:
            found: tuple[Tensor] = self._held(cotangent)
            return found[0]
        total, start = torch.zeros_like(self._theta), 0
        for piece in self._predictor.pieces():
            rows = slice(start, start + piece.size)
            start = rows.stop
            for group in self._groups(piece):
                back = vjp(self._coordinates(piece, group), self._theta)[1]
                total += back(cotangent[rows])[0]
        return total

    def bend(self, v: Tensor) -> tuple[Tensor, Tensor]:
        v = v.to(self._theta)

        def velocity(point: Any) -> Any:
            return lambda theta: jvp(point, (theta,), (v,))[1]

        d, a = self._forwards(velocity, v)
        return self._weighed(d), self._weighed(a)

    def _weighed(self, x: Tensor) -> Tensor:
        return self._metric.weigh(x.view(self._shape)).flatten()

    def _forwards(self, of: Any, w: Tensor) -> tuple[Tensor, Tensor]:
        """Value and derivative along w of `of(point)`, averaged over masks, over all pieces.

        Raises:
            ValueError: if the model cannot be differentiated forwards.
        """
        w = w.to(self._theta)
        values, slopes = [], []
        for piece in self._predictor.pieces():
            value: Any = 0.0
            slope: Any = 0.0
            for group in self._groups(piece):
                try:
                    own = jvp(of(self._coordinates(piece, group)), (self._theta,), (w,))
                except RuntimeError as error:
                    raise ValueError(not_twice(error)) from error
                value, slope = value + own[0], slope + own[1]
            values.append(value / len(self._draws))
            slopes.append(slope / len(self._draws))
        return torch.cat(values), torch.cat(slopes)

    def _coordinates(self, piece: Piece, group: range) -> Any:
        def point(theta: Tensor) -> Tensor:
            return self._opened.point(self._moving.state(theta), piece, group)[1]

        return point

    def _groups(self, piece: Piece) -> list[range]:
        """Draws that fit one pass together."""
        size = 1 if self._opened.shared else max(1, EXAMPLES // piece.size)
        return [self._draws[start : start + size] for start in range(0, len(self._draws), size)]

    def _means(self) -> tuple[Tensor, Tensor]:
        """Natural parameters and coordinates at θ, averaged over masks: (n, T, C)."""
        state, fs, zs = self._moving.start, [], []
        with torch.no_grad():
            for piece in self._predictor.pieces():
                found = [self._opened.point(state, piece, g) for g in self._groups(piece)]
                fs.append(torch.stack([f for f, _ in found]).sum(0) / len(self._draws))
                zs.append(torch.stack([z for _, z in found]).sum(0) / len(self._draws))
        f, z = torch.cat(fs), torch.cat(zs)
        check_outputs(self._predictor.model, f)
        return f, z

    def _form(self) -> Tensor | None:
        """J, (m, size), where it is narrow enough: every direction's solve then uses the same."""
        if self.size > _FORMED or self.size * self._shape.numel() > _MOST_FORMED:
            return None
        units = torch.eye(self.size).to(self._theta)
        columns = [self._weighed(self._forwards(lambda point: point, e)[1]) for e in units]
        return torch.stack(columns, 1)

    def _hold(self) -> Any:
        """The reverse pass where there is but one, kept: one graph, as in training.

        Raises:
            ValueError: if the model cannot be differentiated.
        """
        pieces = list(islice(self._predictor.pieces(), 2))
        if len(pieces) > 1 or len(self._groups(pieces[0])) > 1:
            return None
        try:
            return vjp(self._coordinates(pieces[0], self._draws), self._theta)[1]
        except RuntimeError as error:
            raise ValueError(not_twice(error)) from error


def _scale(family: Family, z: Tensor) -> Tensor:
    """Weights of the terms whose sum over inputs is their mean: 1/(n·T), doubled for MSELoss."""
    n, terms, _ = z.shape
    return z.new_full((n, terms), (2 if isinstance(family, Squared) else 1) / (n * terms))


def _check_room(size: int, free: int, z: Tensor, family: Family) -> None:
    """Refuse slices in which the curvature has to vanish.

    Raises:
        ValueError: if J can span all free outputs.
    """
    if size < free:
        return
    n = len(z)
    raise ValueError(
        f"{size} parameters move but the predictions have only {free} free outputs ({n} inputs × "
        f"{free // n} each): J can span them all, the manifold fills its space, and its "
        "curvature is zero whatever the network. Give more inputs, or a slice of the parameters: "
        "parameters=['name', ...] or parameters=<how many numbers to draw>"
    )
