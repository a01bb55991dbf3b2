"""What a report says of the minimum's shape: flat along directions, dull under noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from droplens.estimates import Estimate
from droplens.inspection import EqualLoss, Inspection
from droplens.measure import Flatness, Sharpness
from droplens.report._document import Column, Figure, Section, Table
from droplens.report._figures import Curve, lines
from droplens.report._weights import over, pooled

_FLAT_TEXT = (
    "The loss along random directions in which every row of a weight is scaled to the row's own "
    "norm, biases kept. A flat minimum rises little."
)
_EQUAL_LOSS_TEXT = (
    "A network that fits better is flatter for no reason of shape, because the curvature of the "
    "cross-entropy fades with confidence. So the outputs of every network were first multiplied "
    "by a number τ ≤ 1, which is the same as scaling its last layer, until all had the loss of "
    "the worst network."
)
_MASKED_TEXT = (
    "With masks on, the loss is the mean over masks, which is what training with dropout "
    "minimises; the same masks serve every point."
)


def flatness_section(
    sets: Mapping[str, Sequence[Inspection]], equal: EqualLoss | None, unit: str
) -> list[Section]:
    """Flatness and sharpness by set, at equal loss first; nothing where nothing was measured."""
    several = len(sets) > 1
    blocks: list[Any] = []
    text = _FLAT_TEXT
    if equal is not None:
        title = f"At equal loss ({equal.loss:.4g} {unit})"
        blocks += _figures(equal.flatness, title, unit, True)
        blocks += _noise_tables(equal.sharpness, "Noise on the weights, at equal loss", unit)
        rows = [(name, over(scales)) for name, scales in equal.scales.items()]
        blocks.append(
            Table([Column("set"), Column("τ")], rows, "What the outputs were multiplied by")
        )
    if several:
        text = f"{text} {_EQUAL_LOSS_TEXT}"
    raw = {n: [i.flatness for i in found if i.flatness] for n, found in sets.items()}
    title = "As trained" if several else "Loss along random directions"
    blocks += _figures(raw, title, unit, several)
    noise = {n: [i.sharpness for i in found if i.sharpness] for n, found in sets.items()}
    blocks += _noise_tables(noise, "Noise on the weights, as trained", unit)
    masked = {
        n: [i.expected_flatness for i in found if i.expected_flatness] for n, found in sets.items()
    }
    shown = {name: found for name, found in masked.items() if found}
    if shown:
        text = f"{text}\n\n{_MASKED_TEXT}"
        blocks += _figures(shown, "As trained, averaged over masks", unit, several)
    return [Section("How flat is the minimum?", text, blocks)] if blocks else []


def _noise_tables(sets: Mapping[str, Sequence[Sharpness]], caption: str, unit: str) -> list[Table]:
    """Loss increases under noise, a row a set."""
    if not all(sets.values()):
        return []
    first = next(iter(sets.values()))[0]
    rows: list[tuple[str | Estimate, ...]] = [
        (name, *(pooled(each) for kind in ("raw", "scale_free") for each in _columns(found, kind)))
        for name, found in sets.items()
    ]
    columns = [
        Column("set"),
        *(Column(f"σ = {level:g}", unit) for level in first.absolute),
        *(Column(f"{100 * level:g}% of a filter", unit) for level in first.relative),
    ]
    return [
        Table(
            columns,
            rows,
            caption,
            "Mean increase of the loss under normal noise: of standard deviation σ on every "
            "weight, which changes when weights are rescaled without changing the network, and "
            "relative to the size of each filter, which does not."
            + _said(sum(s.not_finite for found in sets.values() for s in found)),
        )
    ]


def _columns(found: Sequence[Sharpness], kind: str) -> list[tuple[Estimate, ...]]:
    return list(zip(*(getattr(s, kind) for s in found), strict=True))


def _said(not_finite: int) -> str:
    if not not_finite:
        return ""
    return f" At {not_finite} of the points the loss is NaN or infinite."


def _figures(
    sets: Mapping[str, Sequence[Flatness]], title: str, unit: str, rise: bool
) -> list[Figure]:
    """Mean over networks (over directions for one) with a 95% band, at the finite points."""
    if not all(sets.values()):
        return []
    curves = {name: _curve(found, rise) for name, found in sets.items()}
    if not all(curve.x for curve in curves.values()):
        return []
    each = [flat for found in sets.values() for flat in found]
    who = "networks" if any(len(found) > 1 for found in sets.values()) else each[0].loss[-1].over
    return [
        lines(
            curves,
            title=title,
            x="radius (share of every filter's norm)",
            y=f"{'loss increase' if rise else 'loss'} ({unit})",
            caption=f"{len(each[0].values)} directions a network; bands are 95% intervals over "
            f"{who}.{_said(sum(flat.not_finite for flat in each))}",
        )
    ]


def _curve(found: Sequence[Flatness], rise: bool) -> Curve:
    columns = zip(*((f.increase if rise else f.loss) for f in found), strict=True)
    points = [
        (radius, point)
        for radius, point in zip(found[0].radii, map(pooled, columns), strict=True)
        if math.isfinite(point.value)
    ]
    bands = [point.interval() for _, point in points]
    return Curve(
        [radius for radius, _ in points],
        [point.value for _, point in points],
        [low for low, _ in bands],
        [high for _, high in bands],
    )
