"""`droplens solve`: what it prints, writes and refuses."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from droplens import linear, report
from droplens.cli._app import app


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with a problem of six inputs and four targets, as NPZ and as CSV."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 6)) + 1
    Y = X @ rng.standard_normal((6, 2)) @ rng.standard_normal((2, 4)) + rng.standard_normal((40, 4))
    np.savez("data.npz", X=X, Y=Y)
    names = [f"x{i}" for i in range(6)] + [f"y{i}" for i in range(4)]
    rows = "\n".join(",".join(repr(float(v)) for v in row) for row in np.hstack([X, Y]))
    Path("data.csv").write_text(",".join(names) + "\n" + rows + "\n")
    return X, Y


def run(*arguments):
    return CliRunner().invoke(app, ["solve", *arguments])


def numbers(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["numbers"]


TARGETS = "y0,y1,y2,y3"


def test_json_holds_the_solution(folder):
    found = numbers("data.npz", "--target", "Y", "--p", "0.4", "--width", "8", "--block", "2")
    expected = linear.solve(*folder, 0.4, 8, 2)
    for name in ("value", "lower_bound", "rank", "threshold", "p", "width", "block_size"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-9)
    np.testing.assert_allclose(found["singular_values"], expected.singular_values)
    assert found["n_examples"] == 40
    assert "path" not in found
    assert sorted(os.listdir()) == ["data.csv", "data.npz"]


def test_a_csv_says_the_same(folder):
    one = numbers("data.npz", "--target", "Y")
    other = numbers("data.csv", "--target", TARGETS)
    third = numbers("data.csv", "--target", "y0,y1", "--target", "y2", "--target", "y3")
    assert one["width"] == 4
    assert one["value"] == pytest.approx(other["value"]) == pytest.approx(third["value"])


def test_options_reach_the_solver(folder):
    X, Y = folder
    plain = linear.solve(X - X.mean(0), Y - Y.mean(0), 0.3, 8, 4, adaptive=True)
    found = numbers(
        "data.csv", "--target", TARGETS, "--p", ".3", "--width", "8", "--block", "4", "--adaptive",
        "--intercept", "--save", "map.npz",
    )  # fmt: skip
    assert found["value"] == pytest.approx(plain.value, rel=1e-8)
    with np.load("map.npz") as saved:
        np.testing.assert_allclose(saved["coefficients"], plain.coefficients, atol=1e-7)
        np.testing.assert_allclose(
            saved["intercept"], Y.mean(0) - plain.coefficients @ X.mean(0), atol=1e-6
        )
        assert saved["outgoing"].shape == (4, 8)
    fewer = numbers("data.csv", "--target", "y0", "--inputs", "x0,x1")
    assert fewer["value"] == pytest.approx(linear.solve(X[:, :2], Y[:, :1], 0.5, 1).value)


def test_the_path_and_the_page(folder):
    done = run("data.npz", "--target", "Y", "--path", "-o", "page.html", "--seed", "3")
    assert done.exit_code == 0, done.output
    assert "singular values survive dropout at p = 0.5" in " ".join(done.stdout.split())
    page, twin = Path("page.html").read_text("utf-8"), json.loads(Path("page.json").read_text())
    assert len(page.encode()) < report.MAX_BYTES
    assert "Which singular values survive at which rate" in page
    assert '"pointerover"' in page  # the chart answers the pointer
    assert twin["seed"] == 3
    assert twin["kind"] == "solution"
    expected = linear.path(*folder, 4)
    np.testing.assert_allclose(twin["numbers"]["path"]["singular_values"], expected.singular_values)
    np.testing.assert_allclose(twin["numbers"]["path"]["vanishing_rates"], expected.vanishing_rates)
    assert "--path" in twin["command"]


def test_a_gap_is_said(monkeypatch):
    np.savez("gap.npz", X=np.eye(4), Y=np.diag([3.0, 1, 1, 1]))
    done = run("gap.npz", "--target", "Y", "--p", str(0.3 / 1.3), "--width", "4", "--block", "2")
    assert "a bound that this width may not attain" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "problem", [(np.zeros((5, 2)), np.ones((5, 2))), (np.ones((1, 1)), np.ones((1, 1)))]
)
def test_degenerate_problems_make_pages(problem):
    np.savez("odd.npz", X=problem[0], Y=problem[1])
    done = run("odd.npz", "--target", "Y", "--path", "-o", "odd.html")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.npz", "--target", "Y"], "there is no file none.npz"),
        (["data.npz", "--target", "Z"], "data.npz has no array 'Z'"),
        (["data.npz", "--target", "Y", "--p", "1"], "p = 1 drops every unit"),
        (["data.npz", "--target", "Y", "--p", "nan"], "between 0 and 1, but got nan"),
        (["data.npz", "--target", "Y", "--width", "0"], "width has to be at least 1, but got 0"),
        (["data.npz", "--target", "Y", "--width", "4", "--block", "3"], "3 does not divide 4"),
        (["data.npz", "--target", "Y", "-o", "none/page.html"], "none"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("droplens: error: ")
    assert message in line


def test_text_and_gaps_in_the_data():
    Path("text.csv").write_text("a,y\n1,2\ntall,3\n")
    assert "holds text ('tall' in line 3)" in run("text.csv", "--target", "y").stderr
    Path("nan.csv").write_text("a,y\n1,2\nnan,3\n")
    done = run("nan.csv", "--target", "y")
    assert (done.exit_code, "X has to be finite" in done.stderr) == (2, True)


def test_without_a_target():
    assert run("data.npz").exit_code == 2


def test_help_has_an_example():
    done = run("--help")
    assert "droplens solve houses.csv --target price" in " ".join(done.stdout.split())
