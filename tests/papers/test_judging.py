"""When a claim holds: intervals, families, verdicts, and what contradicts itself."""

import math

import pytest

from droplens import papers
from droplens.estimates import Estimate, t_bound
from droplens.papers import Cell, Claim, Criterion, Judgement, Theory

BETWEEN = Criterion(value="x", expected=1.0, low=0.9, high=1.1, level=0.95)


def make(**changes):
    fields = {
        "id": "P1.x",
        "paper": "P1",
        "statement": "x is 1.",
        "source": "nowhere",
        "settings": dict.fromkeys(papers.SCALES, ({"k": 1},)),
        "measure": lambda setting, seeds, theory: {"value": [1.0 for _ in seeds]},
        "criterion": BETWEEN,
        "broken": ("penalty-doubled",),
        **changes,
    }
    return Claim(**fields)


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [
        (1.0, 0.0, "holds"),
        (1.1, 0.0, "holds"),
        (1.1 + 1e-12, 0.0, "does not hold"),
        (1.0, 0.02, "holds"),
        (1.0, 0.2, "cannot conclude"),
        (1.09, 0.02, "cannot conclude"),
        (2.0, 0.1, "does not hold"),
        (0.0, 0.1, "does not hold"),
        (math.nan, math.nan, "cannot conclude"),
        (1.0, math.nan, "cannot conclude"),
    ],
)
def test_verdict_of_one_setting(value, error, verdict):
    assert BETWEEN.judge([Estimate(value, error, 10, "seeds")]) == verdict


def test_the_interval_is_students_and_shared_by_the_settings():
    """The edge of the verdict lies where t at the family's level says."""
    for settings in (1, 4):
        bound = t_bound(9, 0.95 ** (1 / settings))
        inside = Estimate(1.0, 0.0999 / bound, 10, "seeds")
        outside = Estimate(1.0, 0.1001 / bound, 10, "seeds")
        good = [Estimate(1.0, 0.0, 10, "seeds")] * (settings - 1)
        assert BETWEEN.judge([*good, inside]) == "holds"
        assert BETWEEN.judge([*good, outside]) == "cannot conclude"


def test_one_setting_outside_decides():
    inside, outside = Estimate(1.0, 0.001, 9, "seeds"), Estimate(3.0, 0.001, 9, "seeds")
    assert BETWEEN.judge([inside, outside]) == "does not hold"
    cells = [Cell({"k": k}, (0, 1), {"value": [v, v + 0.01]}) for k, v in enumerate((1.0, 3.0))]
    judgement = Judgement(make(), tuple(cells))
    assert judgement.worst == 1
    assert judgement.measured.value == pytest.approx(3.005)
    assert "at the setting that decides (k 1)" in judgement.sentence()
    assert "We expected: holds." in judgement.sentence()


def test_a_run_that_diverged_leaves_the_claim_open():
    judgement = Judgement(make(), (Cell({}, (0, 1), {"value": [1.0, math.inf]}),))
    assert judgement.verdict == "cannot conclude"
    assert judgement.to_dict()["measured"] is None


def test_json_has_the_promised_fields():
    cell = Cell({"k": 1}, (0, 1, 2), {"value": [0.99, 1.0, 1.01]})
    entry = Judgement(make(), (cell,)).to_dict()
    assert entry["verdict"] == entry["expected_verdict"] == "holds"
    assert entry["measured"] == pytest.approx(1.0)
    assert entry["standard_error"] == pytest.approx(0.01 / 3**0.5)
    assert (entry["id"], entry["paper"], entry["n"]) == ("P1.x", "P1", 3)
    assert entry["expected"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "P4.x"}, "id has to begin with 'P1' and a dot, but got 'P4.x'"),
        ({"settings": {"test": ()}}, "settings has to name the scales"),
        ({"expected_verdict": "cannot conclude"}, "expected_verdict cannot be"),
        ({"expected_verdict": "does not hold"}, "reason has to say why P1.x goes against"),
        ({"broken": ()}, "broken has to name theories"),
        ({"broken": ("nonsense",)}, "broken has to name theories"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (-math.inf, math.inf)])
def test_criteria_without_a_range_are_refused(low, high):
    with pytest.raises(ValueError, match="low and high have to enclose a range"):
        Criterion(value="x", expected=1.0, low=low, high=high)


def test_claims_have_ids_of_their_own_and_plain_settings():
    from droplens.runs import canonical

    ids = [claim.id for claim in papers.claims()]
    assert len(ids) == len(set(ids))
    for claim in papers.claims():
        for scale in papers.SCALES:
            cells = [canonical(cell) for cell in claim.cells(scale)]
            assert len(cells) == len(set(cells)) > 0
        assert claim.statement.endswith(".")


def test_select():
    assert papers.select(("p1",)) == tuple(c for c in papers.claims() if c.paper == "P1")
    (one,) = papers.select(("p1.OBJECTIVE", "P1.objective"))
    assert one.id == "P1.objective"
    with pytest.raises(ValueError, match=r"called 'P1.objectiv'; did you mean P1.objective"):
        papers.select(("P1.objectiv",))
    with pytest.raises(ValueError, match=r"'zzz'; see droplens reproduce --list"):
        papers.select(("zzz",))


@pytest.mark.parametrize("broken", ["", *papers.BREAKS])
def test_the_theory_breaks_where_it_says(broken):
    theory, p = Theory(broken), 0.2
    assert theory.variance(p) == pytest.approx(4.0 if broken == "wrong-lambda" else 0.25)
    assert theory.factor == (2.0 if broken == "penalty-doubled" else 1.0)
    assert theory.rescale(p) == pytest.approx(1.0 if broken == "missing-rescale" else 1.25)
    assert theory.swapped == (broken == "swapped-losses")
    variance = theory.variance(p) * theory.factor
    assert theory.predicted(p) == pytest.approx(variance / (1 + variance))


def test_unknown_breaks_are_refused():
    with pytest.raises(ValueError, match="broken has to be one of wrong-lambda"):
        Theory("nonsense")
