import copy

import pytest
import torch
from torch import nn

from droplens import nn as dn
from tests.stand_ins import (
    TimmDropBlock2d,
    TimmDropPath,
    VisionDropBlock2d,
    VisionDropBlock3d,
    VisionStochasticDepth,
)

PAIRS = [
    (nn.Dropout(0.3, inplace=True), "Dropout(p=0.3, inplace=True)"),
    (nn.Dropout1d(0.3), "Dropout1d(p=0.3, inplace=False)"),
    (nn.Dropout2d(0.3), "Dropout2d(p=0.3, inplace=False)"),
    (nn.Dropout3d(0.3), "Dropout3d(p=0.3, inplace=False)"),
    (VisionDropBlock2d(0.3, 5), "DropBlock2d(p=0.3, block_size=5, inplace=False)"),
    (VisionDropBlock3d(0.3, 5, True), "DropBlock3d(p=0.3, block_size=5, inplace=True)"),
    (VisionStochasticDepth(0.3, "row"), "DropPath(p=0.3, inplace=False)"),
    (TimmDropPath(0.3), "DropPath(p=0.3, inplace=False)"),
    (
        TimmDropBlock2d(0.3, 5, gamma_scale=0.5),
        "DropBlock2d(p=0.15, block_size=5, shared=True, inplace=False)",
    ),
    (
        TimmDropBlock2d(0.3, 5, couple_channels=False),
        "DropBlock2d(p=0.3, block_size=5, inplace=False)",
    ),
]


@pytest.mark.parametrize(("layer", "ours"), PAIRS, ids=[repr(ours) for _, ours in PAIRS])
class TestPairs:
    def test_there(self, layer: nn.Module, ours: str) -> None:
        model = nn.Sequential(copy.deepcopy(layer).eval())
        assert dn.convert(model) is model
        assert repr(model[0]) == ours
        assert not model[0].training

    def test_and_back(self, layer: nn.Module, ours: str) -> None:
        model = nn.Sequential(copy.deepcopy(layer))
        original = model[0]
        settings = {key: value for key, value in vars(original).items() if key[0] != "_"}
        dn.convert(model).eval()
        assert dn.revert(model)[0] is original
        assert not original.training
        original.train()
        assert {k: v for k, v in vars(original).items() if k[0] != "_"} == settings

    def test_a_single_layer(self, layer: nn.Module, ours: str) -> None:
        assert repr(dn.convert(copy.deepcopy(layer))) == ours


def test_masks_of_torchs_layers_are_the_same_numbers_in_law() -> None:
    layer = dn.convert(nn.Dropout(0.25))
    assert set(layer(torch.ones(1000)).unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


def test_a_changed_rate_goes_back() -> None:
    model = dn.convert(nn.Sequential(nn.Dropout(0.3), TimmDropBlock2d(0.3, 5, gamma_scale=0.5)))
    model[0].p, model[1].p = 0.6, 0.1
    dn.revert(model)
    assert model[0].p == 0.6
    assert model[1].drop_prob == pytest.approx(0.2)


def test_hooks_are_kept_and_can_be_removed() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.Dropout(0.3))
    handle = model[0].register_forward_hook(lambda *_: calls.append("forward"))
    dn.convert(model)
    model(torch.ones(2))
    handle.remove()
    model(torch.ones(2))
    assert calls == ["forward"]


def test_a_shared_layer_stays_shared() -> None:
    drop = nn.Dropout(0.3)
    model = dn.convert(nn.ModuleDict({"a": drop, "b": nn.Sequential(drop)}))
    assert isinstance(model["a"], dn.Dropout)
    assert model["a"] is model["b"][0]


def test_parameters_and_checkpoints_are_untouched() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    dn.convert(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model.dropout1, dn.Dropout)
    assert model(torch.ones(3, 2, 8)).shape == (3, 2, 8)


def test_converted_models_copy() -> None:
    model = dn.convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)))
    twin = dn.revert(copy.deepcopy(model))
    assert type(twin[1]) is nn.Dropout
    assert type(model[1]) is dn.Dropout


def test_layers_of_ours_become_torchs_where_torch_has_them() -> None:
    model = dn.revert(nn.Sequential(dn.Dropout2d(0.3, True), dn.DropBlock2d(0.3, 3)))
    assert type(model[0]) is nn.Dropout2d
    assert (model[0].p, model[0].inplace) == (0.3, True)
    assert type(model[1]) is dn.DropBlock2d


class Custom(nn.Dropout):
    """Someone's own layer: what it does is not for us to guess."""


@pytest.mark.parametrize(
    "layer", [nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1), Custom(0.1), dn.Dropout(0.1)]
)
def test_other_layers_are_left_alone(layer: nn.Module) -> None:
    assert dn.convert(layer) is layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (VisionStochasticDepth(0.3, "batch"), "has one coin for the whole batch"),
        (TimmDropPath(0.3, scale_by_keep=False), "does not keep its input's mean"),
        (TimmDropBlock2d(0.3, scale_by_keep=False), "does not keep its input's mean"),
        (TimmDropBlock2d(0.3, with_noise=True), "adds noise besides dropping"),
        (TimmDropBlock2d(0.6, gamma_scale=2.0), "1.2 > 1"),
    ],
)
def test_what_has_no_counterpart_stays_with_a_warning(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer)
    with pytest.warns(UserWarning, match=f"0 stays as it is: .*{reason}"):
        dn.convert(model)
    assert model[0] is layer


def test_a_stream_of_its_own_cannot_go_back() -> None:
    model = nn.Sequential(dn.Dropout(0.3, seed=1))
    with pytest.warns(UserWarning, match="torch's layer has no generator or seed"):
        dn.revert(model)
    assert isinstance(model[0], dn.Dropout)


def test_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="model has to be a torch module, but got list"):
        dn.convert([nn.Dropout()])  # type: ignore[arg-type]
