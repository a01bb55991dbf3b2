"""What a command names: factories in modules, weights in files, data and losses by name."""

import contextlib
import importlib
import importlib.util
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="MODULE:FACTORY|digits",
        help="What to measure on: a function that returns a pair (inputs, targets), a data set or "
        "a DataLoader; or scikit-learn's digits, (n, 64) with 10 classes.",
    ),
]
LossOption = Annotated[
    str,
    typer.Option(
        "--loss",
        metavar="LOSS",
        help="cross_entropy, mse, bce (with logits) or poisson, each a mean; or MODULE:FACTORY "
        "for a loss object.",
    ),
]
DrawsOption = Annotated[
    int,
    typer.Option(
        "--draws", metavar="N", min=2, help="Masks to draw, for all sites and for each alone."
    ),
]
MeasureOption = Annotated[
    list[str] | None,
    typer.Option(
        "--measure",
        metavar="NAME",
        help="A measure that takes longer and is made on request; may be repeated. A page lists "
        'the names that were not asked for under "not measured".',
    ),
]

LOSSES = {
    "cross_entropy": "CrossEntropyLoss",
    "mse": "MSELoss",
    "bce": "BCEWithLogitsLoss",
    "poisson": "PoissonNLLLoss",
}
# Where training scripts put the weights in a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model")
# What torch.compile and the wrappers of torch.distributed put before every name.
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
_SHOWN = 3


@contextlib.contextmanager
def strangers() -> Iterator[None]:
    """While open, what others' code prints goes to standard error: the output is ours alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def network(spec: str, weights: Path | None = None) -> "nn.Module":
    """The network that the factory `spec` returns, with `weights` loaded into it.

    Raises:
        TypeError: if the factory returns something else.
        ValueError: if the factory cannot be had or the weights do not fit.
    """
    found = networks(spec, weights)
    if len(found) != 1:
        raise TypeError(
            f"{spec} returned {len(found)} networks, but one is inspected; droplens compare takes "
            "several"
        )
    return found[0]


def networks(spec: str, weights: Path | None = None) -> "list[nn.Module]":
    """The network or networks that the factory `spec` returns.

    Raises:
        TypeError: if the factory returns something else.
        ValueError: if the factory cannot be had or the weights do not fit.
    """
    from torch import nn

    made = build(spec)
    found = list(made) if isinstance(made, Sequence) else [made]
    for item in found:
        if not isinstance(item, nn.Module):
            raise TypeError(
                f"{spec} has to return a torch module, but returned a {type(item).__name__}"
            )
    if weights is not None:
        for item in found:
            load_weights(item, weights)
    return found


def data(spec: str, test: bool = False) -> Any:
    """The data that the factory `spec` returns; "digits" by name, their test part if asked for."""
    if spec == "digits":
        from droplens.data import digits

        split = digits()
        return tuple(split.test if test else split.train)
    return build(spec)


def loss_of(spec: str) -> "nn.Module":
    """A loss by name or from a factory.

    Raises:
        ValueError: if the name is not known.
    """
    from torch import nn

    if spec in LOSSES:
        loss: nn.Module = getattr(nn, LOSSES[spec])()
        return loss
    if ":" not in spec:
        raise ValueError(
            f"--loss has to be one of {', '.join(LOSSES)} or MODULE:FACTORY, but got {spec!r}"
        )
    made: nn.Module = build(spec)
    return made


def build(spec: str) -> Any:
    """What the factory MODULE:FACTORY returns; MODULE may be a path to a .py file.

    Raises:
        ValueError: if there is no such module or factory, or it raises.
    """
    module_name, separator, name = spec.rpartition(":")
    if not (separator and module_name and name):
        raise ValueError(
            f"{spec!r} has to be MODULE:FACTORY, such as nets:make or path/to/nets.py:make"
        )
    factory = _attribute(_module(module_name), name, spec)
    if not callable(factory):
        raise ValueError(f"{spec} is a {type(factory).__name__}, not a function to call")
    return _run(factory, f"{spec} raised")


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        # A console script does not look for modules where it is started; `python -m` does.
        _importable(Path.cwd())
        module: ModuleType = _run(
            lambda: importlib.import_module(name), f"cannot import module {name!r}:"
        )
        return module
    path = Path(name).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {name!r}")
    _importable(path.parent)
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == str(path):
            return known
    own = path.stem if path.stem not in sys.modules else f"_{path.stem}_of_command_line"
    found = importlib.util.spec_from_file_location(own, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[own] = module
    run = found.loader.exec_module
    _run(lambda: run(module), f"cannot import {name!r}:")
    return module


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _attribute(module: ModuleType, name: str, spec: str) -> Any:
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError as error:
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(
            f"{spec}: there is no {name!r} in {module.__name__}; it defines "
            f"{', '.join(sorted(own)) or 'no function'}"
        ) from error


def _run(function: Callable[[], Any], what: str) -> Any:
    """Run others' code; whatever it raises is bad input, also when it leaves the program.

    Raises:
        ValueError: if it raises.
    """
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what} {type(error).__name__}: {error}") from error


# --- Weights -------------------------------------------------------------------------------------


def load_weights(model: "nn.Module", path: Path) -> None:
    """Fill `model` from a file of torch.save(model.state_dict()) or of safetensors.

    Nothing in the file is run: code in it is refused.

    Raises:
        ValueError: if the file is missing or broken, or belongs to another architecture.
    """
    if not path.is_file():
        raise ValueError(f"there is no weights file {str(path)!r}")
    given = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    wanted = model.state_dict()
    given = _unwrapped(given, wanted)
    # A tensor shared by two names is saved under one of them.
    filled = {value.data_ptr() for name, value in wanted.items() if name in given}
    missing = [n for n, v in wanted.items() if n not in given and v.data_ptr() not in filled]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f"{name} {tuple(value.shape)} in the file, {tuple(wanted[name].shape)} in the network"
        for name, value in given.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    differences = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("not in the network", unexpected),
            ("other shapes", shapes),
        )
        if names
    ]
    if differences:
        raise ValueError(
            f"weights in {str(path)!r} are of another architecture; {'; '.join(differences)}"
        )
    model.load_state_dict(given, strict=False)


def _unwrapped(given: "dict[str, Tensor]", wanted: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Under the names of the network, where its wrapper was saved."""
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) and name not in wanted for name in given):
            given = {name.removeprefix(prefix): value for name, value in given.items()}
    return given


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _read_torch(path: Path) -> "dict[str, Tensor]":
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL (\S+)", str(error))
        if wants is None:
            raise ValueError(_broken(path)) from error
        raise ValueError(
            f"weights file {str(path)!r} holds more than tensors (it asks to run {wants[1]}), and "
            "code in weights files is never run; save model.state_dict() alone"
        ) from error
    # A cut or foreign file breaks torch's reader in whatever way its bytes suggest.
    except Exception as error:
        raise ValueError(_broken(path)) from error
    if isinstance(found, Mapping):
        nested = next((found[k] for k in _NESTED if isinstance(found.get(k), Mapping)), found)
        if nested and all(isinstance(value, torch.Tensor) for value in nested.values()):
            return dict(nested)
    raise ValueError(
        f"weights file {str(path)!r} holds a {type(found).__name__}, but a state dict of tensors "
        "is needed; save model.state_dict()"
    )


def _read_safetensors(path: Path) -> "dict[str, Tensor]":
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(
            f"reading {str(path)!r} needs safetensors; pip install 'droplens[safetensors]'"
        ) from error
    try:
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(_broken(path)) from error
    return found


def _broken(path: Path) -> str:
    return f"weights file {str(path)!r} is truncated or not a weights file"
