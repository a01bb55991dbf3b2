"""Every claim holds its own at test scale, and turns under every broken theory it names."""

import pytest

from droplens import papers
from droplens.reproduction import Request, reproduce

OPPOSITE = {"holds": "does not hold", "does not hold": "holds"}


def judged(claim, broken=""):
    (judgement,) = reproduce(Request((claim.id,), "test", broken=broken)).judgements
    return judgement


def single():
    for claim in papers.claims():
        # Deep networks take half a minute; `make claims` runs them in CI.
        marks = pytest.mark.slow if claim.id.startswith("P4.deep") else ()
        yield pytest.param(claim, marks=marks, id=claim.id)


@pytest.mark.parametrize("claim", list(single()))
def test_comes_out_as_expected(claim):
    judgement = judged(claim)
    assert judgement.verdict == claim.expected_verdict, judgement.sentence()


def twins():
    for claim in papers.claims():
        for place, broken in enumerate(claim.broken):
            # One twin of every claim in the fast suite, the others, and deep networks, in the slow.
            marks = pytest.mark.slow if place or claim.id.startswith("P4.deep") else ()
            yield pytest.param(claim, broken, marks=marks, id=f"{claim.id}-{broken}")


@pytest.mark.parametrize(("claim", "broken"), list(twins()))
def test_turns_under_a_broken_theory(claim, broken):
    """A claim that survives its broken twin is itself broken; an open verdict is not a turn."""
    judgement = judged(claim, broken)
    assert judgement.verdict == OPPOSITE[claim.expected_verdict], judgement.sentence()
