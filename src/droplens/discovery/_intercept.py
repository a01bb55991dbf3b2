"""Stand at every stochastic call of a forward pass and decide what its mask is."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from droplens.discovery._calls import FUNCTIONS, Call, read_call

Visit = Callable[[Call, Tensor], Tensor]


class Tracker:
    """Knows which module is running, and gives every stochastic call its name."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.met: dict[str, int] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the forward pass with hooks, removed on the way out."""
        with ExitStack() as stack:
            for module in self.paths:
                enter = module.register_forward_pre_hook(self._enter, prepend=True)
                stack.callback(enter.remove)
                leave = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(leave.remove)
            yield

    def _enter(self, module: nn.Module, _: Any) -> None:
        if len(self.running) == 0:
            self.met.clear()  # a new pass: numbering starts afresh
        self.running.append(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self.running and self.running[-1] is module:
            self.running.pop()

    def name(self, function: str) -> tuple[str, str | None]:
        """A name for the call that is being made, and the dropout module that makes it."""
        owner = self.running[-1] if self.running else None
        path = self.paths[owner] if owner is not None else ""
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            name, kind = path or type(owner).__name__, type(owner).__name__
        else:
            name, kind = f"{path}.{function}" if path else function, None
        count = self.met.get(name, 0) + 1
        self.met[name] = count
        return (name if count == 1 else f"{name}#{count}"), kind


class _Interceptor(TorchFunctionMode):
    """Sees every torch function that is called, and hands the dropouts among them to `visit`."""

    def __init__(self, tracker: Tracker, visit: Visit) -> None:
        super().__init__()
        self.tracker = tracker
        self.visit = visit

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            return self._dropout(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            # A composite: re-enter the mode so that the dropout inside is seen, and let the
            # composite pass its own override check once, or it would call us for ever.
            with _override_check_passed_once(), self:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        reading, kind, law, reason = read_call(func, args, kwargs)
        name, module_kind = self.tracker.name(kind.split(".")[-1])
        call = Call(name, module_kind or kind, law, reason, tuple(reading.x.shape), reading.on)
        return self.visit(call, reading.x)


@contextmanager
def _override_check_passed_once() -> Iterator[None]:
    names = vars(F)
    original = names["has_torch_function"]

    def once(*_: Any) -> bool:
        names["has_torch_function"] = original
        return False

    names["has_torch_function"] = once
    try:
        yield
    finally:
        names["has_torch_function"] = original


@contextmanager
def intercept(model: nn.Module, visit: Visit) -> Iterator[None]:
    """While open, every stochastic call of `model` returns `visit(call, x)` and draws nothing.

    Modes are left alone: put the model in the mode you want under `guarded` first. Attention runs
    on torch's maths kernel meanwhile, because the fused ones have no double backward.
    """
    tracker = Tracker(model)
    with (
        tracker.following(),
        sdpa_kernel(SDPBackend.MATH),
        _Interceptor(tracker, visit),
    ):
        yield
