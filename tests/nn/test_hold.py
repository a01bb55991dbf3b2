import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from droplens import nn as dn


class Zoo(nn.Module):
    """Dropout of many kinds: a module used twice, functions, attention, recurrent, weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.block = dn.DropBlock1d(0.3, 2)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.recurrent = nn.GRU(8, 8, 2, dropout=0.5, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.connected = dn.drop_connect(nn.Linear(8, 3), "weight", 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.inner(x)))
        h = F.dropout(h, 0.2, self.training) + self.drop(h)
        h = self.block(h)
        h = self.attention(h, h, h, need_weights=False)[0] + h
        h = self.recurrent(h)[0]
        return self.connected(self.norm(h))


@pytest.fixture
def zoo() -> Zoo:
    torch.manual_seed(0)
    return Zoo()


X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


class TestHold:
    def test_calls_agree_while_held_only(self, zoo: Zoo) -> None:
        zoo.norm.eval()
        with dn.hold(zoo) as masks:
            first = zoo(X)
            assert torch.equal(first, zoo(X))
            assert torch.equal(first, zoo(X))
        assert {"drop", "drop#2", "block"} <= set(masks)
        assert any("attention" in name for name in masks)
        assert any("recurrent" in name for name in masks)
        assert any("connected" in name for name in masks)
        assert not torch.equal(zoo(X), zoo(X))
        with dn.hold(zoo):
            assert not torch.equal(first, zoo(X))

    def test_calls_of_one_layer_have_masks_of_their_own(self, zoo: Zoo) -> None:
        with dn.hold(zoo) as masks:
            zoo(X)
        assert not torch.equal(masks["drop"], masks["drop#2"])
        assert masks["drop"].shape == X.shape
        assert set(masks["drop"].unique().tolist()) == {0.0, 2.0}

    def test_a_seed_repeats(self, zoo: Zoo) -> None:
        zoo.norm.eval()
        outs = []
        for options in ({"seed": 5}, {"seed": 5}, {"seed": 6}):
            with dn.hold(zoo, **options):
                outs.append(zoo(X))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
        before = torch.get_rng_state()
        with dn.hold(zoo, generator=torch.Generator().manual_seed(1)):
            zoo(X)
        assert torch.equal(before, torch.get_rng_state())

    def test_replay(self, zoo: Zoo) -> None:
        zoo.norm.eval()
        with dn.hold(zoo) as masks:
            expected = zoo(X)
        with dn.replay(zoo, masks):
            assert torch.equal(zoo(X), expected)
        with dn.replay(zoo, dict(masks)) as used:
            assert torch.equal(zoo(X), expected)
        assert set(used) == set(masks)

    def test_given_masks_are_used_as_they_are(self) -> None:
        model = nn.Sequential(dn.Dropout(0.5))
        mask = torch.tensor([[0.0, 2.0, 7.0]])
        with dn.replay(model, {"0": mask}):
            assert torch.equal(model(torch.ones(1, 3)), mask)

    def test_replay_refuses_what_does_not_fit(self) -> None:
        model = nn.Sequential(dn.Dropout(0.5))
        with (
            dn.replay(model, {"1": torch.ones(3)}),
            pytest.raises(ValueError, match=r"masks has none for the site '0'; it has \['1'\]"),
        ):
            model(torch.ones(3))
        with (
            dn.replay(model, {"0": torch.ones(2)}),
            pytest.raises(ValueError, match=r"masks\['0'\] has shape \(2,\), but the site"),
        ):
            model(torch.ones(3))

    def test_every_shape_has_its_mask(self) -> None:
        model = nn.Sequential(dn.Dropout(0.5))
        with dn.hold(model):
            small, large = model(torch.ones(8)), model(torch.ones(9, 9))
            assert torch.equal(model(torch.ones(8)), small)
            assert torch.equal(model(torch.ones(9, 9)), large)

    def test_sites_that_are_off_stay_off(self, zoo: Zoo) -> None:
        zoo.eval()
        expected = zoo(X)
        with dn.hold(zoo) as masks:
            torch.testing.assert_close(zoo(X), expected)
        assert len(masks) == 0

    def test_an_unknown_law_is_refused_by_name(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.AlphaDropout(0.5))
        with dn.hold(model), pytest.raises(ValueError, match="the mask of '1' cannot be held"):
            model(torch.ones(2, 2))

    def test_the_model_is_left_as_it_was(self, zoo: Zoo) -> None:
        before = {name: dict(vars(module)) for name, module in zoo.named_modules()}
        with pytest.raises(RuntimeError), dn.hold(zoo):
            zoo(torch.ones(1, 2, 3))
        after = {name: dict(vars(module)) for name, module in zoo.named_modules()}
        assert [set(own) for own in before.values()] == [set(own) for own in after.values()]
        assert all(not module._forward_hooks for module in zoo.drop.modules())

    @pytest.mark.parametrize("options", [{"generator": torch.Generator(), "seed": 1}])
    def test_both_are_refused(self, options: dict) -> None:  # type: ignore[type-arg]
        with pytest.raises(ValueError, match="not both"), dn.hold(nn.Dropout(), **options):
            pass


@pytest.mark.parametrize("wrapper", [True, False])
def test_a_compiled_model_is_held_too(wrapper: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), dn.Dropout(0.5))
    compiled, x = torch.compile(model, backend="eager"), torch.ones(4, 8)
    compiled(x)
    with dn.hold(compiled if wrapper else model, seed=0) as masks:
        assert torch.equal(compiled(x), compiled(x))
        assert torch.equal(compiled(x), model(x))
    assert list(masks) == ["1"]
    assert not torch.equal(compiled(x), compiled(x))


class TestCurvature:
    """What hold is for: a network that answers the same twice, differentiated in every way."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 4),
            nn.Tanh(),
            dn.Dropout(0.5),
            nn.Linear(4, 4),
            dn.GaussianDropout(0.3),
            nn.Linear(4, 1),
        ).double()

    def test_hessian_vector_products_agree_with_the_hessian(self) -> None:
        model, x = self.model(), torch.randn(6, 3, dtype=torch.float64)
        names = list(dict(model.named_parameters()))
        values = tuple(p.detach() for p in model.parameters())

        def loss(*parameters: Tensor) -> Tensor:
            named = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(model, named, (x,)).square().sum()

        direction = tuple(torch.randn_like(value) for value in values)
        with dn.hold(model, seed=1):
            _, plain = torch.autograd.functional.hvp(loss, values, direction)
            gradient = torch.func.grad(loss, argnums=tuple(range(len(values))))
            _, transformed = torch.func.jvp(gradient, values, direction)
            # Masks first met inside vmap would die with it.
        for one, other in zip(plain, transformed, strict=True):
            torch.testing.assert_close(one, other)

    def test_masks_first_met_inside_a_transform_outlive_it(self) -> None:
        model, x = self.model(), torch.randn(6, 3, dtype=torch.float64)
        with dn.hold(model, seed=1) as masks:
            rows = torch.func.vmap(model)(x[:, None])
            # Each row is a batch of one to the model, so all rows meet the same masks.
            torch.testing.assert_close(rows[2], model(x[2:3]))
            assert masks["2"].shape == (1, 4)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputation_meets_the_same_masks(self, reentrant: bool) -> None:
        drop = dn.Dropout(0.5)

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.drop, self.linear = drop, nn.Linear(6, 6)

            def part(self, x: Tensor) -> Tensor:
                return self.drop(self.linear(self.drop(x)))

            def forward(self, x: Tensor, use: bool) -> Tensor:
                for _ in range(2):
                    x = checkpoint(self.part, x, use_reentrant=reentrant) if use else self.part(x)
                return x

        model = Twice()
        x = torch.randn(4, 6, requires_grad=True)
        with dn.hold(model, seed=0):
            found = []
            for use in (False, True):
                x.grad = None
                model(x, use).square().sum().backward()
                found.append(x.grad.clone())
        torch.testing.assert_close(*found)


def test_a_deep_copy_does_not_inherit_the_hold() -> None:
    model = nn.Sequential(dn.Dropout(0.5))
    with dn.hold(model):
        model(torch.ones(50))
    twin = copy.deepcopy(model)
    assert not torch.equal(twin(torch.ones(50)), twin(torch.ones(50)))
