import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import droplens as dl
from droplens import nn as dn
from droplens.estimates import jackknife, t_bound, z_bound


class Zoo(nn.Module):
    """Dropout as module, function, in attention and between recurrent layers; batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.recurrent = nn.GRU(8, 8, 2, dropout=0.3, batch_first=True)
        self.own = dn.Dropout(0.3, seed=1)
        self.given = dn.Dropout(0.3, generator=torch.Generator().manual_seed(1))
        self.head = dn.drop_connect(nn.Linear(8, 3), "weight", 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(x))[:, None] + F.dropout(x[:, None], 0.2, self.training)
        h = self.attention(h, h, h, need_weights=False)[0] + h
        return self.head(self.given(self.own(self.recurrent(h)[0][:, 0])))


@pytest.fixture
def zoo() -> Zoo:
    torch.manual_seed(0)
    return Zoo().eval()


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def affine(p: float = 0.5, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(dn.Dropout(p), nn.Linear(4, classes)).double().eval()


def enumerated(model: nn.Sequential, x: Tensor, p: float = 0.5) -> tuple[Tensor, Tensor]:
    """Every mask of four units, with its probability: weights (16,), outputs (16, n, classes)."""
    outs, weights = [], []
    for bits in range(16):
        z = torch.tensor([(bits >> i) & 1 for i in range(4)], dtype=torch.float64)
        outs.append(model[1](x * z / (1 - p)))
        weights.append((1 - p) ** int(z.sum()) * p ** (4 - int(z.sum())))
    return torch.tensor(weights, dtype=torch.float64), torch.stack(outs).detach()


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


DRAWS = 4000


class TestAgainstAllMasks:
    """Sampled numbers against the sums over all sixteen masks."""

    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def test_classes(self) -> None:
        model = affine()
        weights, logits = enumerated(model, self.x)
        p = logits.softmax(-1)
        mean = torch.einsum("m,mnc->nc", weights, p)
        total = entropy(mean)
        information = total - torch.einsum("m,mn->n", weights, entropy(p))
        spread = torch.einsum("m,mnc->nc", weights, (p - mean) ** 2).sqrt()
        found = dl.predict(model, self.x, DRAWS, seed=3)
        bound = z_bound(1 - 1e-6, 30)
        assert ((found.mean - mean).abs() <= bound * found.mean_error).all()
        assert ((found.entropy - total).abs() <= bound * found.entropy_error).all()
        off = (found.mutual_information - information).abs()
        assert (off <= bound * found.mutual_information_error).all()
        off = (found.standard_deviation - spread).abs()
        assert (off <= bound * found.standard_deviation_error).all()
        assert (found.mean_error < 0.01).all()

    def test_values(self) -> None:
        model = affine()
        weights, values = enumerated(model, self.x)
        found = dl.predict(model, self.x, DRAWS, outputs="values", seed=3)
        mean = torch.einsum("m,mnc->nc", weights, values)
        spread = torch.einsum("m,mnc->nc", weights, (values - mean) ** 2).sqrt()
        bound = z_bound(1 - 1e-6, 20)
        assert ((found.mean - mean).abs() <= bound * found.mean_error).all()
        off = (found.standard_deviation - spread).abs()
        assert (off <= bound * found.standard_deviation_error).all()
        assert found.entropy is None
        assert found.mutual_information is None

    @pytest.mark.parametrize("flat", [False, True])
    def test_a_single_logit_is_that_of_two_classes(self, flat: bool) -> None:
        model = affine(classes=1)
        two = nn.Linear(4, 2).double()
        with torch.no_grad():
            two.weight.copy_(torch.cat((torch.zeros(1, 4).double(), model[1].weight)))
            two.bias.copy_(torch.cat((torch.zeros(1).double(), model[1].bias)))
        pair = dl.predict(nn.Sequential(dn.Dropout(0.5), two), self.x, 50, seed=1)
        one = nn.Sequential(*model, nn.Flatten(0)) if flat else model
        found = dl.predict(one, self.x, 50, seed=1)
        torch.testing.assert_close(found.mean.reshape(3), pair.mean[:, 1])
        torch.testing.assert_close(found.entropy, pair.entropy)
        torch.testing.assert_close(found.mutual_information, pair.mutual_information)

    @pytest.mark.slow
    def test_small_samples_are_not_biased(self) -> None:
        model = affine()
        weights, logits = enumerated(model, self.x)
        p = logits.softmax(-1)
        mean = torch.einsum("m,mnc->nc", weights, p)
        information = entropy(mean) - torch.einsum("m,mn->n", weights, entropy(p))
        runs = torch.stack(
            [dl.predict(model, self.x, 10, seed=s).mutual_information for s in range(3000)]
        )
        error = runs.std(0) / math.sqrt(len(runs))
        # The plug-in would be 10% low; the jackknife leaves O(1/draws²).
        assert ((runs.mean(0) - information).abs() <= 5 * error + 0.02 * information).all()


@pytest.mark.slow
def test_intervals_cover_the_truth_at_their_level() -> None:
    """93 to 97% of 1,000, at the default draws: of every field, over six examples' entries."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator).double()
    model = affine()
    weights, logits = enumerated(model, x)
    p = logits.softmax(-1)
    mean = torch.einsum("m,mnc->nc", weights, p)
    expected = {
        "mean": mean,
        "standard_deviation": torch.einsum("m,mnc->nc", weights, (p - mean) ** 2).sqrt(),
        "entropy": entropy(mean),
        "mutual_information": entropy(mean) - torch.einsum("m,mn->n", weights, entropy(p)),
    }
    held = {name: torch.zeros_like(value) for name, value in expected.items()}
    for seed in range(1000):
        found = dl.predict(model, x, seed=seed)
        bound = t_bound(found.draws - 1)
        for name, value in expected.items():
            error = getattr(found, f"{name}_error")
            held[name] += (getattr(found, name) - value).abs() <= bound * error
    for name, counts in held.items():
        assert 0.93 <= float(counts.mean()) / 1000 <= 0.97, (name, counts)
        # A single entry's share has a standard error of 0.7%.
        assert 0.91 <= float(counts.min()) / 1000 <= float(counts.max()) / 1000 <= 0.98, counts


class TestJackknife:
    def test_the_same_as_the_scalar_one(self) -> None:
        model, x, k = affine(), torch.ones(1, 4, dtype=torch.float64), 7
        found = dl.predict(model, x, k, seed=1)
        torch.manual_seed(1)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            passes = torch.stack([model.train()(x) for _ in range(k)]).softmax(-1)[:, 0].detach()

        def information(p: Tensor) -> float:
            return float(entropy(p.mean(0)) - entropy(p).mean())

        without = torch.stack(
            [torch.tensor(information(torch.cat((passes[:i], passes[i + 1 :])))) for i in range(k)]
        )
        expected = jackknife(information(passes), without)
        assert float(found.mutual_information) == pytest.approx(expected.value, abs=1e-6)
        assert float(found.mutual_information_error) == pytest.approx(
            expected.standard_error, abs=1e-6
        )


class TestEverySite:
    def test_each_kind_of_site_is_on(self, zoo: Zoo) -> None:
        for keep in ("drop", "attention", "recurrent", "own", "given", "head", "function"):
            model = copy.deepcopy(zoo)
            for name, module in model.named_modules():
                if isinstance(module, nn.Dropout | dn.MaskedLayer) and not name.startswith(keep):
                    module.p = 0.0
            if keep != "attention":
                model.attention.dropout = 0.0
            if keep != "recurrent":
                model.recurrent.dropout = 0.0
            found = dl.predict(model, X, 20, seed=0)
            assert float(found.standard_deviation.max()) > 0, keep

    def test_batch_norm_stays_in_eval(self, zoo: Zoo) -> None:
        before = copy.deepcopy(zoo.norm.state_dict())
        found = dl.predict(zoo.train(), X, 5, seed=0)
        assert all(torch.equal(before[k], v) for k, v in zoo.norm.state_dict().items())
        # With batch statistics an example would depend on the others.
        alone = dl.predict(nn.Sequential(zoo.norm), X[:1], 2, outputs="values")
        together = dl.predict(nn.Sequential(zoo.norm), X, 2, outputs="values")
        torch.testing.assert_close(alone.mean[0], together.mean[0])
        assert found.draws == 5

    def test_everything_is_put_back(self, zoo: Zoo) -> None:
        zoo.drop.train()
        modes = [module.training for module in zoo.modules()]
        rng, calls = torch.get_rng_state(), int(zoo.own._stream.calls)
        state = zoo.given._stream.generator.get_state()

        def check() -> None:
            assert [module.training for module in zoo.modules()] == modes
            assert torch.equal(torch.get_rng_state(), rng)
            assert int(zoo.own._stream.calls) == calls
            assert torch.equal(zoo.given._stream.generator.get_state(), state)
            assert all(p.grad is None for p in zoo.parameters())

        dl.predict(zoo, X, 5)
        check()
        with pytest.raises(RuntimeError):
            dl.predict(zoo, torch.ones(2, 3), 5)
        check()

    def test_held_masks_are_held(self, zoo: Zoo) -> None:
        with dn.hold(zoo, seed=0):
            found = dl.predict(zoo, X, 4)
        assert float(found.standard_deviation.max()) < 1e-7


class TestRandomness:
    def test_seeds(self, zoo: Zoo) -> None:
        first = dl.predict(zoo, X, 5, seed=4)
        assert torch.equal(first.mean, dl.predict(zoo, X, 5, seed=4).mean)
        assert first.seed == 4
        fresh = dl.predict(zoo, X, 5)
        assert not torch.equal(first.mean, fresh.mean)
        assert torch.equal(fresh.mean, dl.predict(zoo, X, 5, seed=fresh.seed).mean)
        generator = torch.Generator().manual_seed(0)
        a, b = (dl.predict(zoo, X, 5, generator=generator) for _ in range(2))
        assert not torch.equal(a.mean, b.mean)
        with pytest.raises(ValueError, match="give generator= or seed=, not both"):
            dl.predict(zoo, X, 5, generator=generator, seed=1)


class TestInputs:
    def test_batches_cover_all_examples(self) -> None:
        model = affine(p=0.0)
        x = torch.randn(7, 4, dtype=torch.float64)
        whole = dl.predict(model, x, 2)
        for size in (1, 3, 7, 50):
            torch.testing.assert_close(dl.predict(model, x, 2, batch_size=size).mean, whole.mean)
        assert float(whole.standard_deviation.max()) == 0
        torch.testing.assert_close(
            whole.mutual_information, torch.zeros(7).double(), atol=1e-12, rtol=0
        )

    def test_tuples_and_mappings(self) -> None:
        class Two(nn.Module):
            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return F.dropout(a + b, 0.5, self.training)

        a, b = torch.randn(5, 3), torch.randn(3)
        by_place = dl.predict(Two(), (a, b), 3, seed=0, batch_size=2)
        by_name = dl.predict(Two(), {"a": a, "b": b}, 3, seed=0, batch_size=2)
        assert torch.equal(by_place.mean, by_name.mean)

    def test_maps_of_classes(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Dropout2d(0.5))
        found = dl.predict(model, torch.randn(4, 2, 5, 5), 3)
        assert found.mean.shape == (4, 3, 5, 5)
        assert found.entropy.shape == found.mutual_information.shape == (4, 5, 5)

    def test_probabilities(self) -> None:
        model = affine()
        x = torch.randn(5, 4, dtype=torch.float64)
        logits = dl.predict(model, x, 6, seed=0)
        given = dl.predict(
            nn.Sequential(*model, nn.Softmax(-1)), x, 6, outputs="probabilities", seed=0
        )
        torch.testing.assert_close(logits.mean, given.mean)
        torch.testing.assert_close(logits.entropy, given.entropy)

    def test_auxiliary_outputs_of_train_mode_are_left_out(self) -> None:
        class Auxiliary(nn.Module):
            def __init__(self, by_itself: bool) -> None:
                super().__init__()
                self.drop, self.by_itself = nn.Dropout(0.3), by_itself

            def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
                h = self.drop(inputs)
                if self.by_itself:
                    h = nn.functional.dropout(h, 0.5, self.training)
                return (h, h) if self.training else h

        inputs = torch.ones(2, 4).double()
        for mode in (True, False):
            model = Auxiliary(by_itself=False).train(mode)
            found = dl.predict(model, inputs, draws=20, outputs="values", seed=0)
            plain = dl.predict(nn.Dropout(0.3), inputs, draws=20, outputs="values", seed=0)
            assert torch.equal(found.mean, plain.mean)
            assert model.training is mode
        with pytest.raises(TypeError, match="the model returned a tuple of 2"):
            dl.predict(Auxiliary(by_itself=True), inputs, draws=2, outputs="values")

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"draws": 1}, ValueError, "draws has to be at least 2, but got 1"),
            ({"draws": 2.0}, TypeError, "draws has to be an int, but got float"),
            ({"batch_size": 0}, ValueError, "batch_size has to be at least 1, but got 0"),
            ({"outputs": "classes"}, ValueError, 'outputs has to be "logits"'),
            ({"outputs": "probabilities"}, ValueError, "do not sum to one over axis 1"),
            ({"inputs": torch.ones(0, 4)}, ValueError, "inputs is empty"),
            ({"inputs": torch.full((2, 4), math.nan)}, ValueError, "inputs holds NaN or Inf"),
            ({"inputs": 3}, TypeError, "inputs has to be a tensor"),
        ],
    )
    def test_bad_input(self, options: dict, error: type[Exception], message: str) -> None:  # type: ignore[type-arg]
        arguments = {"inputs": torch.ones(2, 4).double(), "draws": 3, **options}
        with pytest.raises(error, match=message):
            dl.predict(affine(), **arguments)
