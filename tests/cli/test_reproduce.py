"""`droplens reproduce`: JSON alone, exit statuses, the list, one line for bad input."""

import gzip
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from droplens import papers, runs
from droplens.cli._app import app
from droplens.papers import _registry
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


def write_images(folder):
    """MNIST as gzipped IDX and CIFAR-10 in its binary version, twenty images a file."""
    pixels = bytes((7 * k) % 251 for k in range(20 * 3072))
    for part in ("train", "t10k"):
        for name, shape in (("images-idx3", (20, 28, 28)), ("labels-idx1", (20,))):
            sizes = b"".join(n.to_bytes(4, "big") for n in shape)
            body = pixels[: 20 * 784] if len(shape) == 3 else bytes(k % 10 for k in range(20))
            raw = bytes([0, 0, 8, len(shape)]) + sizes + body
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(raw))
    binary = folder / "cifar-10-batches-bin"
    binary.mkdir()
    rows = [bytes([k % 10]) + pixels[3072 * k : 3072 * (k + 1)] for k in range(20)]
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (binary / f"{name}.bin").write_bytes(b"".join(rows))


def test_the_papers_scale_takes_the_files_of_a_folder(tmp_path, monkeypatch):
    """The command at the papers' sizes but for the number of steps, on MNIST and CIFAR-10."""
    write_images(tmp_path)
    names = ("P4.deep", "P4.deep-relu", "P8.images")

    def short(claim):
        cells = [{**cell, "steps": 2} for cell in claim.settings["paper"]]
        return replace(claim, settings={**claim.settings, "paper": cells})

    claims = tuple(short(papers.find(name)) for name in names)
    monkeypatch.setattr(_registry, "claims", lambda: claims)
    page = tmp_path / "page.html"
    words = ("--scale", "paper", "--data", tmp_path, "--seeds", "2", "--jobs", "1")
    done = invoke(*names, *words, "-o", page, "--resume", tmp_path / "runs", "--json")
    assert done.exit_code == 1, done.stderr  # two steps reach nothing
    told = json.loads(done.stdout)
    assert told["not_measured"] == []
    for entry, claim in zip(told["claims"], claims, strict=True):
        data = [one["setting"].get("data") for one in entry["settings"]]
        count = len(claim.settings["paper"])
        assert data == [None] * count + [claim.data] * count
        assert all(one["n"] == 2 and one["measured"] is not None for one in entry["settings"])
    with runs.Store(tmp_path / "runs") as store:
        assert store.count() == 2 * sum(2 * len(claim.settings["paper"]) for claim in claims)
