"""A claim of a paper: what it says and where, how it is measured, when it holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from droplens.estimates import Estimate, exact, mean_estimate
from droplens.papers._theory import BREAKS, Theory
from droplens.report import Figure, format_cell, format_number
from droplens.verdicts import CANNOT_CONCLUDE, Outcome, Verdict

Scale = Literal["test", "laptop", "paper"]
SCALES: Final[tuple[Scale, ...]] = get_args(Scale)

Setting = Mapping[str, Any]
"""What a run is made at, but for its seed: plain data, ready for JSON."""

Numbers = Mapping[str, Sequence[float] | Sequence[Sequence[float]]]
"""Quantity -> a number, or a curve, for each seed."""

Measure = Callable[[Setting, Sequence[int], Theory], Numbers]


@dataclass(frozen=True)
class Cell:
    """What was measured at one setting: every seed's numbers."""

    setting: Setting
    seeds: tuple[int, ...]
    numbers: Numbers

    def mean(self, quantity: str) -> list[float]:
        """The mean curve of a quantity over the seeds."""
        curves = self.numbers[quantity]
        return [math.fsum(at) / len(at) for at in zip(*curves, strict=True)]


_UNSEEN: Final = ("device", "folder")


def labels(cells: Sequence[Cell]) -> list[str]:
    """What tells each cell's setting from the others', in a few words."""
    common = shared(cells)
    found = []
    for cell in cells:
        own = {k: v for k, v in cell.setting.items() if k not in common and k not in _UNSEEN}
        found.append(", ".join(f"{_name(k)} {_short(v)}" for k, v in own.items()) or "as stated")
    return found


def shared(cells: Sequence[Cell]) -> dict[str, Any]:
    """What all settings have in common."""
    first, *others = (cell.setting for cell in cells)
    if not others:
        return {}
    missing = object()
    return {
        key: value
        for key, value in first.items()
        if key not in _UNSEEN and all(other.get(key, missing) == value for other in others)
    }


def describe(setting: Setting) -> str:
    """A setting in words."""
    return ", ".join(f"{_name(k)} {_short(v)}" for k, v in setting.items() if k not in _UNSEEN)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """When a statement holds: the mean over seeds lies between `low` and `high` at every setting.

    The interval of the mean, by Student's t over the seeds, decides: wholly inside at every
    setting, the statement holds; wholly outside at one, it does not; else it stays open. All
    settings together are wrong with probability 1 − `level` at most (Šidák).

    Raises:
        ValueError: if `low` is not below `high`, or neither is finite.
    """

    value: str
    """What the number is, in words."""
    expected: float | None
    """What the paper predicts for it; None where it predicts no more than the range."""
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    level: float = 0.99

    def __post_init__(self) -> None:
        if not self.low < self.high or not (math.isfinite(self.low) or math.isfinite(self.high)):
            raise ValueError(f"low and high have to enclose a range, but got {self.low, self.high}")

    @property
    def range(self) -> str:
        """Where the statement holds, in words."""
        if self.low == -math.inf:
            return f"below {format_number(self.high)}"
        if self.high == math.inf:
            return f"above {format_number(self.low)}"
        return f"between {format_number(self.low)} and {format_number(self.high)}"

    @property
    def predicted(self) -> str:
        """The prediction in words."""
        return self.range if self.expected is None else format_number(self.expected)

    @property
    def edge(self) -> float:
        """A finite end of the range: the lower one where both are."""
        return self.low if math.isfinite(self.low) else self.high

    @property
    def rule(self) -> str:
        """The criterion in words."""
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"the {self.level:.0%} interval of {self.value} lies {self.range}{unit} "
            "at every setting (does not hold: wholly outside at one; else it cannot be concluded)"
        )

    def margin(self, estimate: Estimate, settings: int) -> float:
        """How far inside the range the whole interval lies; negative: part of it is outside."""
        low, high = estimate.interval(self.level ** (1 / settings))
        return min(low - self.low, self.high - high)

    def judge(self, estimates: Sequence[Estimate]) -> Outcome:
        """The verdict over all settings."""
        settings = len(estimates)
        margins = [self.margin(estimate, settings) for estimate in estimates]
        if any(self._outside(estimate, settings) for estimate in estimates):
            return "does not hold"
        return "holds" if all(margin >= 0 for margin in margins) else CANNOT_CONCLUDE

    def _outside(self, estimate: Estimate, settings: int) -> bool:
        low, high = estimate.interval(self.level ** (1 / settings))
        return high < self.low or low > self.high


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of a paper that can be measured, and what we expect of it.

    `measure(setting, seeds, theory)` returns numbers for each seed; "value" is judged by the
    `criterion`. It has to depend on its arguments alone: runs happen in any process and order.
    `broken` names the wrong theories under which the verdict has to turn into its opposite.

    Settings that differ in what `stacks` names alone are measured at once: `measure` is then given
    a list of values under each of these names (also where it is one setting), and returns numbers
    for all seeds of the first, then for all of the second. What a run draws must not depend on the
    settings beside it.

    Raises:
        ValueError: if a field contradicts another, or a broken theory is unknown.
    """

    id: str
    paper: str
    statement: str
    source: str
    """Theorem, equation or figure."""
    settings: Mapping[Scale, Sequence[Setting]]
    measure: Measure
    criterion: Criterion
    broken: tuple[str, ...]
    seeds: Mapping[Scale, int] = field(
        default_factory=lambda: {"test": 5, "laptop": 10, "paper": 50}
    )
    figure: Callable[[Sequence[Cell]], Figure] | None = None
    expected_verdict: Outcome = "holds"
    reason: str = ""
    """Why we expect that a statement does not hold."""
    chosen: str = ""
    """What the paper leaves open and we chose."""
    sampled: bool = True
    """Whether seeds matter. If not, one run is the exact value."""
    batch: int = 50
    """Seeds that are run together."""
    stacks: tuple[str, ...] = ()
    """Which settings leave all shapes alike, so that runs which differ in them train at once."""
    data: str = ""
    """Which data set on disk the claim can take instead of the digits: "mnist" or "cifar10".

    Its settings say by `n` how many examples they read.
    """

    def __post_init__(self) -> None:
        if not self.id.startswith(f"{self.paper}."):
            raise ValueError(f"id has to begin with {self.paper!r} and a dot, but got {self.id!r}")
        if set(self.settings) != set(SCALES):
            raise ValueError(f"settings has to name the scales {SCALES}, but got {self.settings}")
        if self.expected_verdict not in {"holds", "does not hold"}:
            raise ValueError(f"expected_verdict cannot be {self.expected_verdict!r}")
        if self.expected_verdict == "does not hold" and not self.reason:
            raise ValueError(f"reason has to say why {self.id} goes against the paper")
        if self.data and not all("n" in one for cells in self.settings.values() for one in cells):
            raise ValueError(f"settings of {self.id} have to say how many examples, n, they read")
        for name in self.stacks:
            if not all(name in one for cells in self.settings.values() for one in cells):
                raise ValueError(f"every setting of {self.id} has to say {name!r}, which it stacks")
        if not self.broken or not set(self.broken) <= set(BREAKS):
            raise ValueError(f"broken has to name theories of {set(BREAKS)}, but got {self.broken}")

    def cells(self, scale: Scale, folder: Path | None = None) -> list[Setting]:
        """The settings at a scale; with a folder of data, also those on the data in it."""
        settings = list(self.settings[scale])
        if folder is not None and self.data:
            extra = [{**setting, "data": self.data, "folder": str(folder)} for setting in settings]
            settings += [setting for setting in extra if setting not in settings]
        return settings

    def run(
        self, settings: Sequence[Setting], seeds: Sequence[int], theory: Theory
    ) -> list[Numbers]:
        """Measure at settings that differ in `stacks` alone; each setting's numbers.

        Raises:
            ValueError: if they differ in more.
        """
        first, count = settings[0], len(seeds)
        for other in settings[1:]:
            apart = {k for k in {*first, *other} if first.get(k) != other.get(k)}
            if not apart <= set(self.stacks):
                raise ValueError(
                    f"settings may differ in {', '.join(self.stacks) or 'nothing'} to be measured "
                    f"at once, but differ in {', '.join(sorted(apart))}"
                )
        runs = len(settings) * count
        listed = {name: [setting[name] for setting in settings] for name in self.stacks}
        numbers = self.measure({**first, **listed}, seeds, theory)
        for name, entries in numbers.items():
            if len(entries) != runs:
                raise ValueError(
                    f"{self.id} gave {len(entries)} entries of {name!r} for {runs} runs"
                )
        return [
            {name: entries[k * count : (k + 1) * count] for name, entries in numbers.items()}
            for k in range(len(settings))
        ]

    def seed_count(self, scale: Scale, asked: int | None = None) -> int:
        """How many seeds to run."""
        if not self.sampled:
            return 1
        return self.seeds[scale] if asked is None else asked


@dataclass(frozen=True)
class Judgement:
    """What came out for a claim."""

    claim: Claim
    cells: tuple[Cell, ...]
    broken: str = ""

    @property
    def estimates(self) -> list[Estimate]:
        """The judged value at each setting, over seeds."""
        return [_estimate(cell, self.claim.sampled) for cell in self.cells]

    @property
    def verdict(self) -> Outcome:
        """What the numbers say."""
        return self.claim.criterion.judge(self.estimates)

    @property
    def as_expected(self) -> bool:
        """Whether they say what we expected."""
        return self.verdict == self.claim.expected_verdict

    @property
    def turned(self) -> bool:
        """Whether they say the opposite, as under a broken theory they have to."""
        return {self.verdict, self.claim.expected_verdict} == {"holds", "does not hold"}

    @property
    def worst(self) -> int:
        """The setting that decides: where the value is least inside, or most outside, its range."""
        count = len(self.cells)
        margins = [self.claim.criterion.margin(one, count) for one in self.estimates]
        return min(
            range(count), key=lambda k: -math.inf if margins[k] != margins[k] else margins[k]
        )

    @property
    def measured(self) -> Estimate:
        """The value at the setting that decides."""
        return self.estimates[self.worst]

    def sentence(self) -> str:
        """The verdict in words."""
        claim, criterion = self.claim, self.claim.criterion
        unit = f" {criterion.unit}" if criterion.unit else ""
        said = f"Measured {format_cell(self.measured)}{unit}, predicted {criterion.predicted}{unit}"
        if len(self.cells) > 1:
            said += f", at the setting that decides ({labels(self.cells)[self.worst]})"
        said += "."
        if not self.as_expected:
            said += f" We expected: {claim.expected_verdict}."
        if claim.reason and self.verdict == "does not hold":
            said += f" {claim.reason}"
        return said

    def to_verdict(self) -> Verdict:
        """The verdict as pages show it."""
        criterion, measured = self.claim.criterion, self.measured
        edge = _nearest(criterion, measured.value)
        return Verdict(
            sentence=self.sentence(),
            outcome=self.verdict,
            rule=criterion.rule,
            threshold=edge,
            measured=measured,
            n=measured.n,
            unit=criterion.unit,
            question=self.claim.statement,
            id=self.claim.id,
        )

    def to_dict(self) -> dict[str, Any]:
        """The claim for JSON."""
        claim, criterion, measured = self.claim, self.claim.criterion, self.measured
        return {
            "id": claim.id,
            "paper": claim.paper,
            "statement": claim.statement,
            "verdict": self.verdict,
            "expected_verdict": claim.expected_verdict,
            "measured": _finite(measured.value),
            "standard_error": _finite(measured.standard_error),
            "expected": criterion.edge if criterion.expected is None else criterion.expected,
            "predicted": criterion.predicted,
            "n": measured.n,
            "over": measured.over,
            "unit": criterion.unit,
            "value": criterion.value,
            "rule": criterion.rule,
            "low": _finite(criterion.low),
            "high": _finite(criterion.high),
            "level": criterion.level,
            "source": claim.source,
            "reason": claim.reason,
            "chosen": claim.chosen,
            "broken": self.broken,
            "broken_twins": list(claim.broken),
            "settings": [
                {
                    "setting": dict(cell.setting),
                    "measured": _finite(estimate.value),
                    "standard_error": _finite(estimate.standard_error),
                    "n": estimate.n,
                }
                for cell, estimate in zip(self.cells, self.estimates, strict=True)
            ],
        }


def _estimate(cell: Cell, sampled: bool) -> Estimate:
    values: list[float] = [float(v) for v in cell.numbers["value"]]  # type: ignore[arg-type]
    if not sampled:
        return exact(values[0], over="instances")
    if not all(map(math.isfinite, values)):
        # A run that diverged says nothing about the statement: nothing can be concluded.
        return Estimate(math.nan, math.nan, len(values), "seeds")
    return mean_estimate(values, over="seeds")


def _nearest(criterion: Criterion, value: float) -> float:
    edges = [edge for edge in (criterion.low, criterion.high) if math.isfinite(edge)]
    return min(edges, key=lambda edge: abs(edge - value)) if math.isfinite(value) else edges[-1]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _name(key: str) -> str:
    return {"lambda": "λ", "keep": "θ"}.get(key, key)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
