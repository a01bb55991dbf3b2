"""droplens: see what dropout does to your network.

The public names, nothing else. Each is imported from its room on first use, so
that the command line answers `--help` without waiting for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from droplens import data as data
    from droplens import dynamics as dynamics
    from droplens import linear as linear
    from droplens import losses as losses
    from droplens import masks as masks
    from droplens import measure as measure
    from droplens import nn as nn
    from droplens import recording as recording
    from droplens import training as training
    from droplens.discovery import Site as Site
    from droplens.discovery import register_site as register_site
    from droplens.discovery import sites as sites
    from droplens.dynamics import explain_gap as explain_gap
    from droplens.dynamics import gradient_noise as gradient_noise
    from droplens.dynamics import modified_loss as modified_loss
    from droplens.dynamics import replace_dropout as replace_dropout
    from droplens.estimates import Estimate as Estimate
    from droplens.inspection import Comparison as Comparison
    from droplens.inspection import Inspection as Inspection
    from droplens.inspection import compare as compare
    from droplens.inspection import inspect as inspect
    from droplens.penalties import decompose as decompose
    from droplens.penalties import equivalent_rates as equivalent_rates
    from droplens.penalties import penalty as penalty
    from droplens.penalties import penalty_curve as penalty_curve
    from droplens.prediction import predict as predict
    from droplens.recording import Recorder as Recorder

__version__ = "0.1.0"

_ROOMS = (
    "data",
    "dynamics",
    "linear",
    "losses",
    "masks",
    "measure",
    "nn",
    "recording",
    "training",
)


_HOMES = {
    "Estimate": "estimates",
    "Site": "discovery",
    "Comparison": "inspection",
    "Inspection": "inspection",
    "Recorder": "recording",
    "compare": "inspection",
    "inspect": "inspection",
    "decompose": "penalties",
    "equivalent_rates": "penalties",
    "explain_gap": "dynamics",
    "gradient_noise": "dynamics",
    "modified_loss": "dynamics",
    "penalty": "penalties",
    "penalty_curve": "penalties",
    "predict": "prediction",
    "register_site": "discovery",
    "replace_dropout": "dynamics",
    "sites": "discovery",
}

__all__ = ["__version__", *_ROOMS, *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"droplens.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"droplens.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'droplens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
