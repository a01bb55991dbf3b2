"""`droplens inspect` and `droplens compare` on networks of a stranger."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from droplens.cli._app import app

NETS = """
import torch
from torch import nn

print("nets.py is being read")

class Raises(nn.Module):
    def forward(self, x):
        raise KeyError("stem")

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x), x

def dropped(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))

def plain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

def plains():
    return [plain(), plain()]

def broken():
    net = dropped()
    nn.init.constant_(net[0].weight, float("nan"))
    return net

def half():
    return dropped().half()

def data():
    torch.manual_seed(2)
    return torch.randn(20, 4), torch.randint(3, (20,))

def unlabelled():
    return data()[0]

def numbers():
    return data()[0], torch.randn(20, 3)
"""
QUICK = ("--draws", "5", "--seed", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    # A name of its own, so that other tests' nets.py is not taken for it.
    (folder / "strangers_nets.py").write_text(NETS)
    return folder


@pytest.fixture
def invoke(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        full = [a.replace("nets:", f"{folder}/strangers_nets.py:") for a in arguments]
        return CliRunner().invoke(app, full)

    return run


def test_inspect_prints_and_writes(invoke):
    done = invoke("inspect", "nets:dropped", "--data", "nets:data", *QUICK, "-o", "page.html")
    assert done.exit_code == 0, done.output
    assert sorted(os.listdir()) == ["page.html", "page.json"]
    assert "Open page.html in a browser" in done.stdout
    twin = json.loads(Path("page.json").read_text("utf-8"))
    assert twin["kind"] == "inspection"
    assert twin["command"].startswith("droplens inspect")
    assert twin["command"].endswith("--loss cross_entropy --draws 5 --seed 0")
    assert twin["numbers"]["hessian"]["top_eigenvalues"]
    assert twin["numbers"]["condensation"]["0.weight"]["neurons"] == 6


def test_measures_by_name(invoke):
    arguments = ["inspect", "nets:dropped", "--data", "nets:data", *QUICK, "--measure", "hessian"]
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    twin = json.loads(done.stdout)
    assert twin["numbers"]["extras"]["hessian"]["trace"]
    assert "--measure hessian" in twin["command"]
    refused = invoke(*arguments, "--measure", "nothing")
    assert refused.exit_code == 2
    assert "measures holds 'nothing'" in refused.stderr


def test_json_stands_alone_whatever_the_factories_print(invoke):
    done = invoke("inspect", "nets:dropped", "--data", "nets:data", *QUICK, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["seed"] == 0
    assert os.listdir() == []


def test_a_seed_repeats(invoke):
    first, second = (
        json.loads(
            invoke("inspect", "nets:dropped", "--data", "nets:data", *QUICK, "--json").stdout
        )["numbers"]["cost"]
        for _ in range(2)
    )
    assert first == second


def test_a_loss_by_name(invoke):
    done = invoke(
        "inspect", "nets:dropped", "--data", "nets:numbers", "--loss", "mse", *QUICK, "--json"
    )
    assert json.loads(done.stdout)["numbers"]["loss"] == "MSELoss"


def test_compare_sets_with_weights(invoke, folder):
    for seed in (3, 4):
        net = torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(6, 3)
        )
        torch.save(net.state_dict(), f"{seed}.pt")
    done = invoke(
        "compare", "with=nets:dropped@3.pt", "with=nets:dropped@4.pt", "without=nets:plains",
        "--data", "nets:data", "--held-out", "nets:data", *QUICK, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {name: len(i) for name, i in found["numbers"]["sets"].items()} == {
        "with": 2,
        "without": 2,
    }
    assert found["numbers"]["held_out"]["examples"] == 20
    first, second = found["numbers"]["sets"]["with"]
    assert first["base"] != second["base"]


def test_compare_without_names(invoke):
    done = invoke("compare", "nets:dropped", "nets:plain", "--data", "nets:data", *QUICK, "--json")
    assert done.exit_code == 0, done.output
    names = list(json.loads(done.stdout)["numbers"]["sets"])
    assert [name.rpartition(":")[2] for name in names] == ["dropped", "plain"]


DROPPED = ("inspect", "nets:dropped", "--data", "nets:data")
REFUSED = {
    "no data": (("inspect", "nets:dropped"), "Missing option '--data'"),
    "factory": (("inspect", "nets:mak", "--data", "nets:data"), "there is no 'mak' in"),
    "weights": ((*DROPPED, "--weights", "none.pt"), "there is no weights file 'none.pt'"),
    "loss": ((*DROPPED, "--loss", "hinge"), "--loss has to be one of"),
    "page": ((*DROPPED, "-o", "missing/page.html"), "there is no folder 'missing'"),
    "data factory": (("inspect", "nets:dropped", "--data", "nets:dat"), "there is no 'dat' in"),
    "data": (("inspect", "nets:dropped", "--data", "nets:dropped"), "data has to be a tensor"),
    "no targets": (("inspect", "nets:dropped", "--data", "nets:unlabelled"), "data has no targets"),
    "shapes": (("inspect", "nets:dropped", "--data", "digits"), "raised RuntimeError: mat1"),
    "forward": (("inspect", "nets:Raises", "--data", "nets:data"), "raised KeyError: 'stem'"),
    "outputs": (("inspect", "nets:Pair", "--data", "nets:data"), "the model returned a tuple of 2"),
    "half": (("inspect", "nets:half", "--data", "nets:data"), "weights are torch.float16, too coa"),
    "labels": ((*DROPPED, "--loss", "mse"), "targets has to have the outputs' shape"),
    "one set": (("compare", "nets:dropped", "--data", "nets:data"), "one set of networks only"),
    "broken": (
        ("compare", "good=nets:dropped", "bad=nets:broken", "--data", "nets:data", *QUICK),
        "error: 'bad': the model's weight '0.weight' holds NaN or Inf",
    ),
    "raises": (
        ("compare", "good=nets:dropped", "bad=nets:Raises", "--data", "nets:data", *QUICK),
        "error: 'bad': the model's forward raised KeyError: 'stem'",
    ),
    "draws": ((*DROPPED, "--draws", "1"), "Invalid value for '--draws'"),
    "no name": (
        ("compare", "=nets:dropped", "b=nets:dropped", "--data", "nets:data"),
        "has no name before its '='",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_one_clear_line_and_status_2(invoke, case):
    arguments, message = case
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    refusals = [line for line in done.stderr.splitlines() if line.startswith("droplens: error: ")]
    assert len(refusals) == 1 or "Usage:" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_help_has_an_example_that_parses(command):
    shown = " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())
    assert f"Example: droplens {command} " in shown
    for option in ("--data", "--loss", "--draws", "--output", "--seed", "--json"):
        assert option in shown


def test_in_a_shell_where_the_module_lies(folder):
    done = subprocess.run(
        [
            sys.executable, "-m", "droplens", "inspect", "strangers_nets:dropped",
            "--data", "strangers_nets:data", "--draws", "5", "--seed", "0", "--json",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path("src").resolve())},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["numbers"]["examples"] == 20
    assert "nets.py is being read" in done.stderr
