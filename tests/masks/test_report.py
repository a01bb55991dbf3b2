import math

import pytest
import torch
from torch import Tensor, nn

from droplens.estimates import z_bound
from droplens.masks import Block, rate_report
from droplens.nn import DropBlock2d, DropBlock3d
from tests.masks.conformance import FALSE_ALARM
from tests.stand_ins import TimmDropBlock2d, VisionDropBlock2d, VisionDropBlock3d

N_MASKS = 20_000

PEERS = {
    "torchvision, p=.1 on 14x14": (VisionDropBlock2d(0.1, 7), (14, 14)),
    "torchvision, p=.5 on 14x10": (VisionDropBlock2d(0.5, 7), (14, 10)),
    "torchvision, the block is the map": (VisionDropBlock2d(0.3, 3), (3, 3)),
    "torchvision, 3-D": (VisionDropBlock3d(0.2, 3), (5, 4, 6)),
    "timm, p=.1 on 7x7": (TimmDropBlock2d(0.1, 7, couple_channels=False), (7, 7)),
    "timm, even block": (TimmDropBlock2d(0.1, 4, couple_channels=False), (9, 8)),
    "timm, shared, half gamma": (TimmDropBlock2d(0.2, 3, 0.5), (6, 6)),
    "timm, larger than the map": (TimmDropBlock2d(0.1, 7, couple_channels=False), (4, 5)),
    "timm, not rescaled": (TimmDropBlock2d(0.1, 3, scale_by_keep=False), (6, 6)),
}


def sampled(layer: nn.Module, grid: tuple[int, ...]) -> Tensor:
    """What a peer multiplies by, for many masks drawn in one batch."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        return layer.train()(torch.ones(N_MASKS, 1, *grid)).double()


@pytest.mark.parametrize("name", PEERS)
def test_peers_do_what_the_report_says(name: str) -> None:
    layer, grid = PEERS[name]
    report = rate_report(layer, grid)
    masks = sampled(layer, grid)[:, 0]
    bound = z_bound(1 - FALSE_ALARM, math.prod(grid))
    rates = (masks == 0).double().mean(0)
    error = (report.rates * (1 - report.rates) / N_MASKS).sqrt()
    assert ((rates - report.rates).abs() <= bound * error + 1e-12).all()
    assert report.realised == pytest.approx(float(report.rates.mean()), abs=1e-12)
    # One realised scale for the batch; its own spread is at most that of a position.
    spread = masks.std(0) + masks.mean(0) * rates.mean().sqrt() / (1 - rates.mean()).sqrt()
    deviation = (masks.mean(0) - 1 - report.bias).abs()
    assert (deviation <= bound * spread / math.sqrt(N_MASKS) + 1e-6).all()


def test_the_published_table_of_timm() -> None:
    # Nominal 10%, block 7, by map side.
    table = {7: 0.93, 8: 0.62, 14: 0.21, 16: 0.19, 28: 0.13, 32: 0.13, 56: 0.11, 4: 0.59}
    for side, realised in table.items():
        report = rate_report(TimmDropBlock2d(0.1, 7), (side, side))
        assert round(report.realised, 2) == pytest.approx(realised, abs=0.011), side


def test_the_published_table_of_torchvision() -> None:
    table = {7: 0.095, 8: 0.097, 14: 0.094, 16: 0.093, 28: 0.094, 32: 0.094, 56: 0.095}
    for side, realised in table.items():
        report = rate_report(VisionDropBlock2d(0.1, 7), (side, side))
        assert report.realised == pytest.approx(realised, abs=0.0051), side
    report = rate_report(VisionDropBlock2d(0.1, 7), (14, 14))
    assert report.centre == pytest.approx(0.26, abs=0.01)
    assert report.corner == pytest.approx(0.006, abs=0.001)
    assert float(report.bias.min()) == pytest.approx(-0.19, abs=0.01)
    assert float(report.bias.max()) == pytest.approx(0.10, abs=0.01)


def test_ours_does_what_was_asked() -> None:
    for layer, grid in (
        (DropBlock2d(0.3, 5), (9, 7)),
        (DropBlock3d(0.3, 2), (3, 4, 5)),
        (Block(0.3, 5), (9, 7)),
    ):
        report = rate_report(layer, grid)
        assert report.rule == "droplens"
        assert report.realised == pytest.approx(0.3, abs=1e-12)
        assert float(report.bias.abs().max()) == 0
        assert report.independent
        assert report.rates.shape == grid


def test_prints_as_a_sentence() -> None:
    assert str(rate_report(TimmDropBlock2d(0.1, 7), (7, 7))) == (
        "timm DropBlock on 7×7: asked 0.1, drops 0.93 (centre 0.994, corner 0.815), "
        "bias -91.8% to +164.6%"
    )


@pytest.mark.parametrize(
    ("layer", "grid", "message"),
    [
        (VisionDropBlock2d(0.1, 7), (4, 4), "the block has to fit"),
        (VisionDropBlock2d(0.1, 2), (4, 4), "needs an odd block, but has 2"),
        (TimmDropBlock2d(0.9, 3, 2.0), (3, 3), "asks for a seed rate of 1.8 > 1"),
        (VisionDropBlock2d(0.1, 3), (4, 4, 4), "map_size has to be 2 lengths"),
        (VisionDropBlock2d(0.1, 3), (0, 4), "lengths of at least 1"),
        (TimmDropBlock2d(with_noise=True), (4, 4), "adds noise, so it drops at no rate"),
        (DropBlock2d(0.1, 3), (4,), "map_size has to have 2 lengths"),
    ],
)
def test_bad_values_are_refused(layer: nn.Module, grid: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rate_report(layer, grid)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), 3, nn.Linear(2, 2)])
def test_other_layers_are_refused(layer: object) -> None:
    with pytest.raises(TypeError, match="layer has to be a DropBlock of torchvision, timm or"):
        rate_report(layer, (4, 4))


def test_an_old_timm_is_refused() -> None:
    layer = TimmDropBlock2d()
    layer.fast = True
    with pytest.raises(ValueError, match="a timm before"):
        rate_report(layer, (8, 8))
