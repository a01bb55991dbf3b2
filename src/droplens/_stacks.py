"""Networks of one architecture with their parameters stacked along a leading axis S."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

Objective = nn.Module | Callable[[nn.Module, Tensor, Tensor], Tensor]
Layer = Callable[[Tensor], Tensor]


class Stack(ABC):
    """S networks as one: `objective` gives their S values, `unstack` the trained copies."""

    parameters: list[Tensor]

    @abstractmethod
    def objective(self, inputs: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        """Each network's objective, shape (S,), on its own `rows` (S, B), or on all examples."""

    @abstractmethod
    def outputs(self, x: Tensor) -> Tensor:
        """Each network's outputs (S, B, …) on its own inputs (S, B, …)."""

    @abstractmethod
    def unstack(self, networks: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        """Copies of `networks` that carry the stack's parameters and buffers."""


def stack(
    networks: Sequence[nn.Module],
    objective: Objective,
    masks: list[torch.Generator],
    inputs: Tensor,
) -> Stack:
    """The fastest stack that can hold `networks`; `masks` are their private streams."""
    chains = [_plain_layers(network) for network in networks]
    if isinstance(objective, nn.Module) and _fits(chains[0], inputs):
        return PlainStack([chain or [] for chain in chains], networks, objective, masks)
    return MappedStack(networks, objective, masks)


# --- Plain sequences ---------------------------------------------------------------------------

_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.Identity)
_PLAIN = (nn.Linear, nn.Dropout, nn.Flatten, *_ACTIVATIONS)


def _plain_layers(network: nn.Module) -> list[nn.Module] | None:
    """The layers of a (nested) nn.Sequential in order, or None if one of them is not plain."""
    if _is_hooked(network):
        return None
    if type(network) is nn.Sequential:
        chains = [_plain_layers(child) for child in network]
        if any(chain is None for chain in chains):
            return None
        layers = [layer for chain in chains if chain is not None for layer in chain]
        # A layer that is used twice has one gradient; copies of it would have two.
        return layers if len({id(layer) for layer in layers}) == len(layers) else None
    # Exact types: a subclass, or a parametrised layer, computes something else.
    if type(network) not in _PLAIN:
        return None
    if isinstance(network, nn.Flatten) and (network.start_dim, network.end_dim) != (1, -1):
        return None
    return [network]


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _fits(layers: list[nn.Module] | None, inputs: Tensor) -> bool:
    """Whether the chain has weights to stack and takes one row per example."""
    if layers is None or not any(isinstance(layer, nn.Linear) for layer in layers):
        return False
    shared = [id(p) for layer in layers for p in layer.parameters()]
    if len(set(shared)) < len(shared):
        return False
    flat = inputs.dim() == 2
    for layer in layers:
        flat = flat or isinstance(layer, nn.Flatten)
        if isinstance(layer, nn.Linear) and not flat:
            return False
    return True


class PlainStack(Stack):
    """Sequences of plain layers: batched matrix products, each network's masks its own stream."""

    def __init__(
        self,
        chains: Sequence[list[nn.Module]],
        networks: Sequence[nn.Module],
        loss: nn.Module,
        masks: list[torch.Generator],
    ) -> None:
        self._weights: dict[str, Tensor] = {}
        names = {id(p): name for name, p in networks[0].named_parameters()}
        others = [dict(network.named_parameters()) for network in networks]
        for parameter in networks[0].parameters():
            name = names[id(parameter)]
            # Weights lie as (S, d_in, d_out): their gradient then comes out contiguous, where
            # a transposed one costs a copy that takes as long as the product itself.
            stacked = torch.stack([own[name].detach().t() for own in others])
            self._weights[name] = stacked.requires_grad_(parameter.requires_grad)
        self.parameters = [w for w in self._weights.values() if w.requires_grad]
        self._layers = self._compile(list(zip(*chains, strict=True)), names, masks)
        self._losses = _stacked_loss(loss)

    def _compile(
        self,
        layers: list[tuple[nn.Module, ...]],
        names: dict[int, str],
        masks: list[torch.Generator],
    ) -> list[Layer]:
        steps: list[Layer] = []
        for i, twins in enumerate(layers):
            layer = twins[0]
            if isinstance(layer, nn.Linear):
                bias = None if layer.bias is None else self._weights[names[id(layer.bias)]]
                rectified = i + 1 < len(layers) and isinstance(layers[i + 1][0], nn.ReLU)
                steps.append(_linear(self._weights[names[id(layer.weight)]], bias, rectified))
            elif isinstance(layer, nn.Dropout):
                rates = [float(twin.p) for twin in twins if isinstance(twin, nn.Dropout)]
                steps.append(_dropout(rates, masks))
            elif isinstance(layer, nn.Flatten):
                steps.append(lambda x: x.flatten(2))
            elif not (isinstance(layer, nn.ReLU) and i and isinstance(layers[i - 1][0], nn.Linear)):
                steps.append(layer.forward)
        return steps

    def objective(self, inputs: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        n_networks = len(self.parameters[0])
        if rows is None:
            x = inputs.expand(n_networks, *inputs.shape)
            y = targets.expand(n_networks, *targets.shape)
        else:
            x, y = inputs[rows], targets[rows]
        return self._losses(self.outputs(x), y)

    def outputs(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            x = layer(x)
        return x

    def unstack(self, networks: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        own = {name: w.mT if w.dim() == 3 else w for name, w in self._weights.items()}
        return _unstack(networks, own, {})


class _Affine(torch.autograd.Function):
    """x (S, B, i) -> x Wᵀ + b (S, B, o) for Wᵀ (S, i, o), b (S, o), rectified if asked.

    Written out for two reasons. Matrix products with an axis of length 1, which networks of one
    input or one output consist of, are ten times slower than sums in most of the layouts that
    autograd chooses. And a rectifier in place, forward and backward, spares fresh memory, whose
    first touch costs more than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rectified: bool
    ) -> Tensor:
        n_in, n_out = weight.shape[1:]
        factor = weight.view(-1, 1, n_in).mT if n_out == 1 < n_in else weight
        if n_in == 1:
            y = x * weight if bias is None else torch.addcmul(bias[:, None], x, weight)
        else:
            y = torch.bmm(x, factor) if bias is None else torch.baddbmm(bias[:, None], x, factor)
        if rectified:
            y.relu_()
        ctx.save_for_backward(x, weight, y if rectified else None)
        ctx.biased = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, weight, y = ctx.saved_tensors
        if y is not None:
            # Nobody else holds this gradient: every output here has one consumer.
            g = g.contiguous()
            torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)
        n_in, n_out = weight.shape[1:]
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            row = weight.view(-1, 1, n_in)
            to_x = g * row if n_out == 1 else torch.bmm(g, weight.mT)
        if ctx.needs_input_grad[1]:
            transposed = n_out == 1 < n_in
            to_weight = torch.bmm(g.mT, x).mT if transposed else torch.bmm(x.mT, g)
            to_weight = to_weight.reshape(weight.shape)
        if ctx.biased and ctx.needs_input_grad[2]:
            to_bias = g.sum(1)
        return to_x, to_weight, to_bias, None


def _linear(weight: Tensor, bias: Tensor | None, rectified: bool) -> Layer:
    def apply(x: Tensor) -> Tensor:
        y: Tensor = _Affine.apply(x, weight, bias, rectified)  # type: ignore[no-untyped-call]
        return y

    return apply


def _dropout(rates: list[float], masks: list[torch.Generator]) -> Layer:
    """Network s drops at its own rate and draws from its own stream."""
    if not any(rates):
        return lambda x: x
    device = masks[0].device

    def apply(x: Tensor) -> Tensor:
        shape = (len(rates), *(1,) * (x.dim() - 1))
        bound = torch.tensor(rates, device=device, dtype=x.dtype).view(shape)
        scale = torch.tensor([_scale(p) for p in rates], device=device, dtype=x.dtype).view(shape)
        noise = x.new_zeros(x.shape)
        for rate, generator, own in zip(rates, masks, noise, strict=True):
            if rate > 0:
                own.uniform_(generator=generator)
        return x * (noise >= bound).mul(scale)

    return apply


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _stacked_loss(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss module as a function of outputs (S, B, …) and targets (S, B, …): values (S,)."""
    if type(loss) is nn.MSELoss and loss.reduction == "mean":
        return _squared_errors
    if type(loss) is nn.CrossEntropyLoss and loss.reduction == "mean":
        plain = loss.weight is None and loss.ignore_index == -100 and loss.label_smoothing == 0
        if plain:
            return _cross_entropies
    mapped: Callable[[Tensor, Tensor], Tensor] = vmap(loss)
    return mapped


def _squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    _same_shape(outputs, targets)
    return (outputs - targets).square().flatten(1).mean(1)


def _cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.dim() != 3 or targets.dim() != 2 or bool((targets == -100).any()):
        values: Tensor = vmap(F.cross_entropy)(outputs, targets)
        return values
    each = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view(targets.shape).mean(1)


def _same_shape(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise ValueError(
            f"targets has to have the shape of the outputs, (n, {outputs.shape[2:]}), but "
            f"got (n, {targets.shape[2:]})"
        )


# --- Any architecture --------------------------------------------------------------------------


class MappedStack(Stack):
    """Any architecture: parameters stacked by torch.func, the model mapped over the networks."""

    def __init__(
        self, networks: Sequence[nn.Module], objective: Objective, masks: list[torch.Generator]
    ) -> None:
        copies = [copy.deepcopy(network).train() for network in networks]
        _lift_rates(copies)
        self._state, self._buffers = stack_module_state(copies)
        self.parameters = [value for value in self._state.values() if value.requires_grad]
        self._wrapped = _WithObjective(copies[0], objective)
        # vmap draws from the global stream alone: lend it a private one.
        self._stream = masks[0]

    def objective(self, inputs: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        axis = None if rows is None else 0
        x, y = (inputs, targets) if rows is None else (inputs[rows], targets[rows])
        mapped = vmap(self._one, in_dims=(0, 0, axis, axis), randomness="different")
        with lent_stream(self._stream):
            values: Tensor = mapped(self._state, self._buffers, x, y)
        return values

    def outputs(self, x: Tensor) -> Tensor:
        def one(state: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            result: Tensor = functional_call(self._wrapped.model, {**state, **buffers}, (x,))
            return result

        with lent_stream(self._stream):
            values: Tensor = vmap(one, randomness="different")(self._state, self._buffers, x)
        return values

    def _one(
        self, state: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> Tensor:
        own = {f"model.{name}": value for name, value in {**state, **buffers}.items()}
        value: Tensor = functional_call(self._wrapped, own, (x, y))
        return value

    def unstack(self, networks: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        return _unstack(networks, self._state, self._buffers)


class _WithObjective(nn.Module):
    """The objective as a module around the model, so that its parameters can be exchanged."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that a loss module's own buffers are not taken for the model's.
        self._held = (objective,)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        objective = self._held[0]
        if isinstance(objective, nn.Module):
            value: Tensor = objective(self.model(inputs), targets)
            return value
        return objective(self.model, inputs, targets)


class _RatedDropout(nn.Module):
    """nn.Dropout whose rate is a buffer, so that it can differ between stacked networks."""

    rate: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(p))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.where(self.rate < 1, 1 / (1 - self.rate), 0.0).to(x.dtype)
        return x * ((torch.rand_like(x) >= self.rate) * scale)


def _lift_rates(networks: Sequence[nn.Module]) -> None:
    """Where the rate of a Dropout differs between the networks, make it part of their state."""
    for name, module in list(networks[0].named_modules()):
        if type(module) is not nn.Dropout:
            continue
        twins = [network.get_submodule(name) for network in networks]
        if len({twin.p for twin in twins}) > 1:
            for network, twin in zip(networks, twins, strict=True):
                network.set_submodule(name, _RatedDropout(float(twin.p)).to(_device(network)))  # type: ignore[arg-type]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def lent_stream(generator: torch.Generator) -> Iterator[None]:
    """Let torch's global stream of the generator's device continue `generator`, then restore it."""
    device = generator.device
    on_cuda = device.type == "cuda"
    before = torch.cuda.get_rng_state(device) if on_cuda else torch.get_rng_state()
    write = (lambda s: torch.cuda.set_rng_state(s, device)) if on_cuda else torch.set_rng_state
    write(generator.get_state())
    try:
        yield
    finally:
        after = torch.cuda.get_rng_state(device) if on_cuda else torch.get_rng_state()
        generator.set_state(after)
        write(before)


def _unstack(
    networks: Sequence[nn.Module], state: dict[str, Tensor], buffers: dict[str, Tensor]
) -> tuple[nn.Module, ...]:
    trained = tuple(copy.deepcopy(network) for network in networks)
    with torch.no_grad():
        for s, network in enumerate(trained):
            network.zero_grad(set_to_none=True)
            for name, parameter in network.named_parameters():
                parameter.copy_(state[name][s])
            for name, buffer in network.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name][s])
    return trained
