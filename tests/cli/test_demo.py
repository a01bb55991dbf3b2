"""`droplens demo` around a demonstration that takes no time."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from droplens import demonstration, report
from droplens.cli._app import app
from tests import samples


class Compared:
    """Stands for a comparison: all that the command asks of one."""

    def to_document(self) -> report.Document:
        return samples.document()


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the demonstration was asked for, by name; the command runs in an empty folder."""
    seen = {}

    def run(seed, n_seeds, on_progress):
        seen.update(seed=seed, n_seeds=n_seeds)
        on_progress(1.0, "Done")
        return Compared()

    monkeypatch.setattr(demonstration, "run", run)
    monkeypatch.chdir(tmp_path)
    return seen


def test_writes_a_page_and_its_twin(asked):
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 0, done.output
    assert asked == {"seed": 0, "n_seeds": 5}
    assert sorted(os.listdir()) == ["report.html", "report.json"]
    assert "cannot conclude" in " ".join(done.stdout.split())
    assert "Open report.html in a browser; report.json holds the same as JSON." in done.stdout


def test_options_reach_the_demonstration(asked):
    done = CliRunner().invoke(app, ["demo", "--seed", "7", "--seeds", "3", "-o", "seven.html"])
    assert done.exit_code == 0, done.output
    assert asked == {"seed": 7, "n_seeds": 3}
    assert sorted(os.listdir()) == ["seven.html", "seven.json"]


def test_json_alone_writes_nothing_unasked(asked):
    done = CliRunner().invoke(app, ["demo", "--json"])
    assert json.loads(done.stdout)["kind"] == "comparison"
    assert os.listdir() == []


def test_json_with_output_does_both(asked):
    done = CliRunner().invoke(app, ["demo", "--json", "-o", "both.html"])
    assert json.loads(done.stdout) == json.loads(Path("both.json").read_text("utf-8"))
    assert sorted(os.listdir()) == ["both.html", "both.json"]


def test_pages_are_refused_before_the_training(asked):
    done = CliRunner().invoke(app, ["demo", "-o", "missing/page.html"])
    assert done.exit_code == 2
    assert asked == {}
