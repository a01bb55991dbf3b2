"""Predictions with dropout left on: Monte-Carlo dropout (Gal & Ghahramani 2016), with errors."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from droplens.calling import (
    call,
    check_inputs,
    check_model,
    check_outputs,
    predictions,
    tensors_in,
)
from droplens.discovery import guarded, sites, switch_on
from droplens.nn import MaskedLayer
from droplens.randomness import private_generator

Outputs = Literal["logits", "probabilities", "values"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model predicts under dropout, over `draws` masks; every field is float64 on the CPU.

    For classes (axis 1 of the model's output), with p_k the probabilities under mask k and H the
    entropy in nats: mean p̄ = E p_k, entropy H(p̄), mutual information H(p̄) − E H(p_k). The last
    two are corrected by the jackknife for the bias that finite draws give them, so near 0 they may
    fall below it by their error.

    Args:
        mean: of the probabilities, or of the values; the shape of the model's output.
        mean_error: its standard error over masks.
        standard_deviation: over masks, same shape.
        standard_deviation_error: its standard error.
        entropy: (n, *rest), total uncertainty; None for values.
        entropy_error: its standard error.
        mutual_information: (n, *rest), the part that is due to the masks; None for values.
        mutual_information_error: its standard error.
        draws: how many masks.
        seed: repeats the prediction.
    """

    mean: Tensor
    mean_error: Tensor
    standard_deviation: Tensor
    standard_deviation_error: Tensor
    entropy: Tensor | None
    entropy_error: Tensor | None
    mutual_information: Tensor | None
    mutual_information_error: Tensor | None
    draws: int
    seed: int


def predict(
    model: nn.Module,
    inputs: Any,
    draws: int = 100,
    *,
    outputs: Outputs = "logits",
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Prediction:
    """Predict with every stochastic site switched on: `draws` passes, each with fresh masks.

    Dropout modules, functions, attention, recurrent layers, stochastic depth and DropConnect are
    on whatever mode the model is in; norm layers stay in eval. Modes, buffers, the layers' own
    streams and the global random state are as before afterwards, also after an error.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    >>> found = predict(model, torch.ones(2, 4), draws=20, seed=0)
    >>> found.mean.shape, found.entropy.shape
    (torch.Size([2, 3]), torch.Size([2]))

    Args:
        model: returns one tensor, examples first; auxiliary ones of train mode are left out.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        draws: how many masks, at least 2.
        outputs: what the model returns: "logits" of classes on axis 1 (a single column: of the
            second of two classes), "probabilities" of classes, or real "values".
        batch_size: examples in one pass; None: all at once.
        generator: seeds the masks; a private one, seeded by the operating system, without it.
        seed: in place of a generator. Equal seeds repeat for equal batch sizes.

    Raises:
        TypeError: if an argument is of the wrong type, or the model returns no tensor.
        ValueError: if there are no examples, inputs or predictions are not finite, `draws` is
            below 2, `batch_size` below 1, or probabilities do not sum to one.
    """
    check_model(model)
    check_inputs(inputs)
    _check_count(draws, "draws", 2)
    if batch_size is not None:
        _check_count(batch_size, "batch_size", 1)
    if outputs not in {"logits", "probabilities", "values"}:
        raise ValueError(
            f'outputs has to be "logits", "probabilities" or "values", but got {outputs!r}'
        )
    _, seed = private_generator(generator, seed)
    n = tensors_in(inputs)[0].shape[0]
    with torch.no_grad(), guarded(model), _own_streams_restored(model):
        switch_on(model)
        _leave_out_auxiliary(model, _rows(inputs, 0, batch_size or n, n))
        _seed_everything(model, seed)
        passes = torch.stack([_pass(model, inputs, batch_size) for _ in range(draws)])
    if outputs == "values":
        return _summary(passes, False, seed)
    probabilities = _probabilities(passes, outputs)
    return _summary(probabilities, True, seed)


def _leave_out_auxiliary(model: nn.Module, inputs: Any) -> None:
    """Put a model in eval that has more outputs in train mode, where what drops are its parts."""
    scripted = isinstance(model, torch.jit.ScriptModule)
    if scripted or not isinstance(call(model, inputs), tuple | list):
        return
    parts = dict(model.named_modules())
    names = [site.name.partition("#")[0] for site in sites(model, inputs)]
    model.training = any("." not in name and name not in parts for name in names)


def _pass(model: nn.Module, inputs: Any, batch_size: int | None) -> Tensor:
    n = tensors_in(inputs)[0].shape[0]
    step = batch_size or n
    parts = [
        predictions(model, _rows(inputs, start, start + step, n)) for start in range(0, n, step)
    ]
    found = torch.cat(parts) if len(parts) > 1 else parts[0]
    check_outputs(model, found)
    return found.to(device="cpu", dtype=torch.float64)


def _rows(inputs: Any, start: int, stop: int, n: int) -> Any:
    """The examples start … stop of every tensor that has an axis of examples."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop] if inputs.dim() and inputs.shape[0] == n else inputs
    if isinstance(inputs, dict):
        return {name: _rows(value, start, stop, n) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return tuple(_rows(value, start, stop, n) for value in inputs)
    return inputs


def _probabilities(passes: Tensor, outputs: Outputs) -> Tensor:
    """(draws, n, classes, *rest); a single logit is that of the second of two classes.

    Raises:
        ValueError: if what should be probabilities is not.
    """
    single = passes.dim() == 2 or passes.shape[2] == 1
    if outputs == "logits":
        return passes.sigmoid() if single else passes.softmax(2)
    total = passes.sum(2) if not single else torch.ones_like(passes)
    inside = float(passes.min()) >= 0 and float(passes.max()) <= 1
    if not inside or not torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise ValueError(
            "the model's outputs are not probabilities: they leave [0, 1] or do not sum to one "
            'over axis 1; say outputs="logits" or outputs="values"'
        )
    return passes


def _entropy(p: Tensor, axis: int) -> Tensor:
    """Entropy in nats over the classes; of two classes where only one column is given."""
    if p.dim() > axis and p.shape[axis] > 1:
        summed: Tensor = torch.special.entr(p).sum(axis)
        return summed
    second = p.squeeze(axis) if p.dim() > axis else p
    entropy: Tensor = torch.special.entr(second) + torch.special.entr(1 - second)
    return entropy


def _summary(passes: Tensor, classes: bool, seed: int) -> Prediction:
    k = len(passes)
    mean = passes.mean(0)
    without = (k * mean - passes) / (k - 1)  # means of all draws but one
    squares = (passes - mean).square()
    variance = squares.sum(0) / (k - 1)
    deviation = variance.sqrt()
    # Leaving draw i out of a sum of squares takes k/(k−1) of its own square with it.
    left = (squares.sum(0) - squares * k / (k - 1)).clamp(min=0) / max(k - 2, 1)
    deviation_error = _jackknife_error(left.sqrt())
    error = deviation / k**0.5
    if not classes:
        nothing = (None, None, None, None)
        return Prediction(mean, error, deviation, deviation_error, *nothing, k, seed)
    each = _entropy(passes, 2)
    total, total_without = _entropy(mean, 1), _entropy(without, 2)
    each_without = (each.sum(0) - each) / (k - 1)
    uncertain = (
        *_jackknife(total, total_without),
        *_jackknife(total - each.mean(0), total_without - each_without),
    )
    return Prediction(mean, error, deviation, deviation_error, *uncertain, k, seed)


def _jackknife(whole: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """Value with its O(1/k) bias removed, and its standard error, entry by entry."""
    k = len(without)
    return k * whole - (k - 1) * without.mean(0), _jackknife_error(without)


def _jackknife_error(without: Tensor) -> Tensor:
    k = len(without)
    return ((k - 1) / k * (without - without.mean(0)).square().sum(0)).sqrt()


@contextmanager
def _own_streams_restored(model: nn.Module) -> Iterator[None]:
    """Put the streams of droplens layers back where they were."""
    streams = [m._stream for m in model.modules() if isinstance(m, MaskedLayer)]
    before = [
        (stream, stream.calls.clone(), stream.generator.get_state() if stream.generator else None)
        for stream in streams
    ]
    try:
        yield
    finally:
        for stream, calls, state in before:
            stream.calls = calls
            if stream.generator is not None and state is not None:
                stream.generator.set_state(state)


def _seed_everything(model: nn.Module, seed: int) -> None:
    """Seed the global streams that `guarded` has put aside."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)  # a forward may draw from these
    np.random.seed(seed % 2**32)
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)


def _check_count(value: int, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} has to be an int, but got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} has to be at least {least}, but got {value}")
