"""Stand at every stochastic call of a forward pass and decide what its mask is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from droplens.calling import SiteError, check_open
from droplens.discovery._calls import FUNCTIONS, Call, read_call
from droplens.discovery._composites import (
    ATTENTION,
    RECURRENT,
    Attention,
    attend,
    drops_between_layers,
    is_on,
    rate,
    recur,
)
from droplens.discovery._guard import DROPPING, guarded, switch_on
from droplens.discovery._registry import Masking, masking_of
from droplens.discovery._tracker import Tracker
from droplens.masks import Bernoulli, Law, Weight

Visit = Callable[[Call, Tensor], Tensor]


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
        if (func in _DRAWS or _draws(func)) and self.tracker.running:
            self.tracker.drawing.add(self.tracker.running[-1])
        if func is F.multi_head_attention_forward:
            # A composite: re-enter the mode so that the dropout inside is seen, and let the
            # composite pass its own override check once, or it would call us for ever.
            with _override_check_passed_once(), self:
                return func(*args, **kwargs)
        if func is _our_product():
            return self._masked(*args, **kwargs)
        if func is ATTENTION:
            return self._attention(Attention(*args, **kwargs))
        if func in RECURRENT and drops_between_layers(args):
            return self._recurrent(func, args)
        return func(*args, **kwargs)

    def _masked(self, x: Tensor, law: Law, training: bool = True, *_: Any, **__: Any) -> Tensor:
        """A function of droplens.nn, or DropConnect, which multiplies weights."""
        kind = type(law).__name__
        owner = self.tracker.running[-1] if self.tracker.running else None
        name, module_kind = self.tracker.name_call(kind.lower())
        # A layer that masks activations may have this law too; it is then that of single units.
        layer = isinstance(owner, nn.modules.dropout._DropoutNd)
        weights = isinstance(law, Weight) and (not layer or hasattr(owner, "weight_law"))
        call = Call(name, module_kind or kind, law, None, tuple(x.shape), training, weights)
        return self.visit(self.tracker.met_on(call), x)

    def _attention(self, given: Attention) -> Tensor:
        # Numbered also when off, so that a call has one name in every mode.
        name, _ = self.tracker.name_call("attention")
        on = given.dropout_p > 0
        if not on and name not in self.tracker.kept_on:
            return ATTENTION(**vars(given))
        law = Bernoulli(given.dropout_p)

        def drop(weights: Tensor) -> Tensor:
            kind = "F.scaled_dot_product_attention"
            call = Call(name, kind, law, None, tuple(weights.shape), on)
            return self.visit(self.tracker.met_on(call), weights)

        return attend(given, drop)

    def _recurrent(self, func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        law, on = Bernoulli(rate(args)), is_on(args)

        def drop(x: Tensor) -> Tensor:
            name, _ = self.tracker.name_call("dropout")
            return self.visit(Call(name, RECURRENT[func], law, None, tuple(x.shape), on), x)

        return recur(func, args, drop)

    def _dropout(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        with _naming(self.tracker.path() or "the model"):
            reading, kind, law, reason = read_call(func, args, kwargs)
        name, module_kind = self.tracker.name_call(kind.split(".")[-1])
        call = Call(name, module_kind or kind, law, reason, tuple(reading.x.shape), reading.on)
        return self.visit(self.tracker.met_on(call), reading.x)


_T = torch.Tensor
# What a forward writes its own noise with.
_DRAWS: set[Callable[..., Any]] = {
    *(torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.randperm),
    *(torch.bernoulli, torch.normal, torch.multinomial, torch.poisson, F.gumbel_softmax, F.rrelu),
    *(_T.bernoulli, _T.bernoulli_, _T.uniform_, _T.normal_, _T.exponential_, _T.geometric_),
    *(_T.random_, _T.log_normal_, _T.cauchy_, _T.multinomial, torch.native_dropout),
}


def _draws(func: Any) -> bool:
    """Whether this is one of torch.ops that draws random numbers."""
    if isinstance(func, OpOverloadPacket):
        func = getattr(func, func.overloads()[0])
    return isinstance(func, OpOverload) and torch.Tag.nondeterministic_seeded in func.tags


def _our_product() -> Any:
    """The function that every layer of droplens.nn multiplies by its mask in, once imported."""
    return getattr(sys.modules.get("droplens.nn._apply"), "masked", None)


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
def _masking_modules(tracker: Tracker, visit: Visit) -> Iterator[None]:
    """Put `visit` in the place of every forward that is one mask."""
    patched: list[nn.Module] = []
    try:
        for module, path in tracker.paths.items():
            masking = masking_of(module)
            if masking is None or "forward" in vars(module):
                continue
            vars(module)["forward"] = _visited(module, path, masking, tracker, visit)
            patched.append(module)
        yield
    finally:
        for module in patched:
            del vars(module)["forward"]


def _visited(
    module: nn.Module, path: str, masking: Masking, tracker: Tracker, visit: Visit
) -> Callable[[Tensor], Tensor]:
    kind = type(module).__name__

    def forward(x: Tensor) -> Tensor:
        name = tracker.number(path or kind)
        law, shape = masking.law, tuple(x.shape)
        call = Call(name, kind, law, masking.reason, shape, module.training)
        return visit(tracker.met_on(call), x)

    return forward


_AGAIN = (
    "and checkpointed parts would run again on the way back, under other masks; switch that off "
    "(in transformers: model.gradient_checkpointing_disable())"
)
_RUNS_TWICE = f"it hooks into what autograd saves (torch.utils.checkpoint, save_on_cpu), {_AGAIN}"


def _in_checkpoint() -> bool:
    """Whether the call stands in a reentrant checkpoint, which uses no hooks."""
    source = torch.utils.checkpoint.__file__
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        if caller.f_code.co_filename == source:
            return True
        frame = caller
    return False


def _uncompiled() -> AbstractContextManager[Any]:
    """Run torch.compile's products as plain Python; nothing if it was never imported."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _unseen(x: Tensor) -> AbstractContextManager[None]:
    """Keep what a visitor does from function modes, which see even a look at a tensor's shape.

    It is no part of the forward. A tensor of a type of its own may have functions of its own.
    """
    plain = type(x) is Tensor or type(x) is nn.Parameter
    return torch._C.DisableTorchFunction() if plain else nullcontext()


@contextmanager
def intercept(model: nn.Module, visit: Visit, *, repeatable: bool = False) -> Iterator[Tracker]:
    """While open, every stochastic call of `model` returns `visit(call, x)` and draws nothing.

    Modes are left alone: put the model in the mode you want under `guarded` first. Attention runs
    on torch's maths kernel meanwhile, because the fused ones have no double backward; compiled
    parts run as they were written; and checkpointed ones are refused where gradients are on,
    because they would run again, later, under other masks.

    Args:
        model: any torch model.
        visit: gets every stochastic call.
        repeatable: whether `visit` gives a call the same masks when it is met again, so that
            checkpointed parts may run again.

    Yields:
        A tracker that knows where in the module tree the pass is.
    """
    check_open(model)
    refused = torch.is_grad_enabled() and not repeatable

    def named(call: Call, x: Tensor) -> Tensor:
        with _naming(call.name), _unseen(x):
            if refused and not torch.is_grad_enabled() and _in_checkpoint():
                raise ValueError(f"it stands in a reentrant torch.utils.checkpoint, {_AGAIN}")
            return visit(call, x)

    tracker = Tracker(model)
    with (
        tracker.following(),
        _masking_modules(tracker, named),
        sdpa_kernel(SDPBackend.MATH),
        nullcontext() if repeatable else disable_saved_tensors_hooks(_RUNS_TWICE),
        _uncompiled(),
        _Interceptor(tracker, named),
    ):
        yield tracker


@contextmanager
def switched(
    model: nn.Module, visit: Visit, restart: Callable[[], None] | None = None
) -> Iterator[None]:
    """While open, sites are on and handed to `visit`, and all else does as at test time.

    What draws noise of its own in train mode is put in eval once it has been seen to, as is a
    model that returns several tensors; the dropout that it calls stays on, and the pass is run
    again. Modes, buffers, RNG state and hooks are as before on the way out, also after an error.

    Args:
        model: any torch model.
        visit: as for `intercept`.
        restart: called before a pass is run again.
    """
    with guarded(model) as standing, intercept(model, visit) as tracker:
        switch_on(model)
        untouched = [standing]
        stubborn: set[nn.Module] = set()

        def rerun(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if restart is not None:
                restart()
            return module(*args, **kwargs)

        def again(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
            # Looked at once: where the streams stand is not to be had for nothing.
            if untouched and any(streams.moved() for streams in untouched.pop()):
                with tracker.watching():
                    return rerun(module, args, kwargs)
            own = tracker.drawing.copy()
            tracker.drawing.clear()
            if isinstance(outputs, tuple | list):  # auxiliary outputs, which eval may not have
                own.update(module.modules())
            own = {m for m in own - stubborn if m.training and not isinstance(m, DROPPING)}
            if not own:
                return None
            kept = tracker.keep_on(own)
            for drawing in own:
                drawing.training = False
            found = rerun(module, args, kwargs)
            lost = {owner for name, owner in kept.items() if name not in tracker.names}
            if not lost:
                return found
            # In eval it passes over its dropouts, so its noise has to stay.
            stubborn.update(lost)
            tracker.forget(lost)
            for drawing in lost:
                drawing.training = True
            return rerun(module, args, kwargs)

        # After the tracker's own hooks, so that what runs again is a new pass to it.
        handle = model.register_forward_hook(again, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _naming(site: str) -> Iterator[None]:
    """Name the site in what its law refuses, so that it is not taken for the forward's fault.

    Raises:
        SiteError: in place of a ValueError raised inside.
    """
    try:
        yield
    except SiteError:
        raise
    except ValueError as error:
        raise SiteError(f"site {site!r}: {error}") from error
