"""Reports on terminals and in notebooks."""

import math
import re

import pytest

from droplens import report
from droplens.estimates import Estimate
from tests import samples


def test_text_says_every_verdict_and_what_is_missing():
    text = re.sub(r"\s+", " ", report.render_text(samples.document(), width=400))
    for verdict in samples.verdicts():
        assert verdict.outcome in text
        assert verdict.sentence in text
    assert "−0.021 ± 0.019 nats" in text
    assert "the site decoder.path" in text


def test_text_keeps_to_its_width():
    text = report.render_text(samples.document(), width=70)
    assert max(map(len, text.splitlines())) <= 70


def test_text_does_not_read_markup():
    text = report.render_text(report.Document("[bold]name[/bold]"))
    assert "[bold]name[/bold]" in text


def test_fragment_holds_verdicts_and_no_script():
    fragment = report.render_fragment(samples.document())
    assert "<script" not in fragment
    for verdict in samples.verdicts():
        assert verdict.rule.replace("'", "&#39;") in fragment


def test_numbers():
    assert report.format_number(math.nan) == "undefined"
    assert report.format_number(-math.inf) == "−∞"
    assert report.format_number(-0.0) == "0"
    assert report.format_number(1e20) == "1 × 10²⁰"
    assert report.format_cell(Estimate(1.0, math.nan, 1)) == "1"
    assert report.format_cell(Estimate(2.5)) == "2.5"
    assert report.format_cell("words - kept") == "words - kept"


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.279, 0.0016, "0.2790 ± 0.0016"),
        (-0.000018, 5.7e-5, "(−1.8 ± 5.7) × 10⁻⁵"),
        (1.2e-9, 3.4e-11, "(1.200 ± 0.034) × 10⁻⁹"),
        (12345.6, 78.9, "12,346 ± 79"),
        (3.2e9, 4.5e7, "(3.200 ± 0.045) × 10⁹"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (1.0, 1e-16, "1 ± 1 × 10⁻¹⁶"),
        (math.nan, 0.1, "undefined ± 0.1"),
        (0.5, math.inf, "0.5 ± ∞"),
    ],
)
def test_estimates_share_their_decimals_and_power_of_ten(value, error, text):
    assert report.format_cell(Estimate(value, error, 10)) == text
