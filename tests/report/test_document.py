"""What a document accepts, what it refuses, and its JSON twin."""

import json
import math

import altair
import numpy as np
import pytest
import torch

from droplens import report
from droplens._plain import plain
from droplens.estimates import Estimate
from tests import samples


def test_twin_is_strict_json_and_says_how_it_was_made():
    text = report.to_json(samples.document())
    assert "NaN" not in text
    assert "Infinity" not in text
    twin = json.loads(text)
    assert twin["schema_version"] == report.SCHEMA_VERSION
    assert twin["kind"] == "comparison"
    assert twin["seed"] == 0
    assert twin["mode"].startswith("evaluation")
    assert {"python", "torch", "droplens", "numpy", "platform", "threads"} <= set(
        twin["environment"]
    )
    assert twin["environment"]["torch"] == torch.__version__
    assert twin["numbers"] == {
        "cost": {"value": 0.279, "standard_error": None, "n": 300, "over": "masks"},
        "curve": [0.1, None],
    }


def test_twin_holds_what_the_page_says():
    document = samples.document()
    twin = json.loads(report.to_json(document))
    assert [v["sentence"] for v in twin["verdicts"]] == [v.sentence for v in samples.verdicts()]
    for name in ("rule", "threshold", "measured", "n", "unit", "outcome", "id", "question"):
        assert all(name in verdict for verdict in twin["verdicts"])
    assert [s["title"] for s in twin["sections"]] == ["What dropout costs", "Flatness", "Networks"]
    kinds = [block["type"] for block in twin["sections"][2]["blocks"]]
    assert kinds == ["figure", "section"]
    inner = twin["sections"][2]["blocks"][1]["blocks"]
    assert [block["type"] for block in inner] == ["figure", "verdict"]
    assert len(inner[0]["data"]["rows"]) == 128
    assert twin["not_measured"][0]["what"] == "the site decoder.path"


def test_page_thins_what_the_twin_keeps_whole():
    table = report.Table([report.Column("k")], [[k] for k in range(1000)], caption="Many rows")
    document = report.Document("Many", sections=[report.Section("Rows", blocks=[table])])
    assert "800 more rows stand in the JSON twin" in report.render_page(document)
    assert len(document.to_dict()["sections"][0]["blocks"][0]["rows"]) == 1000


def test_pages_stay_under_two_megabytes():
    assert len(report.render_page(samples.document()).encode()) < 2_000_000


def test_pages_past_two_megabytes_are_refused():
    document = report.Document("Long", sections=[report.Section("Text", "word " * 500_000)])
    with pytest.raises(ValueError, match=r"a page of 2,5\d\d,\d\d\d bytes.*under 2,000,000"):
        report.render_page(document)


def test_pages_without_charts_carry_no_script_library():
    page = report.render_page(report.Document("Words only", verdicts=samples.verdicts()))
    assert len(page) < 40_000


def test_equal_titles_get_anchors_of_their_own():
    page = report.render_page(
        report.Document("Twins", sections=[report.Section("Same"), report.Section("Same")])
    )
    assert 'id="s-same"' in page
    assert 'id="s-same-2"' in page


def test_says_when_nothing_was_left_out():
    page = report.render_page(report.Document("All"))
    assert "Everything this report can measure was measured." in page


def test_documents_do_not_follow_the_callers_later_changes():
    rows = [["a", 1.0]]
    specification = samples.figures()[0].chart
    table = report.Table([report.Column("x"), report.Column("y")], rows, caption="t")
    figure = report.Figure(specification, "title", "x (s)", "y (m)")
    rows[0][1] = 2.0
    specification.clear()
    assert table.rows == (("a", 1.0),)
    assert figure.chart


def test_figures_take_altair_charts():
    chart = altair.Chart(altair.InlineData(values=[{"x": 1, "y": 2}])).mark_point()
    figure = report.Figure(chart.encode(x="x:Q", y="y:Q"), "One point", "x (s)", "y (m)")
    page = report.render_page(
        report.Document("Altair", sections=[report.Section("Chart", blocks=[figure])])
    )
    assert 'aria-label="Chart: One point. Horizontal axis: x (s). Vertical axis: y (m)."' in page


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: report.Document(" "), ValueError, "title has to say something"),
        (lambda: report.Section(""), ValueError, "title has to say something"),
        (lambda: report.Section("s", blocks=["text"]), TypeError, "but got str"),
        (
            lambda: report.Table([report.Column("a")], [[1, 2]], caption="c"),
            ValueError,
            "rows has to hold 1 cells a row, as many as columns, but got 2",
        ),
        (lambda: report.Table([report.Column("a")], [], caption=""), ValueError, "caption has to"),
        (lambda: report.Figure({}, "t", "", "y (m)"), ValueError, "x has to say something"),
        (
            lambda: report.Figure("svg", "t", "x (s)", "y (m)"),
            TypeError,
            "chart has to be an Altair chart or a Vega-Lite specification, but got str",
        ),
    ],
)
def test_refuses(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_charts_that_cannot_be_drawn_are_refused():
    figure = report.Figure({"mark": "no such mark", "data": {"values": []}}, "t", "x (s)", "y (m)")
    document = report.Document("Bad", sections=[report.Section("s", blocks=[figure])])
    with pytest.raises(ValueError, match="chart cannot be drawn"):
        report.render_page(document)


def test_charts_cannot_fetch_data():
    chart = {
        "mark": "point",
        "data": {"url": "https://example.org/data.json"},
        "encoding": {"x": {"field": "x", "type": "quantitative"}},
    }
    document = report.Document(
        "Fetching",
        sections=[report.Section("s", blocks=[report.Figure(chart, "t", "x (s)", "y (m)")])],
    )
    with pytest.raises(ValueError, match="chart cannot be drawn"):
        report.render_page(document)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (torch.tensor(2.0), 2.0),
        (torch.tensor(float("nan")), None),
        ((1, [True, None]), [1, [True, None]]),
        ({"b", "a"}, ["a", "b"]),
        ({1: Estimate(1.0)}, {"1": plain(Estimate(1.0))}),
        (samples.verdicts()[0], samples.verdicts()[0].to_dict()),
    ],
)
def test_plain_values(value, expected):
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)


@pytest.mark.parametrize("raw", [torch.zeros(3), np.zeros((2, 2))])
def test_raw_tensors_have_no_place_in_a_report(raw):
    with pytest.raises(TypeError, match="aggregates only, but got an array of shape"):
        plain({"weights": raw})


def test_things_without_a_plain_form_are_refused():
    with pytest.raises(TypeError, match="plain data, but got object"):
        plain([object()])
