"""`droplens reproduce`: JSON alone, exit statuses, the list, one line for bad input."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from droplens import runs
from droplens.cli._app import app
from droplens.runs import _store

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


def refused(arguments, message):
    """One line on standard error, nothing on standard output, status 2."""
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("droplens: error: ")
    assert message in line


def test_a_corrupt_data_file_is_named(tmp_path):
    for part in ("train", "t10k"):
        for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"not an IDX file"))
    page = tmp_path / "page.html"
    words = ("P8.images", "--scale", "test", "--data", tmp_path, "-o", page, "--json")
    refused(words, "train-images-idx3-ubyte.gz' is not an IDX file of unsigned bytes")
    assert not page.exists()


def test_results_of_another_version_are_refused(tmp_path, monkeypatch):
    assert invoke(*ONE, "--resume", tmp_path).exit_code == 0
    before = (tmp_path / runs.FILE).read_bytes()
    newer = {**_store.versions(), "torch": "9.0"}
    monkeypatch.setattr(_store, "versions", lambda: newer)
    refused((*ONE, "--resume", tmp_path, "--json"), "but this is torch 9.0: name another folder")
    assert (tmp_path / runs.FILE).read_bytes() == before


def test_no_space_left_keeps_what_was_finished(tmp_path, monkeypatch):
    opened = runs.Store._open

    def small(self):
        opened(self)
        self._connection.execute("PRAGMA max_page_count = 24")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Store, "_open", small)
        words = ("P1.lower-bound", "P8.tracking", "--scale", "test", "--jobs", "1", "--json")
        page = tmp_path / "page.html"
        refused(
            (*words, "--resume", tmp_path / "runs", "-o", page),
            "no space left. What was finished before is kept; --resume continues there",
        )
    assert not page.exists()
    with runs.Store(tmp_path / "runs") as store:
        assert store.count() > 0


def test_a_page_without_space_leaves_the_old_one(tmp_path, monkeypatch):
    from droplens.report import _files

    page = tmp_path / "page.html"
    page.write_text("before")
    written = _files._temporary

    def full(target, text):
        if text:
            raise OSError(28, "No space left on device")
        return written(target, text)

    monkeypatch.setattr(_files, "_temporary", full)
    refused((*ONE, "-o", page), "page.html': No space left on device")
    assert page.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
