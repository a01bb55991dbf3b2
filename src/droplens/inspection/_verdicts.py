"""Rules that turn numbers into plain sentences. Each states its threshold and its error.

Where an error bar reaches the threshold the outcome is "cannot conclude", never a guess.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from droplens.estimates import Estimate, exact, mean_estimate, t_bound, welch
from droplens.inspection._cost import Cost
from droplens.measure import Equalization
from droplens.penalties import FEW_UNITS
from droplens.verdicts import Outcome, Verdict

LEVEL = 0.95
GAUSSIAN_TOLERANCE = 0.12  # of the Monte-Carlo spread
EQUALISED_PARTICIPATION = 0.9  # of the units of a site
MOST_SITES = 4  # that get a sentence each


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if abs(share) >= 0.1 else f"{100 * share:.2g}%"


def _against(measured: Estimate, threshold: float) -> Outcome:
    """Whether a number lies above a threshold: its 95% interval has to lie on one side."""
    low, high = measured.interval(LEVEL)
    if low > threshold:
        return "yes"
    return "no" if high < threshold else "cannot conclude"


def cost_verdicts(cost: Cost, unit: str, who: str = "") -> list[Verdict]:
    """Everything there is to say of a cost; nothing more where the cost itself is open."""
    verdicts = [cost_verdict(cost, unit, who), split_verdict(cost, unit)]
    if cost.gaussian is not None:
        verdicts.append(approximation_verdict(cost))
    return verdicts


def cost_verdict(cost: Cost, unit: str, who: str = "") -> Verdict:
    """What the dropout costs, and what share of the training loss under dropout that is."""
    gap = cost.gap
    outcome = _against(gap, 0.0)
    whole = cost.dropped_loss
    share = f", {_percent(gap.value / whole)} of the loss under dropout" if whole > 0 else ""
    if outcome == "yes":
        sentence = (
            f"Dropout costs {who}{gap} {unit} on this data{share} "
            f"({cost.base} without dropout, {whole:.4g} with it)."
        )
    elif outcome == "no":
        sentence = f"Dropout lowers the loss {who}on this data by {-gap.value:.4g} {unit}."
    else:
        sentence = (
            f"What dropout costs {who}({gap} {unit}) cannot be told from zero with "
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
        question="Does dropout cost anything?",
        id="cost",
    )


def split_verdict(cost: Cost, unit: str) -> Verdict:
    """How the cost splits into spread and shift."""
    shift, gap = cost.shift, cost.gap.value
    size = replace(shift, value=abs(shift.value))
    outcome = _against(size, 0.1 * abs(gap))
    spread_share = cost.spread.value / gap if gap else math.nan
    parts = f"spread {cost.spread}, shift {shift} {unit}"
    if outcome == "no":
        sentence = (
            f"The cost is {_percent(spread_share)} spread: noise around the mean output, which "
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
    spread, gaussian = cost.spread, cost.gaussian
    if gaussian is None:
        raise ValueError("cost holds no Gaussian value to compare")
    if spread.value <= 0:
        return _incomparable(cost, gaussian)
    relative = spread.standard_error * gaussian / spread.value**2
    distance = replace(spread, value=abs(gaussian / spread.value - 1), standard_error=relative)
    beyond = _against(distance, GAUSSIAN_TOLERANCE)
    answers: dict[Outcome, Outcome] = {"yes": "no", "no": "yes"}
    return Verdict(
        f"Against Monte Carlo with {cost.draws} masks the Gaussian value is "
        f"{_off(gaussian, spread)} and the second-order value "
        f"{_off(cost.second_order, spread)}. {_why(cost, gaussian)}"
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


def _incomparable(cost: Cost, gaussian: float) -> Verdict:
    """Masks too few to see a spread: its truth is never negative."""
    distance = replace(cost.spread, value=gaussian - cost.spread.value)
    return Verdict(
        f"With {cost.draws} masks the spread ({cost.spread}) cannot be told from zero, so the "
        f"Gaussian value ({gaussian:.4g}) and the second-order value ({cost.second_order:.4g}) "
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


def _left_out(cost: Cost) -> str:
    """The sites that the masks drop and the values without masks do not know."""
    missing = [name for name, alone in cost.by_site.items() if alone.gaussian is None]
    if not missing:
        return ""
    return f" Both values leave out {', '.join(map(repr, missing))}, which the masks include."


def _off(value: float, spread: Estimate) -> str:
    ratio = value / spread.value - 1
    return f"{_percent(abs(ratio))} {'too low' if ratio < 0 else 'too high'}"


def _why(cost: Cost, better: float) -> str:
    low = cost.second_order
    if abs(low - better) <= 0.02 * abs(better):
        why = "They agree, so the noise is small against the curvature of the loss."
    elif low < better:
        why = (
            "The second order looks at the loss's curvature where the network already stands, "
            "and a confident softmax is flat there; the noise carries the outputs beyond."
        )
    else:
        why = (
            "The second order takes the curvature at the undropped output for constant; the noise "
            "carries the outputs to where the loss is flatter."
        )
    if abs(better / cost.spread.value - 1) <= GAUSSIAN_TOLERANCE:
        return why
    few = {name: n for name, n in cost.participation.items() if 0 < n < FEW_UNITS}
    if few:
        name = min(few, key=few.__getitem__)
        return (
            f"{why} Both lean on many small contributions, but the noise at {name!r} is that of "
            f"about {few[name]:.1f} equal coins, so Monte Carlo is the number to use."
        )
    return (
        f"{why} Both take the outputs to move in proportion to the masks; noise that goes through "
        "further layers does not, so Monte Carlo is the number to use."
    )


def equalisation_verdicts(
    equal: Mapping[str, Equalization], layers: Mapping[str, str]
) -> list[Verdict]:
    """A verdict a site, or one for all of them where they are many."""
    each = [
        equalisation_verdict(name, layers[name], e.participation, len(e.scores))
        for name, e in equal.items()
    ]
    if len(each) <= MOST_SITES:
        return each
    shares = [verdict.measured.value for verdict in each]
    alike = sum(share >= EQUALISED_PARTICIPATION for share in shares)
    lowest = min(range(len(each)), key=shares.__getitem__)
    return [
        Verdict(
            f"The units are equalised at {alike} of {len(each)} sites. Participations go from "
            f"{_percent(shares[lowest])} of the units (at {list(equal)[lowest]!r}) to "
            f"{_percent(max(shares))}.",
            "yes" if alike == len(each) else "no",
            f"the smallest participation (Σs)²/Σs² of s_i = ‖u_i‖·rms(h_i) over the sites, at "
            f"least {_percent(EQUALISED_PARTICIPATION)} of the units",
            EQUALISED_PARTICIPATION,
            Estimate(shares[lowest], 0.0, 1, "data held fixed"),
            len(each),
            "share of the units",
            question="Are the units of every site equalised?",
            id="equalisation",
        )
    ]


def equalisation_verdict(site: str, layer: str, participation: float, n_units: int) -> Verdict:
    """Whether the units of one site carry equal weight (P1)."""
    share = participation / n_units
    outcome: Outcome = "yes" if share >= EQUALISED_PARTICIPATION else "no"
    word = "are" if outcome == "yes" else "are not"
    return Verdict(
        f"The units at {site!r} {word} equalised: their importances count as {participation:.1f} "
        f"equal units of {n_units} ({_percent(share)}).",
        outcome,
        f"participation (Σs)²/Σs² of s_i = ‖u_i‖·rms(h_i), u_i the outgoing weights in "
        f"{layer!r}, at least {_percent(EQUALISED_PARTICIPATION)} of the units",
        EQUALISED_PARTICIPATION,
        Estimate(share, 0.0, 1, "data held fixed"),
        n_units,
        "share of the units",
        question=f"Are the units at {site!r} equalised?",
        id=f"equalisation {site}",
    )


@dataclass(frozen=True)
class Sets:
    """Two sets of networks and a number of each, of which the smaller is the better.

    With one network a set, `first` and `second` hold what was measured on the two in pairs (the
    same directions), or a single exact number each; `networks` says how many there are.
    """

    names: tuple[str, str]
    first: Sequence[float]
    second: Sequence[float]
    networks: tuple[int, int]

    @property
    def single(self) -> bool:
        """Whether only two networks are compared."""
        return self.networks == (1, 1)

    def difference(self) -> Estimate:
        """First minus second; NaN error where there is nothing to estimate it from."""
        if self.single and len(self.first) == len(self.second) > 1:
            pairs = zip(self.first, self.second, strict=True)
            return mean_estimate([a - b for a, b in pairs], "directions")
        if self.single:
            return exact(self.first[0] - self.second[0], "data held fixed")
        if min(self.networks) < 2:
            value = float(mean_estimate(self.first)) - float(mean_estimate(self.second))
            return Estimate(value, math.nan, sum(self.networks), "seeds")
        found = welch(self.first, self.second)
        return Estimate(found.value, found.standard_error, sum(self.networks), "seeds")

    def outcome(self, difference: Estimate) -> Outcome:
        """Yes if the first is smaller, no if the second is: a two-sided t-test at 95%."""
        if not math.isfinite(difference.standard_error):
            return "cannot conclude"
        if difference.standard_error > 0:
            freedom = float(difference.n - 1)
            if not self.single:
                freedom = welch(self.first, self.second).degrees_of_freedom
            reach = t_bound(freedom, LEVEL) * difference.standard_error
            if abs(difference.value) <= reach:
                return "cannot conclude"
        elif difference.value == 0:
            return "cannot conclude"
        return "yes" if difference.value < 0 else "no"


def sets_verdict(sets: Sets, *, better: str, quantity: str, unit: str, key: str) -> Verdict:
    """Which of two sets of networks has the smaller `quantity`, and so is `better`."""
    a, b = sets.names
    difference = sets.difference()
    outcome = sets.outcome(difference)
    means = [float(mean_estimate(values)) for values in (sets.first, sets.second)]
    figures = f"{quantity} {means[0]:.4g} for {a!r}, {means[1]:.4g} for {b!r}"
    who = "Of these two networks, " if sets.single else "The networks "
    if outcome == "cannot conclude":
        why = (
            "one network in a set has no error bar"
            if not sets.single and min(sets.networks) < 2
            else "the error bars overlap"
        )
        whom = "of these two networks" if sets.single else "set"
        sentence = f"Which {whom} is {better} cannot be concluded, {why} ({figures})."
    else:
        winner = a if outcome == "yes" else b
        verb = "is" if sets.single else "are"
        sentence = f"{who}{winner!r} {verb} {better} ({figures})."
    test = "paired t-test over directions" if sets.single else "Welch's t-test over networks"
    return Verdict(
        sentence,
        outcome,
        f"{quantity}: {a!r} minus {b!r} below zero, two-sided {test} at 95%",
        0.0,
        difference,
        sum(sets.networks),
        unit,
        question=f"Is {a!r} {better} than {b!r}?",
        id=key,
    )
