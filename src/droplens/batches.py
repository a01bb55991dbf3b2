"""What counts as data: pairs of tensors, data sets, loaders, turned into batches one can re-read.

Nothing is held: a loader is streamed, pass after pass. A loader that shuffles from one of the
global streams (torch, NumPy, random) or from its own generator gives the same batches in every
pass, and leaves those streams as they were.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from droplens._items import hint, splitter
from droplens._streams import Streams, generators_of
from droplens.calling import ForwardError, agree, check_inputs, predictions, tensors_in
from droplens.labels import IGNORED, NO_LABEL, holds_label, ignored_label

# Numbers in one chunk of a data set that is given whole: 8 MB of float32.
_CHUNK_NUMBERS = 2**21
_CHUNK_EXAMPLES = 2048


class Batch(NamedTuple):
    """Inputs as the model takes them (tensor, tuple or mapping), and targets if there are any."""

    inputs: Any
    targets: Tensor | None


class Batches(ABC):
    """Data in batches that can be read again and again."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """One pass over all batches, checked: no empty ones, no NaN, no Inf."""


def as_batches(data: Any, model: nn.Module | None = None, loss: object = None) -> Batches:
    """Turn `data` into batches of (inputs, targets).

    Accepted: a tensor of inputs; a pair (inputs, targets), where inputs may also be a tuple or
    mapping of tensors; a TensorDataset or any data set of such pairs; a DataLoader, or a sequence
    of batches, each a tensor, a tuple whose last entry is the targets, or a mapping that holds
    them under "labels" or "targets". With a causal language model of Hugging Face as `model`,
    "labels" are taken as such models take them: unshifted, and compared with the predictions one
    position earlier. One that encodes and decodes is given them, moved as it wants them, unless
    the batch holds what to decode. With a `loss` that ignores a label, batches that hold no other
    are left out: they count nothing, and torch's mean over them is 0/0.

    >>> batch, = as_batches((torch.zeros(5, 2), torch.ones(5)))
    >>> batch.inputs.shape, batch.targets.shape
    (torch.Size([5, 2]), torch.Size([5]))

    Raises:
        TypeError: if `data` is something else, or can be read only once.
        ValueError: if it is empty, inputs and targets differ in length, or no label counts.
    """
    if isinstance(data, Batches):
        return data
    ignored = ignored_label(loss)
    parted = splitter(model, IGNORED if ignored is None else ignored)

    def split(item: Any) -> Batch:
        return Batch(*parted(item))

    batches = _read(data, split)
    return batches if ignored is None else Counted(batches, ignored)


def _read(data: Any, split: Callable[[Any], Batch]) -> Batches:
    """All of `data` in batches.

    Raises:
        TypeError: if it is nothing that holds any.
    """
    if isinstance(data, Tensor | Mapping):
        return _Whole(split(data))
    if isinstance(data, TensorDataset):
        return _Whole(split(data.tensors))
    if isinstance(data, Sequence) and not isinstance(data, str) and _is_pair(data):
        return _Whole(Batch(data[0], data[1]))
    if isinstance(data, Dataset) and not isinstance(data, Iterable):
        if not hasattr(data, "__len__"):
            raise TypeError(
                f"data is a {type(data).__name__} without __len__, so nobody knows its examples; "
                "give it one, or pass a DataLoader with a sampler"
            )
        return _Loaded(DataLoader(data, batch_size=256), split)
    if isinstance(data, Iterator):
        raise TypeError(
            f"data is a {type(data).__name__}, which can be read only once; pass a list of "
            "batches or a DataLoader"
        )
    if isinstance(data, Iterable) and not isinstance(data, str | nn.Module):
        return _Loaded(data, split)
    raise TypeError(
        "data has to be a tensor, a pair (inputs, targets), a data set or a DataLoader, but got "
        f"{type(data).__name__}"
    )


def n_examples(inputs: Any) -> int:
    """How many examples a batch of inputs holds: the length of its first tensor."""
    return len(tensors_in(inputs)[0])


def alike_alone(model: nn.Module, inputs: Any, outputs: Tensor, rows: slice) -> bool:
    """Whether some examples come out among all (`outputs`) as they do without the others.

    No, where the forward does not take so few, or the outputs' first axis is not that of examples.
    """
    if len(outputs) != n_examples(inputs):
        return False
    try:
        with torch.no_grad():
            alone = predictions(model, rows_of(inputs, rows))
    except (ForwardError, ValueError, TypeError):
        return False
    return agree(alone, outputs[rows])


def _is_pair(data: Sequence[Any]) -> bool:
    """Whether this is (inputs, targets) rather than a list of batches."""
    return len(data) == 2 and (data[1] is None or isinstance(data[1], Tensor))


def _checked(batch: Batch) -> Batch:
    check_inputs(batch.inputs)
    targets = batch.targets
    if targets is None:
        return batch
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"targets has to be a tensor, but got {type(targets).__name__}{hint(targets)}"
        )
    if targets.dim() == 0:
        raise ValueError(
            "targets is a single number, where a batch has one for each of its examples; data that "
            "yields single examples is batched by a DataLoader"
        )
    if len(targets) != n_examples(batch.inputs):
        raise ValueError(
            f"inputs has {n_examples(batch.inputs)} examples but targets has shape "
            f"{tuple(targets.shape)}"
        )
    if targets.is_floating_point() and not bool(targets.isfinite().all()):
        raise ValueError("targets holds NaN or Inf; clean the data first")
    return batch


class _Whole(Batches):
    """Tensors in memory, read in chunks."""

    def __init__(self, batch: Batch) -> None:
        self._batch = _checked(batch)
        first = tensors_in(batch.inputs)[0]
        per_example = max(1, sum(t[0].numel() for t in tensors_in(batch.inputs)))
        self._n = len(first)
        self._size = max(1, min(_CHUNK_EXAMPLES, _CHUNK_NUMBERS // per_example))
        self.chunks = -(-self._n // self._size)

    def __iter__(self) -> Iterator[Batch]:
        return in_parts(self._batch, self._size)


def rows_of(inputs: Any, rows: slice | Tensor) -> Any:
    """The examples `rows` of a batch's inputs; what is not one per example is for all of them."""
    return _rows_of(inputs, rows, n_examples(inputs))


def in_parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch in parts of at most `rows` examples.

    Yields:
        Each part.
    """
    n = n_examples(batch.inputs)
    if rows >= n:
        yield batch
        return
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        targets = None if batch.targets is None else batch.targets[part]
        yield Batch(rows_of(batch.inputs, part), targets)


def counted_parts(batch: Batch, rows: int, loss: object) -> Iterator[Batch]:
    """Those of `in_parts` that hold a label which the loss counts."""
    ignored = ignored_label(loss)
    return (part for part in in_parts(batch, rows) if holds_label(part.targets, ignored))


def _rows_of(inputs: Any, rows: slice | Tensor, n: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[rows] if inputs.dim() and len(inputs) == n else inputs
    if isinstance(inputs, Mapping):
        return {name: _rows_of(value, rows, n) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return tuple(_rows_of(value, rows, n) for value in inputs)
    return inputs


class _Loaded(Batches):
    """A loader or a list of batches, streamed; every pass starts from the same random state."""

    def __init__(self, loader: Iterable[Any], split: Callable[[Any], Batch]) -> None:
        self._loader, self._split = loader, split
        self._own = generators_of(loader)
        self._start = Streams()

    def __iter__(self) -> Iterator[Batch]:
        before = [generator.get_state() for generator in self._own]
        streams = self._start
        empty = True
        try:
            with streams.lent():
                iterator = _told(lambda: iter(self._loader))
                streams = streams.advanced()
            while True:
                # The streams are lent for the time of each fetch alone, so that what the
                # consumer draws in between comes from its own.
                with streams.lent():
                    try:
                        item = _told(lambda: next(iterator, _NO_MORE))
                    finally:
                        streams = streams.advanced()
                if item is _NO_MORE:
                    break
                empty = False
                yield _checked(self._split(item))
        finally:
            for generator, state in zip(self._own, before, strict=True):
                generator.set_state(state)
        if empty:
            raise ValueError("data is empty: there is no batch to measure on")


_NO_MORE = object()


def _told(read: Callable[[], Any]) -> Any:
    """Read from a loader; what its owner's code raises is bad data.

    Raises:
        ValueError: in place of whatever it raises.
    """
    try:
        return read()
    except Exception as error:
        raise ValueError(f"reading the data raised {type(error).__name__}: {error}") from error


class Fingerprint:
    """A sum over the examples of a pass that does not depend on their order, unless asked to.

    Two passes over the same examples agree to rounding, however batched; passes with other
    examples (a shuffling loader that drops its last batch, random augmentation) do not.
    """

    def __init__(self, in_order: bool = False) -> None:
        self._sum, self._in_order = 0.0, in_order

    def add(self, batch: Batch) -> None:
        """Count one batch in."""
        tensors = tensors_in(batch.inputs)
        if batch.targets is not None:
            tensors = [*tensors, batch.targets]
        n = len(tensors[0])
        scores = torch.zeros(n, dtype=torch.float64, device=tensors[0].device)
        for k, tensor in enumerate(t for t in tensors if t.dim() and len(t) == n):
            rows = tensor.detach().reshape(n, -1).double()
            probe = torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device)
            scores = scores + rows.to(scores.device) @ torch.cos(probe + k + 1).to(scores.device)
        if self._in_order:
            places = torch.arange(n, dtype=torch.float64, device=scores.device)
            scores = scores * (2 + torch.sin(places + 1))
        # Squared, so that exchanging targets between examples shows.
        self._sum += float((scores + 1).square().sum())

    def agrees(self, other: "Fingerprint") -> bool:
        """Whether both passes saw the same examples."""
        return math.isclose(self._sum, other._sum, rel_tol=1e-9)


class SameEveryPass(Batches):
    """Batches of which every complete pass is compared with the first.

    For methods that combine several passes, such as products with one Hessian. `in_order` also
    asks that every batch, and every example in it, be where it was, as masks that are held batch
    by batch need.
    """

    def __init__(self, batches: Batches, in_order: bool = False) -> None:
        self._batches, self.in_order = batches, in_order
        self._first: Fingerprint | None = None
        self._firsts: list[Fingerprint] = []

    def __iter__(self) -> Iterator[Batch]:
        seen = Fingerprint()
        for position, batch in enumerate(self._batches):
            seen.add(batch)
            if self.in_order:
                self._check_place(position, batch)
            yield batch
        if self._first is None:
            self._first = seen
        elif not seen.agrees(self._first):
            raise ValueError(
                "data changes between passes (a loader that shuffles and drops its last batch, "
                "or augments at random), but this measure reads one data set many times; use "
                "shuffle=False without augmentation"
            )

    def _check_place(self, position: int, batch: Batch) -> None:
        own = Fingerprint(in_order=True)
        own.add(batch)
        if position == len(self._firsts) and self._first is None:
            self._firsts.append(own)
        elif position >= len(self._firsts) or not own.agrees(self._firsts[position]):
            raise ValueError(
                "data changes between passes, or comes in another order, but this measure needs "
                "every example in its place; use shuffle=False without augmentation, or a sampler "
                "that draws from torch's generators"
            )


class Counted(Batches):
    """The batches that hold a label which counts; `everything` are those and the others."""

    def __init__(self, everything: Batches, ignored: int) -> None:
        self.everything, self.ignored = everything, ignored

    def __iter__(self) -> Iterator[Batch]:
        found = False
        for batch in self.everything:
            if holds_label(batch.targets, self.ignored):
                found = True
                yield batch
        if not found:
            raise ValueError(NO_LABEL)


def everything(batches: Batches) -> Batches:
    """All of them, also those without a label: for what no loss is asked about."""
    return batches.everything if isinstance(batches, Counted) else batches


def checked_passes(
    data: Any, model: nn.Module | None = None, loss: object = None, *, in_order: bool = False
) -> Batches:
    """Like `as_batches`, for methods that need every pass to see the same examples.

    With `in_order` also in the same batches and places, one after the other.
    """
    batches = as_batches(data, model, loss)
    if isinstance(batches, Counted):
        return Counted(_same_every_pass(batches.everything, in_order), batches.ignored)
    return _same_every_pass(batches, in_order)


def _same_every_pass(batches: Batches, in_order: bool) -> Batches:
    # Tensors in memory cannot change unasked.
    if isinstance(batches, _Whole):
        return batches
    if isinstance(batches, SameEveryPass):
        if batches.in_order or not in_order:
            return batches
        batches = batches._batches
    return SameEveryPass(batches, in_order)


def is_one_batch(batches: Batches) -> bool:
    """Whether these are tensors in memory that fit one batch."""
    batches = everything(batches)
    return isinstance(batches, _Whole) and batches.chunks == 1
