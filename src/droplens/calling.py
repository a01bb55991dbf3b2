"""Calling a stranger's model: inputs in any usual form, one tensor of predictions out."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class ForwardError(RuntimeError):
    """The model's own forward raised; what it raised is the cause."""


class SiteError(ValueError):
    """A stochastic site asks for something impossible, such as a rate of NaN."""


def call(model: nn.Module, inputs: Any) -> Any:
    """Run `model` on a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ForwardError: if the model's forward raises.
        SiteError: if a site's rate or shape is impossible.
        ValueError: if it does because inputs and weights differ in device or dtype.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, list | tuple):
            return model(*inputs)
        return model(inputs)
    except SiteError:
        raise
    except Exception as error:
        misfit = _misfit(model, inputs, error)
        if misfit is not None:
            raise ValueError(misfit) from error
        said = f"the model's forward raised {type(error).__name__}: {error}"
        raise ForwardError(f"{said}{_on_parts(inputs, error)}") from error


def predictions(model: nn.Module, inputs: Any) -> Tensor:
    """Run `model` and return its predictions as one floating point tensor.

    A mapping of outputs (a dict, Hugging Face's ModelOutput) counts as its "logits"; those of
    every token, (n, T, C) in such mappings, are laid out as torch's losses want them, (n, C, T).

    Raises:
        ForwardError: if the model's forward raises.
        TypeError: if the model returns neither a tensor nor logits.
        ValueError: if the predictions are a single number or not in single or double precision,
            or the inputs do not fit the weights.
    """
    outputs = one_tensor(call(model, inputs))
    if not outputs.is_floating_point():
        raise ValueError(f"the model's predictions have dtype {outputs.dtype}; floats are needed")
    weight = next(model.parameters(), outputs)
    for what, tensor in (("weights", weight), ("predictions", outputs)):
        if tensor.dtype in HALF:
            raise ValueError(_too_coarse(what, tensor.dtype))
    return outputs


def one_tensor(outputs: Any) -> Tensor:
    """The predictions in what a forward returned.

    Raises:
        TypeError: if they cannot be told.
        ValueError: if they are a single number.
    """
    if isinstance(outputs, Tensor):
        if outputs.dim() == 0:
            raise ValueError(
                "the model's output is a single number; it has to have one row per example, "
                "so return the predictions and let the loss reduce them"
            )
        return outputs
    kind = type(outputs).__name__
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
        if isinstance(logits, Tensor):
            return one_tensor(logits.movedim(-1, 1) if logits.dim() == 3 else logits)
        kind = f"{kind} with {', '.join(map(repr, outputs)) or 'nothing in it'}"
    elif isinstance(outputs, list | tuple):
        kind = f"{kind} of {len(outputs)}"
    raise TypeError(
        f"the model returned a {kind}, but one tensor of predictions is needed (or a mapping with "
        "'logits'); wrap the model in a module whose forward returns the predictions alone"
    )


def check_model(model: object) -> None:
    """Refuse what is no network.

    Raises:
        TypeError: if `model` is no torch module.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model has to be a network, but got the class; write {model.__name__}(…)")
    raise TypeError(
        f"model has to be a torch module, but got {type(model).__name__}; a function of tensors "
        "becomes one as the forward of an nn.Module"
    )


def check_open(model: nn.Module) -> None:
    """Refuse what runs outside Python, where no call of a dropout is seen.

    Raises:
        TypeError: if the model is scripted or traced, or a part of it is.
    """
    check_model(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            part = f"'s {path!r}" if path else ""
            raise TypeError(
                f"the model{part} was scripted or traced (torch.jit), so its dropout cannot be "
                "seen; pass the module that it was made of"
            )


# What torch says where a forward takes its inputs for another number of examples.
_OTHER_SIZE = re.compile("invalid for input of size|must match|[Ee]xpected hidden|Expected size")


def _on_parts(inputs: Any, error: Exception) -> str:
    """That a forward is also given parts of a batch, where it may have counted on all of it."""
    given = tensors_in(inputs)
    if not _OTHER_SIZE.search(str(error)) or not given or not given[0].dim():
        return ""
    return (
        f". It was given {len(given[0])} examples: droplens calls the forward with parts of the "
        "data too, so a batch size that is fixed in the forward has to be read from its inputs, "
        "as in x.shape[0]"
    )


def _too_coarse(what: str, dtype: torch.dtype) -> str:
    return (
        f"the model's {what} are {dtype}, too coarse for the small differences that dropout "
        "makes; measure a copy in single precision, copy.deepcopy(model).float(), outside autocast"
    )


def _misfit(model: nn.Module, inputs: Any, error: Exception) -> str | None:
    """What separates inputs from weights, if that is what torch complains of.

    Raises:
        ValueError: if the weights hold no numbers.
    """
    if not isinstance(error, RuntimeError) or not re.search("type|device", str(error)):
        return None
    check_weights(model)
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        return None
    for tensor in tensors_in(inputs):
        if tensor.device != weight.device:
            return (
                f"inputs are on device {str(tensor.device)!r} but the model's weights on "
                f"{str(weight.device)!r}; move one of them with .to(device)"
            )
        if tensor.is_floating_point() and tensor.dtype != weight.dtype:
            if weight.dtype in HALF:
                return _too_coarse("weights", weight.dtype)
            return (
                f"inputs are {tensor.dtype} but the model's weights {weight.dtype}; convert the "
                f"inputs with .to({weight.dtype})"
            )
    return None


def tensors_in(inputs: Any) -> list[Tensor]:
    """Every tensor among the inputs, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, list | tuple):
        return [tensor for item in inputs for tensor in tensors_in(item)]
    return []


def device_of(model: nn.Module, inputs: Any) -> torch.device:
    """Where the model computes: the device of its weights, else of its inputs, else the CPU.

    Raises:
        ValueError: if the weights hold no numbers.
    """
    check_weights(model)
    known = [*model.parameters(), *model.buffers(), *tensors_in(inputs)]
    return known[0].device if known else torch.device("cpu")


def check_weights(model: nn.Module) -> None:
    """Refuse weights on the meta device, before anything is made to go with them.

    Raises:
        ValueError: if there are any.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"the model's weight {name!r} is on the meta device, which holds no numbers; build "
                "the model on a real one, or give it memory and weights (model.to_empty, then "
                "load_state_dict)"
            )


def check_inputs(inputs: Any) -> None:
    """Refuse inputs without examples or with NaN or Inf.

    Raises:
        TypeError: if there is no tensor among them.
        ValueError: if they are empty or not finite.
    """
    tensors = tensors_in(inputs)
    if not tensors:
        hint = " without tensors (tokenizers: return_tensors='pt')"
        raise TypeError(
            "inputs has to be a tensor, a tuple or a mapping of tensors, but got "
            f"{type(inputs).__name__}{hint if isinstance(inputs, Mapping) else ''}"
        )
    if any(tensor.numel() == 0 for tensor in tensors):
        raise ValueError("inputs is empty: there is no example to measure on")
    for tensor in tensors:
        if tensor.is_meta:
            raise ValueError("inputs is on the meta device, which holds no numbers; pass real data")
        if tensor.is_floating_point() and not _finite(tensor):
            raise ValueError("inputs holds NaN or Inf; clean the data first")


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are; a finite sum says so in one pass."""
    numbers = tensor.detach()
    return math.isfinite(abs(numbers.sum().item())) or bool(torch.isfinite(numbers).all())


def check_outputs(model: nn.Module, outputs: Tensor) -> None:
    """Refuse predictions with NaN or Inf, and name the weight that is to blame if one is.

    Raises:
        ValueError: if a prediction is not finite.
    """
    if _finite(outputs):
        return
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            raise ValueError(f"the model's weight {name!r} holds NaN or Inf; the network is broken")
    raise ValueError(
        "the model's predictions hold NaN or Inf although its inputs and weights do not; "
        "look for an overflow or a division by zero in its forward"
    )


def agree(part: Tensor, whole: Tensor) -> bool:
    """Whether outputs are the same up to rounding."""
    if part.shape != whole.shape:
        return False
    scale = float(whole.detach().abs().max()) if whole.numel() else 0.0
    slack = 1e3 * torch.finfo(whole.dtype).eps * scale
    return float((part.detach() - whole.detach()).abs().max()) <= slack


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[None]:
    """While open, embeddings give dense gradients, which can be differentiated and measured."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    sparse = [module for module in model.modules() if isinstance(module, kinds) and module.sparse]
    for module in sparse:
        module.sparse = False
    try:
        yield
    finally:
        for module in sparse:
            module.sparse = True
