"""`droplens reproduce`: JSON alone, exit statuses, the list, one line for bad input."""

import json

import pytest
from typer.testing import CliRunner

from droplens.cli._app import app

ONE = ("P1.lower-bound", "--scale", "test", "--jobs", "1")


def invoke(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def test_json_stands_alone():
    done = invoke(*ONE, "--json")
    assert done.exit_code == 0
    (claim,) = json.loads(done.stdout)["claims"]
    assert claim["id"] == "P1.lower-bound"
    assert claim["verdict"] == claim["expected_verdict"] == "holds"


def test_a_verdict_that_differs_ends_with_status_1():
    done = invoke(*ONE, "--broken", "penalty-doubled", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["claims"][0]["verdict"] == "does not hold"


def test_a_claim_that_fails_as_expected_ends_with_status_0():
    done = invoke("P4.index-rule", "--scale", "test", "--jobs", "1")
    assert done.exit_code == 0
    assert "does not hold" in done.stdout


def test_page_and_twin(tmp_path):
    page = tmp_path / "claims.html"
    done = invoke(*ONE, "-o", page, "--resume", tmp_path / "runs")
    assert done.exit_code == 0
    assert f"Open {page}" in " ".join(done.stdout.split()).replace(" ", " ")
    twin = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert twin["claims"][0]["id"] == "P1.lower-bound"
    assert (tmp_path / "runs" / "runs.sqlite").exists()


def test_the_list_runs_nothing():
    done = invoke("--list")
    assert done.exit_code == 0
    for words in ("P1  Mianjy", "P4.index-rule", "[expected: does not hold]", "P8.tracking"):
        assert words in done.stdout
    entries = json.loads(invoke("P8", "--list", "--json").stdout)["claims"]
    assert {entry["paper"] for entry in entries} == {"P8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("P1.objectiv",), "no paper or claim is called 'P1.objectiv'; did you mean"),
        ((*ONE, "--broken", "nonsense"), "broken has to be one of"),
        ((*ONE, "--broken", "repaired"), "none of these claims has a broken twin 'repaired'"),
        ((*ONE, "--data", "missing", "P8.images"), "there is no data folder 'missing'"),
        ((*ONE, "--resume", "/dev/null"), "is a file: name a folder"),
        ((*ONE, "--seeds", "0"), "Invalid value for '--seeds'"),
        ((*ONE, "--scale", "huge"), "Invalid value for '--scale'"),
        ((*ONE, "-o", "no/such/page.html"), "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
