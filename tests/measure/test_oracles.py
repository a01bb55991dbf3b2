"""Other libraries' answers, where they are installed."""

import numpy as np
import pytest
import torch
from torch import nn

from droplens import measure
from droplens.batches import as_batches
from droplens.losses import family
from droplens.measure._masks import Masking
from droplens.measure._operators import GaussNewton, LossHessian
from droplens.measure._risk import Loss

CE = nn.CrossEntropyLoss()


def network(activation=nn.Sigmoid):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), activation(), nn.Linear(9, 3)).double()


def examples(n=15):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("kind", ["hessian", "fisher"])
def test_products_equal_curvlinops(kind):
    curvlinops = pytest.importorskip("curvlinops")
    model, data = network(), examples()
    parameters = list(model.parameters())
    theirs = {"hessian": "HessianLinearOperator", "fisher": "GGNLinearOperator"}[kind]
    operator = getattr(curvlinops, theirs)(model, CE, parameters, [data]).to_scipy()
    v = np.random.default_rng(0).standard_normal(operator.shape[0])
    with Masking("off", 2, 0).applied(model) as applied:
        batches, loss = as_batches(data), Loss(CE)
        if kind == "hessian":
            ours = LossHessian(model, batches, loss, applied)
        else:
            ours = GaussNewton(model, batches, loss, applied, family(CE))
        found = ours.products(v[:, None])[:, 0]
    np.testing.assert_allclose(found, operator @ v, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_the_diagonal_equals_backpacks():
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model, (x, y) = network(), examples()
    found = measure.fisher(model, (x, y), CE)
    extended = backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.DiagGGNExact()):
        loss(extended(x), y).backward()
    for name, parameter in extended.named_parameters():
        torch.testing.assert_close(
            found.diagonal[name], parameter.diag_ggn_exact, rtol=1e-8, atol=1e-12
        )
