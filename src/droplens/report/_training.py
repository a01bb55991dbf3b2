"""Sections for measures on request of what dropout does to training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from droplens.dynamics import (
    Alignment,
    FrozenMaskOrder,
    GapExplained,
    GradientNoise,
    ModifiedLoss,
)
from droplens.estimates import Estimate
from droplens.penalties import EquivalentRates, PenaltyCurve
from droplens.report._document import Column, Section, Table
from droplens.report._figures import Curve, bars, lines
from droplens.report._weights import over

_GAP_TEXT = (
    "The training loss in a log is taken with dropout on and with norm layers in train mode, the "
    "held-out loss with both at rest. Their difference is spread + shift (what dropout costs) + "
    "norm mode (what the batch's own statistics add under dropout) + other data: the loss without "
    "dropout on the training minus on the held-out data, with the error of other held-out "
    "examples. The four sum to the gap.\n\n"
    "In eval mode a network with dropout stands for an average over its masks. KL(geometric ‖ "
    "scaled) is what scaling loses of the average of logits, KL(arithmetic ‖ scaled) of that of "
    "predictions; MC dropout saves what the last column says."
)
_NOISE_TEXT = (
    "With other masks the gradient of one batch is another. The trace of its covariance is "
    "dropout's implicit effect, beside the squared length of the mean gradient. Averaging over m "
    "masks divides it by m; the modified loss's R_2 at step size ε is ε/4 times (trace + squared "
    "mean)."
)
_ALIGNED_TEXT = (
    "Tr(HΣ)/(‖H‖‖Σ‖) of the loss's Hessian H and the covariance Σ of dropout's gradient noise: 1 "
    "where the noise lies along the curvature. Positive matrices align by chance, so beside it "
    "stands what these spectra would show with random eigenvectors, and how many of its standard "
    "deviations the alignment lies above that."
)
_RATES_TEXT = (
    "Rates at which other masks in the place of the network's own would cost the same, by the "
    "Gaussian value. A network trained with them would be another network."
)
_MODIFIED_TEXT = (
    "R_S is the loss without dropout, R_1 what dropout adds to it, and R_2 = (ε/4) E‖∇R(w, z)‖² "
    "what steps of size ε add. R_S + R_1 + R_2 is what gradient descent with a mask held fixed "
    "descends. With fresh masks only the drift (ε/4)‖∇(R_S + R_1)‖² is descended; the rest of R_2 "
    "comes with the noise."
)
_ORDER_TEXT = (
    "Gradient descent of step ε with one mask held fixed, against two gradient flows from the same "
    "weights. The distance to the flow of R + (ε/4)‖∇R‖² falls as ε², that to the flow of R as ε. "
    "Kinks (ReLU) that a trajectory crosses, and steps too long for the curvature, disturb both."
)
_CURVE_TEXT = (
    "What dropout would cost this network, without a mask, were every site at the same rate: the "
    "Gaussian value and the second order. A network trained at that rate would be another network."
)


def _shown(estimates: Sequence[Estimate]) -> Estimate | float:
    """A single network's estimate, or the mean over networks."""
    return estimates[0] if len(estimates) == 1 else over([e.value for e in estimates])


def _noted(sets: Mapping[str, Sequence[Any]]) -> str:
    """What the numbers of all networks say of themselves, once each, as sentences."""
    notes = dict.fromkeys(note for found in sets.values() for one in found for note in one.notes)
    return " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes)


def _gap(sets: Mapping[str, Sequence[GapExplained]], unit: str) -> Section:
    parts: dict[str, Callable[[GapExplained], Estimate]] = {
        "spread": lambda g: g.spread,
        "shift": lambda g: g.shift,
        "norm mode": lambda g: g.norm_mode,
        "other data": lambda g: g.generalization,
    }
    heads: dict[str, Callable[[GapExplained], Estimate]] = {
        "training loss": lambda g: g.training,
        "held-out loss": lambda g: g.validation,
        "gap": lambda g: g.gap,
        **parts,
    }
    rows = [
        (name, *(_shown([read(g) for g in found]) for read in heads.values()))
        for name, found in sets.items()
    ]
    blocks: list[Any] = [
        Table(
            [Column("set"), *(Column(head, unit) for head in heads)],
            rows,
            "Why the training loss is not the held-out loss",
            _noted(sets),
        ),
        _ensembles(sets, unit),
        bars(
            {
                name: {
                    part: _estimate(_shown([read(g) for g in found]))
                    for part, read in parts.items()
                }
                for name, found in sets.items()
            },
            title="Where the gap comes from",
            quantity=f"training minus held-out loss ({unit})",
            rows="set",
        ),
    ]
    return Section("Why is the training loss not the held-out loss?", _GAP_TEXT, blocks)


def _ensembles(sets: Mapping[str, Sequence[GapExplained]], unit: str) -> Table:
    rows = []
    for name, found in sets.items():
        each = [g.ensembles for g in found]
        known = [e.gain for e in each if e.gain is not None]
        divergences = [e.arithmetic_divergence for e in each if e.arithmetic_divergence is not None]
        rows.append(
            (
                name,
                _shown([e.scaled for e in each]),
                _shown([e.geometric_divergence for e in each]),
                _shown(divergences) if divergences else None,
                _shown(known) if known else None,
            )
        )
    columns = [
        Column("set"),
        Column("held-out loss", unit),
        Column("KL(geometric ‖ scaled)", unit),
        Column("KL(arithmetic ‖ scaled)", unit),
        Column("MC dropout saves", unit),
    ]
    return Table(columns, rows, "The network against its averages over masks")


def _estimate(value: Estimate | float) -> Estimate:
    return value if isinstance(value, Estimate) else Estimate(value)


def _noise(sets: Mapping[str, Sequence[GradientNoise]], unit: str) -> Section:
    rows: list[tuple[Any, ...]] = []
    for name, found in sets.items():
        rows += [
            (site, name, _shown([n.by_site[site] for n in found if site in n.by_site]), None)
            for site in found[0].by_site
        ]
        rows.append(
            (
                "all together",
                name,
                _shown([n.trace for n in found]),
                _shown([n.signal for n in found]),
            )
        )
    columns = [
        Column("site"),
        Column("set"),
        Column("trace of the noise", f"({unit} per weight)²"),
        Column("squared mean gradient", f"({unit} per weight)²"),
    ]
    examples = next(iter(sets.values()))[0].examples
    table = Table(
        columns,
        rows,
        "Dropout's noise on the gradient",
        f"Of the gradient of {examples} examples together; it falls as one over their number. Each "
        f"site alone, and all of them. {_noted(sets)}",
    )
    return Section("How noisy does dropout make the gradient?", _NOISE_TEXT, [table])


def _aligned(sets: Mapping[str, Sequence[Alignment]], unit: str) -> Section:
    rows = [
        (
            name,
            _shown([a.value for a in found]),
            _shown([a.null for a in found]),
            _shown([a.excess for a in found]),
            _shown([a.trace_hessian for a in found]),
            _shown([a.trace_noise for a in found]),
        )
        for name, found in sets.items()
    ]
    columns = [
        Column("set"),
        Column("alignment"),
        Column("by chance"),
        Column("above that", "deviations"),
        Column("trace of the Hessian", f"{unit} per squared weight"),
        Column("trace of the noise", f"({unit} per weight)²"),
    ]
    examples = next(iter(sets.values()))[0].examples
    note = f"Both of {examples} examples together; errors are over masks and probes. {_noted(sets)}"
    table = Table(columns, rows, "Alignment of noise and curvature", note)
    return Section("Does the noise lie along the curvature?", _ALIGNED_TEXT, [table])


def _modified(sets: Mapping[str, Sequence[ModifiedLoss]], unit: str) -> Section:
    parts: dict[str, Callable[[ModifiedLoss], Estimate]] = {
        "R_S": lambda m: m.risk,
        "R_1": lambda m: m.explicit,
        "R_2": lambda m: m.implicit,
        "drift in R_2": lambda m: m.drift,
        "noise in R_2": lambda m: m.diffusion,
        "R_S + R_1 + R_2": lambda m: m.total,
    }
    rows = [
        (name, *(_shown([read(m) for m in found]) for read in parts.values()))
        for name, found in sets.items()
    ]
    first = next(iter(sets.values()))[0]
    table = Table(
        [Column("set"), *(Column(part, unit) for part in parts)],
        rows,
        f"The modified loss at step size ε = {first.learning_rate:g}",
        f"Of {first.examples} examples as one batch. R_2 and its parts are proportional to ε. "
        f"{_noted(sets)}",
    )
    return Section("What does training with dropout descend?", _MODIFIED_TEXT, [table])


def _order(sets: Mapping[str, Sequence[FrozenMaskOrder]], unit: str) -> Section:
    rows: list[tuple[Any, ...]] = []
    for name, found in sets.items():
        for k, size in enumerate(found[0].step_sizes):
            distances = ([f.to_modified[k] for f in found], [f.to_plain[k] for f in found])
            rows.append((name, f"{size:g}", *map(over, distances)))
        orders = ([f.modified_order for f in found], [f.plain_order for f in found])
        rows.append((name, "exponent of ε", *map(over, orders)))
    columns = [
        Column("set"),
        Column("step size ε"),
        Column("to the modified flow", "weights"),
        Column("to the plain flow", "weights"),
    ]
    time = next(iter(sets.values()))[0].time
    table = Table(columns, rows, f"Distance of gradient descent from two flows at time {time:g}")
    return Section("Does the modified loss describe descent with one mask?", _ORDER_TEXT, [table])


def _curve(sets: Mapping[str, Sequence[PenaltyCurve]], unit: str) -> Section:
    rows: list[tuple[Any, ...]] = []
    curves = {}
    kinds: dict[str, Callable[[PenaltyCurve], Tensor]] = {
        "Gaussian": lambda c: c.total,
        "second order": lambda c: c.second_order,
    }
    for name, found in sets.items():
        percents = [100 * p for p in found[0].rates]
        values: dict[str, list[Estimate | float]] = {}
        for kind, read in kinds.items():
            each = [read(f).tolist() for f in found]
            values[kind] = [over(at_rate) for at_rate in zip(*each, strict=True)]
            line = [float(value) for value in values[kind]]
            curves[f"{name}, {kind}"] = Curve(percents, line)
        rows += [(p, name, *row) for p, *row in zip(percents, *values.values(), strict=True)]
    columns = [Column("rate", "%"), Column("set"), *(Column(kind, unit) for kind in kinds)]
    left_out = {
        site: why for found in sets.values() for f in found for site, why in f.unmeasured.items()
    }
    blocks: list[Any] = [
        Table(columns, rows, "What other rates would cost", _sentences(left_out)),
        lines(
            curves, title="What other rates would cost", x="rate (%)", y=f"cost of dropout ({unit})"
        ),
    ]
    return Section("What would other rates cost?", _CURVE_TEXT, blocks)


def _sentences(reasons: Mapping[str, str]) -> str:
    return " ".join(f"{name}: {why}." for name, why in reasons.items())


def _rates(sets: Mapping[str, Sequence[EquivalentRates]], unit: str) -> Section:
    rows = []
    unreached: dict[str, str] = {}
    for name, found in sets.items():
        for law in found[0].rates:
            rates = [f.rates[law] for f in found if law in f.rates]
            rows.append((law, name, over([100 * rate for rate in rates])))
        unreached |= found[0].unreached
    columns = [Column("mask"), Column("set"), Column("rate of the same cost", "%")]
    note = _sentences(unreached)
    table = Table(columns, rows, "Rates of other masks that cost the same", note)
    return Section("Which other dropout would cost the same?", _RATES_TEXT, [table])


TRAINING: Final[Mapping[str, Callable[[Mapping[str, Sequence[Any]], str], Section]]] = {
    "gap": _gap,
    "gradient_noise": _noise,
    "alignment": _aligned,
    "modified_loss": _modified,
    "frozen_mask_order": _order,
    "penalty_curve": _curve,
    "equivalent_rates": _rates,
}
