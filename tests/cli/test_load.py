"""What a command names: factories, weights, data and losses; every way they can be wrong."""

import os
import pickle

import pytest
import torch
from torch import nn

from droplens.cli import _load

NETS = """
import torch
from torch import nn
import beside

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))

def several():
    return [make(), make()]

def tied():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    return nn.Sequential(a, b)

def raises():
    raise RuntimeError("no such checkpoint")

def leaves():
    raise SystemExit(3)

def number():
    return 7

def pair():
    return torch.ones(5, 4), torch.zeros(5, dtype=torch.long)

def loss():
    return nn.MSELoss(reduction="sum")

ready = make()
count = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with nets.py, a module beside it, and broken ones; the command starts there."""
    import sys

    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "syntax.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in {"", str(tmp_path)}])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("module", ["nets", "nets.py", "./nets.py"])
def test_a_factory_by_module_or_file(nets, module):
    assert isinstance(_load.network(f"{module}:make"), nn.Sequential)
    assert len(_load.networks(f"{module}:several")) == 2
    assert isinstance(_load.network(f"{module}:nn.ReLU"), nn.ReLU)


def test_a_file_elsewhere_finds_what_lies_beside_it(nets, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert isinstance(_load.network(f"{nets}/nets.py:make"), nn.Sequential)


def test_a_file_that_is_named_like_a_known_module(nets):
    (nets / "json.py").write_text(NETS)
    assert isinstance(_load.network("json.py:make"), nn.Sequential)
    import json

    assert json.dumps(1) == "1"


def test_data_and_losses(nets):
    inputs, targets = _load.data("nets:pair")
    assert inputs.shape == (5, 4)
    assert len(targets) == 5
    assert _load.data("digits")[0].shape == (1438, 64)
    assert _load.data("digits", test=True)[0].shape == (359, 64)
    assert isinstance(_load.loss_of("cross_entropy"), nn.CrossEntropyLoss)
    assert isinstance(_load.loss_of("mse"), nn.MSELoss)
    assert isinstance(_load.loss_of("bce"), nn.BCEWithLogitsLoss)
    assert isinstance(_load.loss_of("poisson"), nn.PoissonNLLLoss)
    assert _load.loss_of("nets:loss").reduction == "sum"


FACTORIES = {
    "no colon": ("nets", ValueError, "'nets' has to be MODULE:FACTORY, such as nets:make"),
    "no name": ("nets:", ValueError, "'nets:' has to be MODULE:FACTORY"),
    "no module": ("nowhere:make", ValueError, "cannot import module 'nowhere': ModuleNotFoundErr"),
    "no file": ("nowhere.py:make", ValueError, "there is no file 'nowhere.py'"),
    "no factory": ("nets:mak", ValueError, "nets:mak: there is no 'mak' in nets; it defines "
        "leaves, loss, make, number, pair, raises, several, tied"),
    "import fails": ("broken.py:make", ValueError, "cannot import 'broken.py': ModuleNotFound"),
    "syntax": ("syntax:make", ValueError, "cannot import module 'syntax': SyntaxError"),
    "raises": ("nets:raises", ValueError, "nets:raises raised RuntimeError: no such checkpoint"),
    "leaves": ("nets:leaves", ValueError, "nets:leaves raised SystemExit: 3"),
    "arguments": ("nets:nn.Linear", ValueError, "nets:nn.Linear raised TypeError: .*missing 2"),
    "no function": ("nets:count", ValueError, "nets:count is a int, not a function"),
    "no network": ("nets:number", TypeError, "nets:number has to return a torch module, but"),
    "many": ("nets:several", TypeError, "nets:several returned 2 networks, but one"),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTORIES.values(), ids=FACTORIES.keys())
def test_factories_that_cannot_be_had(nets, case):
    spec, error, message = case
    with pytest.raises(error, match=message):
        _load.network(spec)


def test_losses_that_are_not_known():
    with pytest.raises(ValueError, match="--loss has to be one of cross_entropy, mse, bce, poisso"):
        _load.loss_of("hinge")


# --- Weights ---


def fresh():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


def nested(key):
    return lambda path: torch.save({key: fresh().state_dict(), "epoch": 3}, path)


def in_safetensors(path):
    from safetensors.torch import save_file

    save_file(fresh().state_dict(), path)


def wrapped(prefix):
    def save(path):
        state = fresh().state_dict()
        torch.save({f"{prefix}{name}": value for name, value in state.items()}, path)

    return save


FILES = {
    "compiled": ("w.pt", wrapped("_orig_mod.")),
    "of one process among many": ("w.pt", wrapped("module.")),
    "of both": ("w.pt", wrapped("module._orig_mod.")),
    "state dict": ("w.pt", lambda path: torch.save(fresh().state_dict(), path)),
    "checkpoint": ("w.pt", nested("state_dict")),
    "checkpoint of a model": ("w.ckpt", nested("model_state_dict")),
    "safetensors": ("w.safetensors", in_safetensors),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES.keys())
def test_weights_fill_the_network(nets, case):
    name, save = case
    torch.manual_seed(5)
    save(nets / name)
    torch.manual_seed(5)
    expected = fresh()
    found = _load.network("nets:make", nets / name)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_a_shared_tensor_is_saved_once(nets):
    tied = _load.network("nets:tied")
    state = {k: v + 1 for k, v in tied.state_dict().items() if k != "1.weight"}
    torch.save(state, nets / "w.pt")
    found = _load.network("nets:tied", nets / "w.pt")
    assert torch.equal(found[1].weight, state["0.weight"])


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def cut(path):
    torch.save(fresh().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_safetensors(path):
    in_safetensors(path)
    path.write_bytes(path.read_bytes()[:-8])


def other(change):
    state = fresh().state_dict()
    change(state)
    return lambda path: torch.save(state, path)


def deeper(state):
    state.update({f"{k}.weight": torch.ones(2, 2) for k in range(4, 9)})


def renamed(state):
    state["last.weight"] = state.pop("3.weight")


def wider(state):
    state["0.weight"] = torch.ones(7, 4)


CODE = r"holds more than tensors \(it asks to run \S*system\), and code in weights files is never"
BROKEN = "is truncated or not a weights file"
ANOTHER = r"weights in '.*w.*' are of another architecture; "
WRONG = {
    "missing": ("w.pt", lambda path: None, "there is no weights file '.*w.pt'"),
    "code": ("w.pt", lambda path: torch.save({"a": Code()}, path), CODE),
    "code in a pickle": ("w.pkl", lambda p: p.write_bytes(pickle.dumps({"a": Code()}, 2)), CODE),
    "whole model": ("w.pt", lambda path: torch.save(fresh(), path),
        r"asks to run torch.nn.modules.container.Sequential\).* save model.state_dict\(\) alone"),
    "truncated": ("w.pt", cut, BROKEN),
    "empty": ("w.pt", lambda path: path.write_bytes(b""), BROKEN),
    "text": ("w.pt", lambda path: path.write_text("hello, these are no weights"), BROKEN),
    "truncated safetensors": ("w.safetensors", cut_safetensors, BROKEN),
    "a number": ("w.pt", lambda path: torch.save(3.0, path), "holds a float, but a state dict of"),
    "other things": ("w.pt", lambda path: torch.save({"lr": 0.1}, path), "holds a dict, but a sta"),
    "deeper": ("w.pt", other(deeper),
        ANOTHER + "not in the network: 4.weight, 5.weight, 6.weight and 2 more"),
    "renamed": ("w.pt", other(renamed),
        ANOTHER + "missing: 3.weight; not in the network: last.weight"),
    "wider": ("w.pt", other(wider),
        ANOTHER + r"other shapes: 0.weight \(7, 4\) in the file, \(6, 4\) in the network"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_weights_that_are_refused(nets, case):
    name, save, message = case
    save(nets / name)
    with pytest.raises(ValueError, match=message):
        _load.network("nets:make", nets / name)
    assert not (nets / "ran").exists()


def test_what_strangers_print_keeps_off_standard_output(capsys):
    with _load.strangers():
        print("loading the data")  # noqa: T201
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "loading the data\n"
