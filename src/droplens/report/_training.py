"""Sections for measures on request of what dropout does to training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from droplens.dynamics import Alignment, GapExplained, GradientNoise
from droplens.estimates import Estimate
from droplens.penalties import EquivalentRates
from droplens.report._document import Column, Section, Table
from droplens.report._figures import bars
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
    "stands what these spectra would show with random eigenvectors, and its standard deviation."
)
_RATES_TEXT = (
    "Rates at which other masks in the place of the network's own would cost the same, by the "
    "Gaussian value. A network trained with them would be another network."
)


def _shown(estimates: Sequence[Estimate]) -> Estimate | float:
    """A single network's estimate, or the mean over networks."""
    return estimates[0] if len(estimates) == 1 else over([e.value for e in estimates])


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
            " ".join(dict.fromkeys(n for found in sets.values() for g in found for n in g.notes)),
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
        "site alone, and all of them.",
    )
    return Section("How noisy does dropout make the gradient?", _NOISE_TEXT, [table])


def _aligned(sets: Mapping[str, Sequence[Alignment]], unit: str) -> Section:
    rows = [
        (
            name,
            _shown([a.value for a in found]),
            _shown([a.null for a in found]),
            over([a.null_deviation for a in found]),
            over([a.trace_hessian for a in found]),
            over([a.trace_noise for a in found]),
        )
        for name, found in sets.items()
    ]
    columns = [
        Column("set"),
        Column("alignment"),
        Column("by chance"),
        Column("its deviation"),
        Column("trace of the Hessian", f"{unit} per squared weight"),
        Column("trace of the noise", f"({unit} per weight)²"),
    ]
    examples = next(iter(sets.values()))[0].examples
    note = f"Both of {examples} examples together; errors are over masks and probes."
    table = Table(columns, rows, "Alignment of noise and curvature", note)
    return Section("Does the noise lie along the curvature?", _ALIGNED_TEXT, [table])


def _rates(sets: Mapping[str, Sequence[EquivalentRates]], unit: str) -> Section:
    rows = []
    unreached: dict[str, str] = {}
    for name, found in sets.items():
        for law in found[0].rates:
            rates = [f.rates[law] for f in found if law in f.rates]
            rows.append((law, name, over([100 * rate for rate in rates])))
        unreached |= found[0].unreached
    columns = [Column("mask"), Column("set"), Column("rate of the same cost", "%")]
    note = " ".join(f"{law}: {why}." for law, why in unreached.items())
    table = Table(columns, rows, "Rates of other masks that cost the same", note)
    return Section("Which other dropout would cost the same?", _RATES_TEXT, [table])


TRAINING: Final[Mapping[str, Callable[[Mapping[str, Sequence[Any]], str], Section]]] = {
    "gap": _gap,
    "gradient_noise": _noise,
    "alignment": _aligned,
    "equivalent_rates": _rates,
}
