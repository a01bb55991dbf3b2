"""Verdicts carry their proof, and refuse to be made without one."""

import json
import math

import pytest

from droplens.estimates import Estimate
from droplens.verdicts import Verdict

PARTS = {
    "sentence": "It costs.",
    "outcome": "yes",
    "rule": "above the threshold",
    "threshold": 0.0,
    "measured": Estimate(1.0, 0.1, 3),
    "n": 3,
    "unit": "nats",
}


def test_to_dict_is_plain():
    verdict = Verdict(**{**PARTS, "threshold": math.inf, "measured": Estimate(1.0, math.nan, 1)})
    plain = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert plain["threshold"] is None
    assert plain["measured"] == {"value": 1.0, "standard_error": None, "n": 1, "over": "masks"}
    assert plain["outcome"] == "yes"


@pytest.mark.parametrize(
    ("outcome", "conclusive"),
    [("yes", True), ("no", True), ("does not hold", True), ("cannot conclude", False)],
)
def test_conclusive(outcome, conclusive):
    assert Verdict(**{**PARTS, "outcome": outcome}).conclusive is conclusive


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sentence": " "}, ValueError, "sentence has to be a sentence"),
        ({"rule": ""}, ValueError, "rule has to be a sentence"),
        ({"outcome": "maybe"}, ValueError, "outcome has to be one of 'yes', 'no'.* got 'maybe'"),
        ({"measured": 1.0}, TypeError, "measured has to be an Estimate, but got float"),
        ({"n": -1}, ValueError, "n has to be at least 0, but got -1"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        Verdict(**{**PARTS, **change})
