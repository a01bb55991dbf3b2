"""Our layers, functions and parametrisations as the rest of the library sees them."""

import pytest
import torch
from torch import Tensor, nn

import droplens as dl
from droplens import masks
from droplens import nn as dn
from droplens.nn import functional as DF
from tests import reference_masks as reference
from tests.nn.cases import CASES, LayerCase


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_and_functions_are_sites_with_their_law(case: LayerCase) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = case.make(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return case.function(self.drop(x), 0.2, training=self.training)

    found = dl.sites(Both(), torch.ones(case.shape))
    assert [site.law for site in found] == [case.law(0.3), case.law(0.2)]
    assert found[0].name == "drop"
    assert all(site.active and site.shape == case.shape for site in found)
    assert not any(site.active for site in dl.sites(Both().eval(), torch.ones(case.shape)))


def test_drop_connect_is_a_site_over_the_entries_of_a_weight() -> None:
    model = nn.Sequential(dn.drop_connect(nn.Linear(3, 2), "weight", 0.5))
    (site,) = dl.sites(model, torch.ones(4, 3))
    assert site.law == dl.masks.Weight(0.5)
    assert site.shape == (1, 2, 3)
    assert site.kind == "DropConnect"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_the_penalty_of_drop_block_is_exact_before_a_linear_layer(
    shared: bool, functional: bool
) -> None:
    torch.manual_seed(0)
    channels, p = 2, 0.3
    layer = dn.DropBlock2d(p, 2, shared=shared).double()
    head = nn.Linear(channels * 9, 3).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.head = (nn.Identity() if functional else layer), head

        def forward(self, x: Tensor) -> Tensor:
            h = DF.drop_block2d(x, p, 2, shared=shared) if functional else self.drop(x)
            return self.head(h.flatten(1))

    x = torch.randn(5, channels, 3, 3, dtype=torch.float64)
    y = torch.randn(5, 3, dtype=torch.float64)
    loss = nn.MSELoss()
    probabilities, z = reference.block(p, 2, (3, 3), channels, shared)
    mean, _ = reference.moments((probabilities, z))
    # Every mask for every example; expectations over examples are separate.
    outs = torch.stack([head(x.flatten(1) * one / mean) for one in z])
    gap = (probabilities[:, None, None] * (outs - y) ** 2).sum(0).mean() - loss(
        head(x.flatten(1)), y
    )
    for method in ("second_order", "gaussian"):
        found = dl.penalty(Net(), x, loss, method)
        torch.testing.assert_close(found.total, gap, rtol=1e-10, atol=1e-12)


def test_masks_of_every_law_are_refused_where_units_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 does not divide 5"):
        dl.penalty(
            nn.Sequential(dn.Masked(masks.Grouped(0.5, 2)), nn.Linear(5, 1)),
            torch.ones(3, 5),
            nn.MSELoss(),
            "second_order",
        )
