"""Training linear networks against the theory: many seeds and rates at once, and measured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from droplens.linear._arrays import ArrayLike, as_matrix, check_count, check_rows, drop_variance
from droplens.linear._schemes import Scheme, block_grams, per_example
from droplens.randomness import private_generator
from droplens.training import Plan


@dataclass(frozen=True)
class LinearTraining:
    """What S linear networks did while they trained, at T recorded steps."""

    steps: Tensor
    """(T,), the first 0: before training."""
    objective: Tensor
    """Exact expected loss per example on all the data, (T, S)."""
    excess: Tensor
    """Objective above the global minimum, (T, S); NaN where no closed form knows it."""
    variance: Tensor
    """Variance over hidden units of the importance ‖u_i‖ ‖X v_i‖/√n, (T, S), as P1 plots it."""
    variation: Tensor
    """Coefficient of variation of the importance, (T, S); 0 when equalised."""
    minimum: Tensor
    """The global minimum of each network's objective, (S,); NaN where unknown."""
    outgoing: Tensor
    """U at the end, (S, d_out, r)."""
    incoming: Tensor
    """V at the end, (S, d_in, r)."""
    seed: int
    """Repeats the run."""


def initial_factors(
    count: int,
    d_in: int,
    d_out: int,
    width: int,
    *,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """U (S, d_out, r) and V (S, d_in, r), normal of deviation scale/√r and scale/√d_in, float64.

    Raises:
        TypeError: if a size is not an int.
        ValueError: if a size is below 1, or both a generator and a seed are given.
    """
    for name, size in (("count", count), ("d_in", d_in), ("d_out", d_out), ("width", width)):
        check_count(name, size)
    source, _ = private_generator(generator, seed)
    outer = torch.randn(count, d_out, width, generator=source, dtype=torch.float64)
    inner = torch.randn(count, d_in, width, generator=source, dtype=torch.float64)
    return outer * (scale / width**0.5), inner * (scale / d_in**0.5)


def train_linear(
    start: tuple[Tensor, Tensor],
    data: tuple[ArrayLike, ArrayLike],
    scheme: Scheme,
    plan: Plan | None = None,
    *,
    record_every: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> LinearTraining:
    """Train S linear networks x ↦ U Vᵀx at once, each at its rate, and measure them on the way.

    Args:
        start: U (S, d_out, r) and V (S, d_in, r); a width of S for every rate of the scheme.
        data: X (n, d_in) and Y (n, d_out); every network sees its own order of the examples, but
            for those that the scheme lets share it.
        scheme: what falls: `Dropout`, `DropConnect`, `DropBlock`, or `Deterministic` of one.
        plan: how to train; by default 40 epochs of Adam at 1e-3 in batches of 32.
        record_every: steps between measurements; about 50 over the run if not given.
        seed: repeats the run.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not fit, or data holds NaN or Inf.
    """
    plan = plan or Plan()
    U, V, X, Y = _checked(start, data, scheme)
    device = U.device
    source, seed = private_generator(generator, seed, device)
    U, V = (factor.detach().clone().requires_grad_() for factor in (U, V))
    optimizer = _optimizer([U, V], plan)
    n, count = len(X), len(U)
    size = min(plan.batch_size or n, n)
    total = plan.epochs * -(-n // size)
    every = (
        max(1, total // 50) if record_every is None else check_count("record_every", record_every)
    )
    log = _Log(scheme, X, Y, U.shape[-1])
    log.record(0, U, V)
    done = 0
    for _ in range(plan.epochs):
        order = torch.rand(count // scheme.sharing, n, generator=source, device=device).argsort(1)
        order = order.repeat(scheme.sharing, 1)
        for first in range(0, n, size):
            rows = order[:, first : first + size]
            batch = (X, Y) if size == n else (X[rows], Y[rows])
            optimizer.zero_grad(set_to_none=True)
            scheme.loss(U, V, *batch, source).sum().backward()
            optimizer.step()
            done += 1
            if done % every == 0 or done == total:
                log.record(done, U, V)
    return log.finish(U, V, seed)


def expected_objective(
    p: float, block_size: int = 1
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The deterministic objective for `droplens.training.train`: no masks, their exact cost.

    For networks of two bias-free `nn.Linear` layers; batches over networks under `torch.func.vmap`.

    Args:
        p: drop probability of the hidden units, below 1; dropout layers in the network are ignored.
        block_size: b, consecutive hidden units that fall together.

    Returns:
        A function (model, inputs, targets) -> the expected loss per example, a scalar.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if p is outside [0, 1) or the size below 1.
    """
    variance, b = drop_variance(p), check_count("block_size", block_size)

    def value(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if len(layers) != 2 or any(layer.bias is not None for layer in layers):
            raise ValueError(
                "the model has to have two nn.Linear layers without bias, but has "
                f"{[str(layer) for layer in layers]}"
            )
        hidden = inputs @ layers[0].weight.mT
        U = layers[1].weight
        grams = block_grams(U, b) * block_grams(hidden, b)
        return per_example(targets - hidden @ U.mT) + variance * grams.sum() / inputs.shape[0]

    return value


class _Log:
    """What is measured at the recorded steps."""

    def __init__(self, scheme: Scheme, X: Tensor, Y: Tensor, width: int) -> None:
        self._scheme, self._X, self._Y = scheme, X, Y
        known = scheme.minimum(X.cpu(), Y.cpu(), width)
        unknown = torch.full((len(scheme.rates),), torch.nan, dtype=torch.float64)
        self._minimum = unknown if known is None else known
        self._steps: list[int] = []
        self._rows: list[Tensor] = []

    def record(self, step: int, U: Tensor, V: Tensor) -> None:
        with torch.no_grad():
            value = self._scheme.expected(U, V, self._X, self._Y)
            hidden = (self._X @ V).square().mean(-2).sqrt()  # ‖X v_i‖/√n, (S, r)
            scores = U.square().sum(-2).sqrt() * hidden
            variance = scores.var(-1, correction=0)
            variation = variance.sqrt() / scores.mean(-1).clamp(min=torch.finfo(U.dtype).tiny)
            self._steps.append(step)
            self._rows.append(torch.stack([value, variance, variation]).double().cpu())

    def finish(self, U: Tensor, V: Tensor, seed: int) -> LinearTraining:
        objective, variance, variation = torch.stack(self._rows, 1)  # each (T, S)
        return LinearTraining(
            steps=torch.tensor(self._steps),
            objective=objective,
            excess=objective - self._minimum,
            variance=variance,
            variation=variation,
            minimum=self._minimum,
            outgoing=U.detach(),
            incoming=V.detach(),
            seed=seed,
        )


def _optimizer(parameters: list[Tensor], plan: Plan) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if plan.optimizer == "adam" else torch.optim.SGD
    return kind(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)


def _checked(
    start: tuple[Tensor, Tensor], data: tuple[ArrayLike, ArrayLike], scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors and data that fit each other and the scheme, of one dtype and device.

    Raises:
        TypeError: if `scheme` is not a scheme or a factor not a tensor.
        ValueError: if shapes do not fit, or data holds NaN or Inf.
    """
    if not isinstance(scheme, Scheme):
        raise TypeError(f"scheme has to be a Scheme, but got {type(scheme).__name__}")
    U, V = start
    for name, factor in (("outgoing", U), ("incoming", V)):
        if not isinstance(factor, Tensor):
            raise TypeError(f"start has to hold tensors, but {name} is {type(factor).__name__}")
        if factor.dim() != 3 or len(factor) != len(scheme.rates):
            raise ValueError(
                f"start has to hold a factor for each of the {len(scheme.rates)} rates, but "
                f"{name} has shape {tuple(factor.shape)}"
            )
    X, Y = (
        torch.as_tensor(as_matrix(name, array)).to(U)
        for name, array in zip("XY", data, strict=True)
    )
    check_rows(X, Y)
    d_out, d_in, r = U.shape[1], V.shape[1], U.shape[2]
    if (X.shape[1], Y.shape[1], V.shape[2]) != (d_in, d_out, r):
        raise ValueError(
            f"start maps {d_in} inputs to {d_out} outputs over {r} and {V.shape[2]} units, but X "
            f"has {X.shape[1]} columns and Y {Y.shape[1]}"
        )
    return U, V, X, Y
