"""What a cost lets us say: that it is there, how it splits, and what stands for the masks.

Where an error bar reaches the threshold the outcome is "cannot conclude", never a guess.
"""

import math
from collections.abc import Sequence

from droplens.discovery import Site
from droplens.estimates import Estimate, exact
from droplens.inspection._cost import Cost
from droplens.inspection._verdicts import LEVEL, MOST_SITES, percent
from droplens.penalties import FEW_UNITS
from droplens.verdicts import Outcome, Verdict

GAUSSIAN_TOLERANCE = 0.12  # of the Monte-Carlo spread


def _against(measured: Estimate, threshold: float) -> Outcome:
    """Whether a number lies above a threshold: its 95% interval has to lie on one side."""
    low, high = measured.interval(LEVEL)
    if low > threshold:
        return "yes"
    return "no" if high < threshold else "cannot conclude"


def cost_verdicts(cost: Cost, unit: str, who: str = "") -> list[Verdict]:
    """Everything there is to say of a cost; of an exact zero, that it is one."""
    verdicts = [cost_verdict(cost, unit, who)]
    if _is_zero(cost.gap):
        return verdicts
    if not math.isnan(cost.spread.value):
        verdicts.append(split_verdict(cost, unit))
    if cost.gaussian is not None and cost.second_order is not None:
        verdicts.append(approximation_verdict(cost))
    return verdicts


def cost_verdict(cost: Cost, unit: str, who: str = "") -> Verdict:
    """What the dropout costs, and what share of the training loss under dropout that is."""
    gap = cost.gap
    outcome = "no" if _is_zero(gap) else _against(gap, 0.0)
    whole = cost.dropped_loss
    share = f", {percent(gap.value / whole)} of the loss under dropout" if whole > 0 else ""
    apart = _apart(cost.lawless)
    if _is_zero(gap):
        masked = f"none of {gap.n} masks changes the loss"
        why = masked if gap.n > 1 else "with p = 0 nothing is dropped"
        sentence = f"Dropout{apart} costs {who}exactly 0 {unit} on this data: {why}."
    elif outcome == "yes":
        sentence = (
            f"Dropout{apart} costs {who}{gap} {unit} on this data{share} "
            f"({cost.base} without dropout, {whole:.4g} with it)."
        )
    elif outcome == "no":
        lower = gap.rescaled(-1)
        sentence = f"Dropout{apart} lowers the loss {who}on this data by {lower} {unit}."
    else:
        sentence = (
            f"What dropout{apart} costs {who}({gap} {unit}) cannot be told from zero with "
            f"{gap.n} {gap.over}."
        )
    return Verdict(
        sentence,
        outcome,
        f"mean loss over masks minus the loss without dropout, above zero by its 95% interval "
        f"over {gap.over}",
        0.0,
        gap,
        gap.n,
        unit,
        question=_COSTS,
        id="cost",
    )


_COSTS = "Does dropout cost anything?"


def lawless_verdict(sites: Sequence[Site], who: str = "") -> list[Verdict]:
    """That a cost is unknown because no site has a law; nothing where one has, or none is met."""
    if not sites or any(site.law is not None for site in sites):
        return []
    why = "; ".join(dict.fromkeys(site.reason or "" for site in sites))
    names = [site.name for site in sites]
    verb = "has" if len(names) == 1 else "have"
    return [
        Verdict(
            f"What dropout costs {who}on this data is not known: {_named(names)} {verb} no law "
            f"({why}).",
            "cannot conclude",
            "sites whose law is known, at least one: masks are drawn from it",
            1.0,
            exact(0.0, "sites"),
            len(names),
            "",
            question=_COSTS,
            id="cost",
        )
    ]


def _is_zero(gap: Estimate) -> bool:
    """Whether no mask changes anything: p is 0 (a computed zero), or no output hears of it."""
    return gap.value == 0 and gap.standard_error == 0


def _apart(lawless: Sequence[str]) -> str:
    """The sites that the cost does not hold."""
    if not lawless:
        return ""
    return f" without {_named(lawless)}, which {'has' if len(lawless) == 1 else 'have'} no law,"


def _named(sites: Sequence[str]) -> str:
    if len(sites) == 1:
        return f"site {sites[0]!r}"
    shown = ", ".join(map(repr, sites[:MOST_SITES]))
    more = len(sites) - MOST_SITES
    return f"sites {shown}" + (f" and {more} more" if more > 0 else "")


def split_verdict(cost: Cost, unit: str) -> Verdict:
    """How the cost splits into spread and shift."""
    shift, gap = cost.shift, cost.gap.value
    size = shift if shift.value >= 0 else shift.rescaled(-1)
    outcome = _against(size, 0.1 * abs(gap))
    spread_share = cost.spread.value / gap if gap else math.nan
    parts = f"spread {cost.spread}, shift {shift} {unit}"
    if outcome == "no":
        sentence = (
            f"The cost is {percent(spread_share)} spread: noise around the mean output, which "
            f"needs no label ({parts})."
        )
    elif outcome == "yes":
        direction = "adds to" if shift.value > 0 else "takes from"
        sentence = (
            f"The shift of the mean output {direction} the cost noticeably ({parts}), so the "
            "cost is not the penalty alone."
        )
    else:
        sentence = f"Whether the shift is more than a tenth of the cost stays open ({parts})."
    return Verdict(
        sentence,
        outcome,
        "size of the shift above a tenth of the gap, by its 95% interval",
        0.1 * abs(gap),
        size,
        shift.n,
        unit,
        question="Is more of the cost than a tenth a shift of the mean output?",
        id="split",
    )


def approximation_verdict(cost: Cost) -> Verdict:
    """How far the two values without masks are from the Monte-Carlo spread, and why.

    Raises:
        ValueError: if the cost holds no such values.
    """
    spread, gaussian, second = cost.spread, cost.gaussian, cost.second_order
    if gaussian is None or second is None:
        raise ValueError("cost holds no Gaussian value to compare, or none to second order")
    if spread.value <= 0:
        return _incomparable(cost, gaussian, second)
    relative = spread.standard_error * gaussian / spread.value**2
    away = abs(gaussian / spread.value - 1)
    distance = Estimate(away, relative, spread.n, spread.over)
    beyond = _against(distance, GAUSSIAN_TOLERANCE)
    answers: dict[Outcome, Outcome] = {"yes": "no", "no": "yes"}
    return Verdict(
        f"Against Monte Carlo with {cost.draws} masks the Gaussian value is "
        f"{_off(gaussian, spread)} and the second-order value "
        f"{_off(second, spread)}. {_why(cost, gaussian, second)}"
        f"{_left_out(cost)}",
        answers.get(beyond, "cannot conclude"),
        "relative distance of the Gaussian value from the Monte-Carlo spread, by its 95% interval",
        GAUSSIAN_TOLERANCE,
        distance,
        spread.n,
        "share of the spread",
        question=_STANDS,
        id="approximation",
    )


_STANDS = "Can the penalty stand for the masks?"


def _incomparable(cost: Cost, gaussian: float, second: float) -> Verdict:
    """Masks too few to see a spread: its truth is never negative."""
    distance = cost.spread.rescaled(-1, gaussian)
    return Verdict(
        f"With {cost.draws} masks the spread ({cost.spread}) cannot be told from zero, so the "
        f"Gaussian value ({gaussian:.4g}) and the second-order value ({second:.4g}) "
        f"cannot be held against it.{_left_out(cost)}",
        "cannot conclude",
        "Gaussian value minus the Monte-Carlo spread, comparable where the spread is above zero",
        0.0,
        distance,
        cost.spread.n,
        "units of the loss",
        question=_STANDS,
        id="approximation",
    )


def _missing(cost: Cost) -> list[str]:
    return [name for name, alone in cost.by_site.items() if alone.gaussian is None]


def _left_out(cost: Cost) -> str:
    """The sites that the masks drop and the values without masks do not know."""
    missing = _missing(cost)
    if not missing:
        return ""
    return f" Both values leave out {', '.join(map(repr, missing))}, which the masks include."


def _off(value: float, spread: Estimate) -> str:
    ratio = value / spread.value - 1
    return f"{percent(abs(ratio))} {'too low' if ratio < 0 else 'too high'}"


def _why(cost: Cost, better: float, second: float) -> str:
    """What the distances tell of their reason: the loss, the network, or the noise."""
    near = abs(better / cost.spread.value - 1) <= GAUSSIAN_TOLERANCE
    blind = [name for name, n in cost.participation.items() if n == 0 and _spreads(cost, name)]
    if blind and not near:
        return (
            f"No derivative reaches {_named(blind)}: what follows (rounding, a sign, an argmax) "
            "passes the masks on but no gradient, and both values are made of gradients, so "
            "Monte Carlo is the number to use."
        )
    if _missing(cost) and not near:
        return "Monte Carlo is the number to use."
    agree = abs(second - better) <= 0.02 * abs(better)
    if near:
        return (
            "They agree, so the noise is small against the curvature of the loss."
            if agree
            else _bend(second < better)
        )
    first = (
        "They agree, so it is not for the bend of the loss, which only one of them follows."
        if agree
        else _bend(second < better)
    )
    few = {name: n for name, n in cost.participation.items() if 0 < n < FEW_UNITS}
    name = min(few, key=few.__getitem__, default="")
    strong = (
        f", or that the noise at {name!r} is that of about {few[name]:.1f} equal coins, too few "
        "for a Gaussian"
        if few
        else ""
    )
    return (
        f"{first} What is left is that both take the outputs to move in proportion to the masks, "
        f"and noise that goes through further layers does not{strong}; Monte Carlo is the number "
        "to use."
    )


def _bend(below: bool) -> str:
    """Why the two values differ, which share everything but how they follow the loss."""
    if below:
        return (
            "The second order looks at the loss's curvature where the network already stands, "
            "and a confident softmax is flat there; the noise carries the outputs beyond."
        )
    return (
        "The second order takes the curvature at the undropped output for constant; the noise "
        "carries the outputs to where the loss is flatter."
    )


def _spreads(cost: Cost, name: str) -> bool:
    return name in cost.by_site and cost.by_site[name].spread.value > 0
