"""P4, RQ3: what deep networks predict when dropout stands before their last layer."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from droplens import data
from droplens.linear import prox_k_support
from droplens.papers._claim import Cell, Claim, Criterion, Numbers, Setting, labels
from droplens.papers._theory import Theory
from droplens.papers.p4._networks import train_networks
from droplens.report import Figure, spectra

_FADING: Final = 0.4


def images(setting: Setting) -> tuple[Tensor, Tensor]:
    """Images (n, c, h, w) and targets (n, 10): one-hot, or "graded", class c at exp(−0.4·c).

    One-hot targets have singular values √n_c, all nearly equal: every law then shrinks them alike.
    Graded ones tell dropout from blocks, and scaling from thresholding.
    """
    if setting.get("data") == "cifar10":
        split = data.cifar10(setting["folder"], limit=setting["n"]).train
        inputs = split.inputs
    else:
        split = data.digits().train
        inputs = split.inputs[: setting["n"]].unflatten(1, (1, 8, 8))
    targets = nn.functional.one_hot(split.targets[: setting["n"]], 10).float()
    if setting["targets"] == "graded":
        targets = targets * torch.exp(-_FADING * torch.arange(10))
    return inputs, targets


def predicted(m: Tensor, r: int, keep: float, block: int, theory: Theory) -> Tensor:
    """The singular values that predictions of targets with values m keep: prox, β = λb/r."""
    beta = theory.factor * theory.variance(1 - keep) * block / r
    return torch.as_tensor(prox_k_support(m.numpy(), block, beta))


def _measure(signed: bool) -> Callable[[Setting, Sequence[int], Theory], Numbers]:
    def measure(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
        """‖σ(predictions) − prox(σ(targets); k = b, β = λb/r)‖ ÷ ‖prox(…)‖."""
        inputs, targets = images(setting)
        m = torch.linalg.svdvals(targets.double())
        kinds = zip(setting["keep"], setting["block"], strict=True)
        each = [predicted(m, setting["r"], *kind, theory) for kind in kinds]
        told = torch.stack([one for one in each for _ in seeds])  # (CS, 10)
        kept = signed or theory.repaired
        predictions = train_networks((inputs, targets), setting, seeds, theory, kept)
        found = torch.linalg.svdvals(predictions)
        return {
            "value": ((found - told).norm(dim=1) / told.norm(dim=1)).tolist(),
            "found": found.tolist(),
            "predicted": told.tolist(),
            "targets": [m.tolist()] * len(told),
        }

    return measure


measure_deep = _measure(signed=True)
measure_relu = _measure(signed=False)


def _draw(cells: Sequence[Cell]) -> Figure:
    values = {
        f"found, {name}": cell.mean("found")
        for name, cell in zip(labels(cells[:4]), cells[:4], strict=True)
    }
    values["predicted"] = cells[0].mean("predicted")
    values["targets"] = cells[0].mean("targets")
    return spectra(values, title="Singular values of the predictions", caption="Mean over seeds.")


def _settings(
    cells: Sequence[tuple[str, int]], n: int, steps: int, **more: object
) -> list[Setting]:
    widths = {"MLP": 128, "VGG": 16, "ResNet": 12}
    base = {"n": n, "steps": steps, "batch": 100, "rate": 2e-3, **more}
    return [
        {"width": widths[network], **base, "network": network, "block": block}
        for network, block in cells
    ]


_ALL = [(network, block) for network in ("MLP", "VGG", "ResNet") for block in (1, 4)]
_GRADED: Setting = {"targets": "graded", "r": 20, "keep": 0.4}
_ONE_HOT: Setting = {"targets": "one-hot", "r": 40, "keep": 0.5}
_FEW_UNITS: Setting = {"targets": "one-hot", "r": 20, "keep": 0.4}
_QUICK: Setting = {"batch": 60, "rate": 4e-3}
_CHOSEN = (
    "Networks, data, rates and block sizes are unknown for the paper: ours are a small MLP, VGG "
    "and ResNet (without normalisation) on digits, or on CIFAR-10 where a folder with its files is "
    "named, with squared loss. Against one-hot targets, whose singular values are nearly equal, "
    "every law shrinks all values by one factor; targets in which class c weighs exp(−0.4·c) tell "
    "scaling from thresholding, and blocks from single units."
)

CLAIMS = (
    Claim(
        id="P4.deep",
        paper="P4",
        statement="Deep networks with last-layer dropout predict the targets, shrunk as computed.",
        source="P4, RQ3: singular values of the final prediction matrix",
        settings={
            "test": [
                *_settings([("MLP", 4)], 100, 1100, **_GRADED),
                *_settings([("VGG", 4)], 60, 400, **_GRADED, **_QUICK, width=8),
                *_settings([("ResNet", 4)], 60, 400, **_GRADED, **_QUICK, width=6),
            ],
            "laptop": [
                *_settings(_ALL, 300, 1100, **_GRADED),
                *_settings([("MLP", 4), ("VGG", 1)], 300, 900, **_ONE_HOT),
            ],
            "paper": [
                *_settings(_ALL, 1438, 20000, **_GRADED, device="auto"),
                *_settings(_ALL, 1438, 20000, **_ONE_HOT, device="auto"),
            ],
        },
        seeds={"test": 7, "laptop": 10, "paper": 10},
        measure=measure_deep,
        criterion=Criterion(
            value="distance of the singular values from the prediction, relative",
            expected=0.0,
            high=0.05,
        ),
        broken=("wrong-lambda", "penalty-doubled", "swapped-losses"),
        figure=_draw,
        chosen=_CHOSEN + " The features enter the last layer with either sign (no ReLU between).",
        data="cifar10",
        batch=2,
        stacks=("block", "keep"),
    ),
    Claim(
        id="P4.deep-relu",
        paper="P4",
        statement="The same holds with a ReLU between the features and the dropped last layer.",
        source="P4, RQ3, under its assumption that a network can realise any features",
        settings={
            "test": _settings([("MLP", 1)], 60, 500, **_FEW_UNITS, **_QUICK),
            "laptop": _settings([("MLP", 1), ("VGG", 4)], 300, 900, **_FEW_UNITS),
            "paper": _settings([("MLP", 1), ("VGG", 4)], 1438, 20000, **_FEW_UNITS, device="auto"),
        },
        seeds={"test": 8, "laptop": 8, "paper": 10},
        measure=measure_relu,
        criterion=Criterion(
            value="distance of the singular values from the prediction, relative",
            expected=0.0,
            high=0.05,
        ),
        broken=("repaired",),
        expected_verdict="does not hold",
        reason="Not for want of features: detectors of single classes are non-negative and, two "
        "units a class, come within 1% of the computed minimum. Training does not find them. Units "
        "die behind the ReLU, and no rotation within non-negative features evens out those that "
        "are left; where a class loses all of its units, its singular value is zero.",
        figure=_draw,
        chosen=_CHOSEN + " The repaired twin takes the ReLU away.",
        data="cifar10",
        batch=2,
        stacks=("block", "keep"),
    ),
)
