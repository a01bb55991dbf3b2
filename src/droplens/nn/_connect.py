"""DropConnect (Wan et al. 2013): dropout on the weights of any layer, as a parametrisation."""

import types
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from droplens.masks import Law, Mask, Weight
from droplens.nn._base import MaskedLayer


@final
class DropConnect(MaskedLayer):
    """Multiply a weight by a mask of coins; the exact identity in eval mode.

    Registered by `drop_connect`. It masks weights, not activations: `law` is None, and the law
    over the weight's entries stands in `weight_law`.
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        per_example: bool = False,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(Weight, p, generator=generator, seed=seed, same_on_ranks=same_on_ranks)
        self.per_example = per_example
        self.taken_from: Callable[[Tensor, Law], Mask] | None = None
        # While its module runs, the weight keeps one mask, however often it is read.
        self.running = False
        self.masked: Tensor | None = None

    @property
    def law(self) -> None:
        """None: no activations are masked."""
        return

    @property
    def weight_law(self) -> Law:
        """The law over the entries of the weight."""
        return self._law

    def forward(self, weight: Tensor) -> Tensor:
        """The weight times one mask; itself in eval, or where each example draws its own."""
        if self.per_example or not self.training:
            return weight
        if self.masked is not None:
            return self.masked
        masked = self.mask(weight.unsqueeze(0)).squeeze(0)
        if self.running:
            self.masked = masked
        return masked

    def mask(self, weights: Tensor) -> Tensor:
        """Weights (masks, *weight), each times its own mask."""
        if not self.training:
            return weights
        if self.taken_from is not None:
            return self.taken_from(weights, self._law).times(weights)
        return self._times_mask(weights)

    def _shown(self) -> dict[str, object]:
        return {"per_example": True} if self.per_example else {}


def drop_connect(
    module: nn.Module,
    name: str = "weight",
    p: float = 0.5,
    *,
    per_example: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    same_on_ranks: bool = False,
) -> nn.Module:
    """Drop entries of a weight: z_ij/(1 − p) ∘ W_ij, one mask for each forward pass.

    For any module's parameter: Linear, Conv, recurrent weights (one mask for all time steps),
    attention projections ("in_proj_weight", or "weight" of `out_proj`). A weight used at many
    positions has one mask at all of them. Checkpoints load both ways with strict=True.

    >>> layer = drop_connect(nn.Linear(3, 2), "weight", 0.5)
    >>> sorted(layer.state_dict())
    ['bias', 'weight']

    Args:
        module: the module that owns the weight; changed in place and returned.
        name: of the parameter.
        p: the drop probability.
        per_example: a mask for each example of the batch; nn.Linear's weight only. Costs memory
            for one weight an example.
        generator: where masks are drawn from; torch's global stream without it and `seed`.
        seed: masks as a function of (seed, rank, number of the call).
        same_on_ranks: leave the rank out.

    Raises:
        TypeError: if `module` is not a module, or p not a number.
        ValueError: if there is no such parameter or it has DropConnect already, p is NaN or
            outside [0, 1], or `per_example` is asked of another module than nn.Linear.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module has to be a torch module, but got {type(module).__name__}")
    if _drop_connects(module, name):
        raise ValueError(f"{name!r} of {type(module).__name__} has DropConnect already")
    parametrized = parametrize.is_parametrized(module, name)
    if not parametrized and name not in dict(module.named_parameters(recurse=False)):
        names = [own for own, _ in module.named_parameters(recurse=False)]
        raise ValueError(
            f"name has to be a parameter of {type(module).__name__}, one of {names}, "
            f"but got {name!r}"
        )
    if per_example and not (isinstance(module, nn.Linear) and name == "weight"):
        raise ValueError(
            f"per_example works on the weight of nn.Linear, not on {name!r} of "
            f"{type(module).__name__}; use one mask a batch"
        )
    coins = DropConnect(
        p, per_example=per_example, generator=generator, seed=seed, same_on_ranks=same_on_ranks
    )
    coins.train(module.training)
    # Not traced for its output: a random map has none to check.
    parametrize.register_parametrization(module, name, coins, unsafe=True)
    if not parametrized:
        module.register_state_dict_post_hook(partial(_save_plainly, name))
        module.register_load_state_dict_pre_hook(partial(_load_plainly, name))
    if _begin not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end, always_call=True)
    if per_example:
        module.forward = types.MethodType(_linear_per_example, module)
    return module


def remove_drop_connect(module: nn.Module, name: str = "weight") -> nn.Module:
    """Take DropConnect off a weight; the parameter is the one it was.

    Raises:
        ValueError: if the weight has no DropConnect, or other parametrisations beside it, which
            torch can only remove together.
    """
    found = _drop_connects(module, name)
    if not found:
        raise ValueError(f"{name!r} of {type(module).__name__} has no DropConnect")
    if len(_list(module, name)) > 1:
        raise ValueError(
            f"{name!r} has other parametrizations beside DropConnect, and torch removes all or "
            "none; use torch.nn.utils.parametrize.remove_parametrizations"
        )
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)

    def keeps_keys(hook: Any) -> bool:
        ours = isinstance(hook, partial) and hook.func in {_save_plainly, _load_plainly}
        return ours and hook.args == (name,)

    _remove(module._state_dict_hooks, keeps_keys)
    _remove(module._load_state_dict_pre_hooks, keeps_keys)
    if not any(_drop_connects(module, other) for other in _parametrized(module)):
        _remove(module._forward_pre_hooks, lambda hook: hook is _begin)
        for key in _remove(module._forward_hooks, lambda hook: hook is _end):
            module._forward_hooks_always_called.pop(key, None)
    if found[0].per_example:
        del vars(module)["forward"]
    return module


def _list(module: nn.Module, name: str) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, name):
        return []
    return list(module.parametrizations[name])  # type: ignore[index]


def _drop_connects(module: nn.Module, name: str) -> list[DropConnect]:
    return [p for p in _list(module, name) if isinstance(p, DropConnect)]


def _parametrized(module: nn.Module) -> list[str]:
    listed = getattr(module, "parametrizations", None)
    return list(listed) if isinstance(listed, nn.ModuleDict) else []


def _remove(hooks: dict[int, Any], ours: Callable[[Any], bool]) -> list[int]:
    # torch wraps some hooks in an object that holds them.
    keys = [key for key, hook in hooks.items() if ours(getattr(hook, "hook", hook))]
    for key in keys:
        del hooks[key]
    return keys


def _keys(module: nn.Module, name: str, prefix: str) -> tuple[str, str] | None:
    """The plain key of a weight and the one under which torch stores it, if they differ by us."""
    listed = _list(module, name)
    if not listed or not all(isinstance(p, DropConnect) for p in listed):
        return None
    return prefix + name, f"{prefix}parametrizations.{name}.original"


def _save_plainly(name: str, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    keys = _keys(module, name, prefix)
    if keys is not None and keys[1] in state:
        state[keys[0]] = state.pop(keys[1])


def _load_plainly(
    name: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    keys = _keys(module, name, prefix)
    if keys is not None and keys[0] in state:
        state[keys[1]] = state.pop(keys[0])


def _begin(module: nn.Module, _: Any) -> None:
    for name in _parametrized(module):
        for coins in _drop_connects(module, name):
            coins.running, coins.masked = True, None
    if isinstance(module, nn.RNNBase):
        # It hands its kernels a list of weights that was made when it was built.
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _end(module: nn.Module, *_: Any) -> None:
    for name in _parametrized(module):
        for coins in _drop_connects(module, name):
            coins.running, coins.masked = False, None
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [_original(module, name) for name in module._flat_weights_names]


def _original(module: nn.Module, name: str) -> Tensor:
    parametrized = parametrize.is_parametrized(module, name)
    owner: Any = module.parametrizations[name] if parametrized else module  # type: ignore[index]
    weight: Tensor = getattr(owner, "original" if parametrized else name)
    return weight


def _linear_per_example(self: nn.Linear, input: Tensor) -> Tensor:
    coins = _drop_connects(self, "weight")[0]
    if not coins.training or input.dim() < 2:
        # One example without a batch axis has one mask.
        weight = self.weight if not coins.training else coins.mask(self.weight[None])[0]
        return F.linear(input, weight, self.bias)
    weights = coins.mask(self.weight.expand(input.shape[0], *self.weight.shape))
    rows = input.reshape(input.shape[0], -1, self.in_features)
    out = (rows @ weights.mT).reshape(*input.shape[:-1], self.out_features)
    return out if self.bias is None else out + self.bias
