"""A layer's own stream of masks: repeatable, and the same when a forward pass is recomputed.

Activation checkpointing runs a forward pass again during the backward pass. It restores torch's
global stream first, so layers that draw from it are safe; a layer with a stream of its own has to
recognise the second run itself.
"""

import inspect
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from droplens.randomness import check_seed

# Calls remembered for a backward pass that is still to come. Each costs a few numbers.
_REMEMBERED = 1024
_FINGERPRINT = 16
_RANK_STRIDE = 0x9E3779B97F4A7C15
_MIX = 0xBF58476D1CE4E5B9
_MASK64 = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One well-spread 63-bit seed out of several numbers (the finaliser of splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK64) + _RANK_STRIDE) & _MASK64
        state = ((state ^ (state >> 30)) * _MIX) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def rank() -> int:
    """This process's place in the default process group; 0 without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


@dataclass
class Entry:
    """One call of a layer: what was drawn, and how to know the call again."""

    draw: Any
    fingerprint: Tensor
    frame: Callable[[], object] | None  # a weak reference


@dataclass
class Recall:
    """Remembers the calls of a layer, and finds the one that a recomputation repeats."""

    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    cursor: tuple[int, int, int] = (-1, -1, 0)  # graph task, frame, calls repeated so far

    def note(self, x: Tensor, draw: Any) -> None:
        """Remember a call of the forward pass."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return  # numbers of a transformed tensor may not outlive the transform
        frame = _checkpoint_frame()
        reference = None if frame is None else weakref.ref(frame)
        self.entries.append(Entry(draw, _fingerprint(x), reference))

    def repeated(self, x: Tensor) -> Any | None:
        """What the call that is being recomputed drew; None outside a recomputation."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        frame = _checkpoint_frame()
        if frame is not None:
            # Inside one checkpoint the calls come again in their old order.
            calls = [e for e in self.entries if e.frame is not None and e.frame() is frame]
            known = self.cursor[:2] == (task, id(frame))
            place = self.cursor[2] if known else 0
            self.cursor = (task, id(frame), place + 1)
            if place < len(calls):
                return calls[place].draw
        seen = _fingerprint(x)
        for entry in reversed(self.entries):
            if entry.fingerprint.shape == seen.shape and torch.equal(entry.fingerprint, seen):
                return entry.draw
        return None

    def __deepcopy__(self, _: Any) -> "Recall":
        return Recall()

    def __reduce__(self) -> tuple[Any, ...]:
        # What a copy or another process recomputes, it has to have computed first.
        return Recall, ()


def _fingerprint(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    step = max(1, flat.numel() // _FINGERPRINT)
    return flat[::step][:_FINGERPRINT].clone()


def _checkpoint_frame() -> object | None:
    """The frame of the torch.utils.checkpoint call that this code runs in, if it shows.

    Both passes of a checkpoint install hooks that hold its frame. Reentrant checkpoints have
    none; there the input tells calls apart.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    held = inspect.getclosurevars(pack).nonlocals if inspect.isfunction(pack) else {}
    if "frame" in held:
        frame: object = held["frame"]
        return frame
    reference = held.get("target_frame_ref")
    return None if reference is None else reference()


class Stream:
    """Masks as a function of (seed, rank, call number), or drawn from a given generator.

    `agree` leaves the rank out: replicas that must drop the same units (tensor parallelism) then
    do; by default ranks differ, as data parallelism needs.
    """

    def __init__(
        self, generator: torch.Generator | None, seed: int | None, agree: bool = False
    ) -> None:
        if generator is not None and seed is not None:
            raise ValueError("give generator= or seed=, not both")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator has to be a torch.Generator, but got {type(generator).__name__}"
            )
        self.generator = generator
        self.seed = None if seed is None else check_seed(seed)
        self.agree = agree
        # A tensor, so that a compiled graph counts on without being compiled again.
        self.calls = torch.zeros((), dtype=torch.int64, device="cpu")
        self.recall = Recall()

    @property
    def own(self) -> bool:
        """Whether the layer draws from a stream of its own."""
        return self.generator is not None or self.seed is not None

    def key(self) -> int:
        """The seed of this process's masks."""
        assert self.seed is not None
        return self.seed if self.agree else mix(self.seed, rank())

    def take(self, x: Tensor) -> torch.Generator | None:
        """The generator for this call, at the place where the first run of the call had it."""
        repeated = self.recall.repeated(x)
        if self.generator is not None:
            return self._from_generator(self.generator, x, repeated)
        call = repeated
        if call is None:
            call = int(self.calls)
            self.calls += 1
            self.recall.note(x, call)
        return seeded(self.key(), call, x.device)

    def _from_generator(
        self, generator: torch.Generator, x: Tensor, repeated: Tensor | None
    ) -> torch.Generator:
        if repeated is None:
            self.recall.note(x, generator.get_state())
            return generator
        again = torch.Generator(device=generator.device)
        again.set_state(repeated)
        return again


def seeded(key: int, call: int, device: torch.device) -> torch.Generator | None:
    """The generator of one call of a seeded layer."""
    if device.type == "meta":
        return None
    return torch.Generator(device=device).manual_seed(mix(key, call))
