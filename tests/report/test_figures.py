"""Charts from plain lists: what they draw, what they leave out, what they refuse."""

import math

import pytest
import vl_convert

from droplens import report
from droplens.estimates import Estimate
from droplens.report._vega import static_svg, styled


def drawn(figure):
    return static_svg(styled(figure.chart))


def test_bars_draw_every_value_and_only_known_errors():
    figure = report.bars(
        {
            "a": {"g": Estimate(1.0, 0.1, 10), "h": Estimate(2.0, math.nan, 1)},
            "b": {"g": Estimate(3.0), "h": Estimate(-1.0, 0.2, 10)},
        },
        title="t",
        quantity="loss (nats)",
        rows="method",
    )
    svg = drawn(figure)
    bars = svg.split('class="mark-rect role-mark')[1].split("</g>")[0]
    assert bars.count("<path") == 4
    # An exact value has an interval of length zero; an unknown error has none at all.
    rules = svg.split('class="mark-rule role-mark')[1].split("</g>")[0]
    assert rules.count("<line") == 3
    assert figure.x == "loss (nats)"
    assert figure.data is not None
    assert len(figure.data.rows) == 4


def test_error_bars_span_the_95_percent_t_interval():
    figure = report.bars(
        {"a": {"g": Estimate(1.0, 0.1, 10)}}, title="t", quantity="q (u)", rows="r"
    )
    ((record,),) = figure.chart["datasets"].values()
    assert record["low"] == pytest.approx(1 - 2.262157 * 0.1)
    assert record["high"] == pytest.approx(1 + 2.262157 * 0.1)


def test_dots_use_the_t_interval_of_few_runs():
    figure = report.dots({"g": [1.0, 2.0, 3.0]}, title="t", quantity="q (u)")
    assert figure.data is not None
    ((_, mean, low, high, runs),) = figure.data.rows
    reach = 4.302653 / math.sqrt(3)  # t quantile .975 with 2 degrees of freedom, s = 1
    assert (mean.value, runs) == (2.0, 3)
    assert (low, high) == (pytest.approx(2 - reach), pytest.approx(2 + reach))


def test_one_run_has_no_interval():
    figure = report.dots({"g": [1.0]}, title="t", quantity="q (u)")
    assert figure.data is not None
    assert figure.data.rows[0][2:] == (None, None, 1)
    drawn(figure)


def test_split_stacks_negative_shifts_left_of_zero():
    figure = report.split(
        {"site": (Estimate(0.5, 0.1, 5), Estimate(-0.2, 0.1, 5))}, title="t", quantity="loss (nats)"
    )
    diamonds = figure.chart["datasets"][figure.chart["layer"][1]["data"]["name"]]
    assert diamonds == [{"row": "site", "value": pytest.approx(0.3)}]
    assert "diamond" in figure.caption
    assert "loss (nats)" in drawn(figure)


def test_lines_thin_long_curves_and_say_so():
    xs = [float(k) for k in range(5000)]
    figure = report.lines(
        {"long": report.Curve(xs, xs, xs, xs)}, title="t", x="step (count)", y="loss (nats)"
    )
    assert figure.data is not None
    assert len(figure.data.rows) == 200
    assert (figure.data.rows[0][1], figure.data.rows[-1][1]) == (0.0, 4999.0)
    assert "200 of its points" in figure.caption


def test_spectra_leave_out_what_a_logarithm_cannot_show():
    figure = report.spectra({"layer": [1.0, 0.0, 3.0, -1e-9]}, title="t")
    assert figure.data is not None
    assert [row[2] for row in figure.data.rows] == [3.0, 1.0]
    drawn(figure)


def test_undefined_points_are_left_out():
    figure = report.lines(
        {"c": report.Curve([0, 1, 2], [1.0, math.nan, 2.0])}, title="t", x="x (s)", y="y (m)"
    )
    assert figure.data is not None
    assert len(figure.data.rows) == 2
    drawn(figure)


def test_static_twins_keep_their_labels_whole():
    """Coordinates are rounded, text is not."""
    figure = report.dots({"0.123456": [0.001, 0.0012]}, title="t", quantity="q (u)")
    svg = drawn(figure)
    assert ">0.123456<" in svg
    assert ">0.0010<" in svg or ">0.00100<" in svg


def test_static_twins_follow_the_theme_of_the_page():
    svg = drawn(report.dots({"g": [1.0, 2.0]}, title="t", quantity="q (u)"))
    assert 'fill="var(--series-1)"' in svg
    assert 'fill="white"' not in svg


def test_what_a_chart_sets_itself_stands():
    chart = {
        "mark": "point",
        "width": 90,
        "config": {"axis": {"labelColor": "red"}},
        "data": {"values": []},
    }
    full = styled(chart)
    assert full["width"] == 90
    assert full["config"]["axis"]["labelColor"] == "red"
    assert full["config"]["axis"]["gridColor"] == "var(--line)"
    assert chart["config"] == {"axis": {"labelColor": "red"}}


def test_specifications_compile_without_warnings(capfd):
    figure = report.lines(
        {"c": report.Curve([0, 1], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5])},
        title="t",
        x="x (s)",
        y="y (m)",
    )
    vl_convert.vegalite_to_vega(styled(figure.chart), show_warnings=True)
    assert "WARN" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: report.bars({}, title="t", quantity="q", rows="r"), "values has to hold"),
        (lambda: report.lines({}, title="t", x="x", y="y"), "curves has to hold"),
        (
            lambda: report.lines({"c": report.Curve([0.0], [math.nan])}, title="t", x="x", y="y"),
            "curves has to hold",
        ),
        (lambda: report.dots({"g": []}, title="t", quantity="q"), r"values\['g'\] has to hold"),
        (lambda: report.split({}, title="t", quantity="q"), "sites has to hold"),
        (lambda: report.spectra({}, title="t"), "curves has to hold"),
        (lambda: report.Curve([0.0], [1.0, 2.0]), "y has to hold 1 numbers, but got 2"),
        (lambda: report.Curve([0.0], [1.0], low=[0.0]), "low and high have to come together"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
