"""Rules that turn numbers into plain sentences. Each states its threshold and its error.

Where an error bar reaches the threshold the outcome is "cannot conclude", never a guess.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from droplens.estimates import Estimate, exact, mean_estimate, t_bound, welch
from droplens.measure import Equalization
from droplens.verdicts import Outcome, Verdict

LEVEL = 0.95
EQUALISED_PARTICIPATION = 0.9  # of the units of a site
MOST_SITES = 4  # that get a sentence each


def percent(share: float) -> str:
    """A share in percent, as sentences have it."""
    return f"{100 * share:.0f}%" if abs(share) >= 0.1 else f"{100 * share:.2g}%"


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
            f"{percent(shares[lowest])} of the units (at {list(equal)[lowest]!r}) to "
            f"{percent(max(shares))}.",
            "yes" if alike == len(each) else "no",
            f"the smallest participation (Σs)²/Σs² of s_i = ‖u_i‖·rms(h_i) over the sites, at "
            f"least {percent(EQUALISED_PARTICIPATION)} of the units",
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
        f"equal units of {n_units} ({percent(share)}).",
        outcome,
        f"participation (Σs)²/Σs² of s_i = ‖u_i‖·rms(h_i), u_i the outgoing weights in "
        f"{layer!r}, at least {percent(EQUALISED_PARTICIPATION)} of the units",
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
