"""One small trainer with an objective argument, for many networks of one architecture at once.

The S networks' parameters lie stacked along a leading axis, so that one step of all costs little
more than the arithmetic. Sequences of Linear, ReLU, Tanh, GELU, Dropout and Flatten run as batched
matrix products; anything else through `torch.func.vmap`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from droplens._stacks import Objective, stack
from droplens.randomness import private_generator

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """How to train: passes over the data, examples a step (None: all), step size, optimiser.

    Raises:
        ValueError: if a number is not positive, or `optimizer` is neither of the two.
    """

    epochs: int = 40
    batch_size: int | None = 32
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            value = getattr(self, name)
            if not (value is None and name == "batch_size") and not value > 0:
                raise ValueError(f"{name} has to be positive, but got {value}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay has to be at least 0, but got {self.weight_decay}")
        if self.optimizer not in {"adam", "sgd"}:
            raise ValueError(f"optimizer has to be 'adam' or 'sgd', but got {self.optimizer!r}")


@dataclass(frozen=True)
class Training:
    """What came out: the trained copies, the objective by epoch and network, the seed.

    `history` (epochs, S) is the mean over an epoch's examples of the objective as it was minimised,
    masks on, each batch before its step.
    """

    networks: tuple[nn.Module, ...]
    history: Tensor
    seed: int

    @property
    def diverged(self) -> tuple[int, ...]:
        """Which networks ended with an objective that is NaN or infinite."""
        return tuple((~self.history[-1].isfinite()).nonzero().flatten().tolist())


def initialise(
    build: Callable[[], nn.Module],
    count: int,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, ...]:
    """Call `build` `count` times, each time from a seed of its own; the global stream is restored.

    Network i depends on `seed` and i alone, not on `count`.

    Raises:
        ValueError: if `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count has to be at least 1, but got {count}")
    private, _ = private_generator(generator, seed)
    with torch.random.fork_rng(devices=_cuda_devices()):
        networks = []
        for child in _child_seeds(private, count):
            _seed_global_streams(child)
            networks.append(build())
    return tuple(networks)


def train(
    networks: Sequence[nn.Module],
    data: tuple[Tensor, Tensor],
    objective: Objective,
    plan: Plan | None = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    on_step: Progress | None = None,
) -> Training:
    """Train copies of `networks`, which share an architecture, at once; each from its own seed.

    The networks may differ in their weights and in the rates of their `nn.Dropout`s. Each draws
    its own order of the examples and its own masks. Where all layers are plain (see above), what
    becomes of network i depends on `seed` and i alone, not on its companions.

    Args:
        networks: S modules; they stay as they are, and so do the modes of their copies.
        data: inputs (n, …) and targets (n, …), on the networks' device.
        objective: a torch loss module of (outputs, targets), or a function (model, inputs,
            targets) -> scalar that `torch.func.vmap` can batch over networks.
        plan: how to train; by default 40 epochs of Adam at 1e-3 in batches of 32.
        seed: repeats the run.
        generator: where the seed is drawn from instead.
        on_step: called as on_step(done, total) after every step.

    Raises:
        TypeError: if `networks` or `data` are not what is asked for.
        ValueError: if the networks differ in architecture, have nothing to train or hold NaN or
            Inf, or the data are empty, of unequal length, on another device or hold NaN or Inf.
    """
    plan = plan or Plan()
    _check_networks(networks)
    inputs, targets = _checked_data(data, networks)
    device = inputs.device
    private, seed = private_generator(generator, seed)
    seeds = _child_seeds(private, len(networks))
    # Two streams a network: an order of examples that does not depend on what the masks consume.
    orders = [torch.Generator().manual_seed(child) for child in seeds]
    masks = [torch.Generator(device=device).manual_seed(child + 1) for child in seeds]
    stacked = stack(networks, objective, masks, inputs)
    optimizer = _make_optimizer(stacked.parameters, plan)

    n = len(inputs)
    size = min(plan.batch_size or n, n)
    total = plan.epochs * -(-n // size)
    history = torch.zeros(plan.epochs, len(networks), device=device)
    done = 0
    for epoch in range(plan.epochs):
        order = None if size == n else torch.stack([torch.randperm(n, generator=g) for g in orders])
        for start in range(0, n, size):
            rows = None if order is None else order[:, start : start + size].to(device)
            values = stacked.objective(inputs, targets, rows)
            optimizer.zero_grad(set_to_none=True)
            values.sum().backward()
            optimizer.step()
            history[epoch] += values.detach() * (min(size, n - start) / n)
            done += 1
            if on_step is not None:
                on_step(done, total)
    return Training(stacked.unstack(networks), history.cpu(), seed)


# --- Checks and small parts --------------------------------------------------------------------


def _child_seeds(generator: torch.Generator, count: int) -> list[int]:
    """One seed a network; the i-th does not depend on `count`."""
    return [
        int(torch.randint(2**53, (), generator=generator, dtype=torch.int64)) for _ in range(count)
    ]


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _seed_global_streams(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if _cuda_devices():
        torch.cuda.manual_seed_all(seed)


def _make_optimizer(parameters: list[Tensor], plan: Plan) -> torch.optim.Optimizer:
    rate, decay = plan.learning_rate, plan.weight_decay
    if plan.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, fused=True)


def _check_networks(networks: Sequence[nn.Module]) -> None:
    if isinstance(networks, nn.Module) or not all(isinstance(n, nn.Module) for n in networks):
        raise TypeError(
            "networks has to be a sequence of torch modules; put a single one in a list"
        )
    if not networks:
        raise ValueError("networks has to hold at least one network, but it is empty")
    plans = [_architecture(network) for network in networks]
    for i, plan in enumerate(plans):
        if plan != plans[0]:
            raise ValueError(
                f"networks has to hold one architecture (dropout rates may differ), but network "
                f"{i} differs from network 0; train them in separate calls"
            )
        for name, parameter in networks[i].named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"networks[{i}] holds NaN or Inf in {name!r}; initialise it anew")
    if not any(parameter.requires_grad for parameter in networks[0].parameters()):
        raise ValueError("networks has no parameters that require gradients: nothing to train")


def _architecture(network: nn.Module) -> list[object]:
    modules = [
        (name, type(module), "" if type(module) is nn.Dropout else module.extra_repr())
        for name, module in network.named_modules()
    ]
    parameters = [
        (name, parameter.shape, parameter.dtype, parameter.device, parameter.requires_grad)
        for name, parameter in network.named_parameters()
    ]
    return [modules, parameters]


def _checked_data(
    data: tuple[Tensor, Tensor], networks: Sequence[nn.Module]
) -> tuple[Tensor, Tensor]:
    if not (isinstance(data, Sequence) and len(data) == 2):
        raise TypeError("data has to be a pair (inputs, targets) of tensors")
    device = next(networks[0].parameters()).device
    for name, tensor in zip(("inputs", "targets"), data, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} has to be a tensor, but got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device} but the networks are on {device}; move one of them"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or Inf; remove those examples")
    inputs, targets = data
    if len(inputs) == 0:
        raise ValueError("inputs is empty; give at least one example")
    if len(inputs) != len(targets):
        raise ValueError(f"inputs has {len(inputs)} examples but targets has {len(targets)}")
    return inputs, targets
