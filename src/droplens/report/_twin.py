"""The numbers of an inspection for its JSON twin."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from torch import Tensor

from droplens.estimates import Estimate
from droplens.inspection import Inspection

_MOST_NUMBERS: Final = 10_000


def inspection_numbers(inspection: Inspection) -> dict[str, Any]:
    """Every number of an inspection, without tensors of the size of a layer."""
    return {
        "examples": inspection.examples,
        "loss": inspection.loss,
        "unit": inspection.unit,
        "base": inspection.base,
        "accuracy": inspection.accuracy,
        "seed": inspection.seed,
        "sites": [
            {**numbers_of(site), "law": None if site.law is None else str(site.law)}
            for site in inspection.sites
        ],
        "cost": numbers_of(inspection.cost),
        "equalization": {
            name: {
                "layer": inspection.layers[name],
                "units": len(equal.scores),
                "variation": equal.variation,
                "participation": equal.participation,
            }
            for name, equal in inspection.equalization.items()
        },
        "spectra": {
            name: {
                "nuclear": found.nuclear,
                "stable_rank": found.stable_rank,
                "effective_rank": found.effective_rank,
            }
            for name, found in inspection.spectra.items()
        },
        "condensation": {
            name: {
                "neurons": len(found.labels),
                "omitted": found.omitted,
                "orientations": found.orientations,
                "effective_ratio": found.effective_ratio,
                "weighted_orientations": found.weighted_orientations,
            }
            for name, found in inspection.condensation.items()
        },
        "fisher": None
        if inspection.fisher is None
        else {"trace": inspection.fisher.trace, "method": inspection.fisher.method},
        "hessian": None
        if inspection.hessian is None
        else {
            "trace": inspection.hessian.trace,
            "relative_trace": inspection.hessian.relative_trace,
            "top_eigenvalues": inspection.hessian.top_eigenvalues.tolist(),
            "residuals": inspection.hessian.residuals.tolist(),
            "notes": list(inspection.hessian.notes),
        },
        "flatness": numbers_of(inspection.flatness),
        "expected_flatness": numbers_of(inspection.expected_flatness),
        "sharpness": numbers_of(inspection.sharpness),
        "extras": {name: numbers_of(found) for name, found in inspection.extras.items()},
    }


def numbers_of(value: Any) -> Any:
    """Dataclasses as mappings; tensors as lists, large ones (a number per weight) as None."""
    if isinstance(value, Estimate):
        return value
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= _MOST_NUMBERS else None
    if is_dataclass(value) and not isinstance(value, type):
        # What a result does not print is as large as the weights.
        return {f.name: numbers_of(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {key: numbers_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers_of(item) for item in value]
    return value
