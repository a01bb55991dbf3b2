"""Masks that stay: hold them over many calls, look at them, play them back."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from droplens.discovery import Call, intercept
from droplens.masks import Law, Mask
from droplens.nn._apply import draw_for
from droplens.nn._connect import DropConnect
from droplens.nn._streams import Recall, mix
from droplens.randomness import private_generator


class Masks(Mapping[str, Tensor]):
    """The masks z/μ in use, by the name of their site ("drop", "drop#2" for its second call).

    Filled as the sites are met. A site that is met with inputs of several shapes has a mask for
    each; the mapping shows the latest.
    """

    def __init__(self, given: Mapping[str, Tensor] | None = None, key: int | None = None) -> None:
        self._given = dict(given) if given is not None else None
        self._key = key
        self._drawn: dict[tuple[str, tuple[int, ...]], Mask] = {}
        self._latest: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._recall = Recall()

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._latest[name]
        return self._drawn[name, shape].ratio(shape, dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._latest)

    def __len__(self) -> int:
        return len(self._latest)

    def take(self, name: str, law: Law | None, reason: str | None, x: Tensor) -> Mask:
        """The mask of a site: the one it has, or a new one."""
        repeated = self._recall.repeated(x)
        if isinstance(repeated, Mask):
            return repeated
        shape = tuple(x.shape)
        if (name, shape) not in self._drawn:
            # A mask has to outlive the transform (vmap, grad) that happens to ask for it.
            with temporarily_clear_interpreter_stack():
                self._drawn[name, shape] = self._new(name, law, reason, x, shape)
        mask = self._drawn[name, shape]
        self._latest[name] = (shape, x.dtype)
        self._recall.note(x, mask)
        return mask

    def _new(
        self, name: str, law: Law | None, reason: str | None, x: Tensor, shape: tuple[int, ...]
    ) -> Mask:
        if self._given is not None:
            return Mask(self._replayed(self._given, name, shape).to(x.device))
        if law is None:
            raise ValueError(f"the mask of {name!r} cannot be held: {reason}")
        like = torch.empty(shape, dtype=x.dtype, device=x.device)
        if self._key is None:
            return draw_for(like, law, None)
        # From name and shape, so that the order in which sites are met does not matter.
        seed = mix(self._key, zlib.crc32(name.encode()), *shape)
        return draw_for(like, law, torch.Generator(device=x.device).manual_seed(seed))

    def _replayed(self, given: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in given:
            raise ValueError(f"masks has none for the site {name!r}; it has {sorted(given)}")
        mask = given[name]
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"masks[{name!r}] has shape {tuple(mask.shape)}, but the site's input has {shape}"
            )
        return mask


@contextmanager
def hold(
    model: nn.Module, *, generator: torch.Generator | None = None, seed: int | None = None
) -> Iterator[Masks]:
    """While open, every call of `model` uses the masks of its first call.

    A curvature tool then sees a deterministic network. Every site is held: modules, functions,
    attention, recurrent layers, DropConnect. Sites that are off stay off. Compiled code runs
    eagerly meanwhile. The model is put back as it was on the way out.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    >>> x = torch.ones(2, 4)
    >>> with hold(model, seed=0) as masks:
    ...     same = torch.equal(model(x), model(x))
    >>> same, list(masks)
    (True, ['1'])

    Args:
        model: any torch model.
        generator: where the masks are drawn from; torch's global stream without it and `seed`.
        seed: in place of a generator.

    Yields:
        The masks, by site.

    Raises:
        ValueError: if both `generator` and `seed` are given, or a site's law is not known.
    """
    key = None
    if generator is not None or seed is not None:
        _, key = private_generator(generator, seed)
    with _taking(model, Masks(key=key)) as masks:
        yield masks


@contextmanager
def replay(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[Masks]:
    """While open, every call of `model` uses the given masks z/μ, by the name of their site.

    Args:
        model: any torch model.
        masks: what `hold` gave, or tensors of the shapes that the sites multiply.

    Yields:
        The masks that were used.

    Raises:
        ValueError: if a site has no mask, or one of another shape.
    """
    with _taking(model, Masks(given=masks)) as used:
        yield used


@contextmanager
def _taking(model: nn.Module, masks: Masks) -> Iterator[Masks]:
    def visit(call: Call, x: Tensor) -> Tensor:
        if not call.on:
            return x
        return masks.take(call.name, call.law, call.reason, x).times(x)

    # What torch.compile wraps keeps the names of the module inside.
    model = getattr(model, "_orig_mod", model)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, DropConnect):
                stack.enter_context(_held_weight(module, name, masks))
        stack.enter_context(intercept(model, visit, repeatable=True))
        yield masks


@contextmanager
def _held_weight(module: DropConnect, name: str, masks: Masks) -> Iterator[None]:
    def take(weight: Tensor, law: Law) -> Mask:
        return masks.take(name, law, None, weight)

    before, module.taken_from = module.taken_from, take
    try:
        yield
    finally:
        module.taken_from = before
