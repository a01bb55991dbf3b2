import copy

import pytest
import torch
from torch import nn

from droplens import nn as dn
from tests.nn.cases import CASES, LayerCase

each_layer = pytest.mark.parametrize("case", CASES, ids=str)


class Counter:
    """A compiler backend that counts how often it is called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):  # type: ignore[no-untyped-def]
        self.count += 1
        return graph


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@each_layer
def test_fullgraph_in_train_mode(case: LayerCase) -> None:
    layer = case.make(0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(case.shape, requires_grad=True)
    out = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())
    assert not torch.equal(out, compiled(x))


@each_layer
def test_a_seeded_layer_draws_the_same_masks_compiled(case: LayerCase) -> None:
    layer = case.make(0.4, seed=3)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(case.shape)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), twin(x))
    assert int(layer._stream.calls) == 3


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(
    "make",
    [lambda s: dn.Dropout(0.5, seed=s), lambda s: dn.DropBlock2d(0.5, 3, seed=s)],
    ids=["Dropout", "DropBlock2d"],
)
def test_a_hundred_rates_compile_once(make, seed: int | None) -> None:  # type: ignore[no-untyped-def]
    layer, backend = make(seed), Counter()
    schedule = dn.RateSchedule(layer, "linear", steps=99, end=1.0)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.ones(64, 4, 8, 8)
    for step in range(100):
        out = compiled(x)
        p = step / 99
        assert layer.p == pytest.approx(p, abs=1e-12)
        assert abs(float((out == 0).double().mean()) - p) < 0.06, p
        assert torch.isfinite(out).all()
        schedule.step()
    assert backend.count == 1


def test_map_sizes_recompile_once_and_then_are_dynamic() -> None:
    backend = Counter()
    compiled = torch.compile(dn.DropBlock2d(0.3, 3), fullgraph=True, backend=backend)
    for side in (8, 10, 12, 14, 9):
        assert compiled(torch.ones(4, 2, side, side)).shape[-1] == side
    assert backend.count <= 2


def test_a_generator_breaks_the_graph() -> None:
    layer = dn.Dropout(0.5, generator=torch.Generator().manual_seed(0))
    twin, x = copy.deepcopy(layer), torch.ones(30)
    assert torch.equal(torch.compile(layer, backend="eager")(x), twin(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="give the layer seed= instead"):
        torch.compile(layer, fullgraph=True, backend="eager")(x)


def test_eval_compiles_to_nothing() -> None:
    compiled = torch.compile(dn.DropBlock2d(0.3, 3).eval(), fullgraph=True, backend="eager")
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(compiled(x), x)


@pytest.mark.slow
@each_layer
def test_inductor(case: LayerCase) -> None:
    layer = case.make(0.5)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.ones(64 * case.shape[0], *case.shape[1:], requires_grad=True)
    out = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())
    assert abs(float(out.detach().mean()) - 1) < 0.3
    seeded = case.make(0.4, seed=3)
    twin = copy.deepcopy(seeded)
    compiled = torch.compile(seeded, fullgraph=True)
    y = torch.randn(case.shape)
    for _ in range(2):
        torch.testing.assert_close(compiled(y), twin(y))


@pytest.mark.slow
def test_inductor_schedule() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), dn.DropBlock2d(0.5, 3), dn.Dropout(0.5))
    schedule = dn.RateSchedule(model, "linear", steps=20, end=0.9)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(20):
        compiled(torch.ones(8, 2, 8, 8)).sum().backward()
        schedule.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
