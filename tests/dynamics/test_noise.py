"""Gradient noise and its alignment with the Hessian, against sums over all masks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import droplens as dl
from droplens.batches import Batch
from droplens.dynamics import _alignment, _gradients, _modified, _noise, noise_alignment
from droplens.dynamics._masked import MaskedLoss
from droplens.estimates import Estimate
from droplens.gates import masks_off
from tests.covering import Covering
from tests.discovery.test_sites import assert_same_state, state_of
from tests.reference_dynamics import (
    WrittenLoss,
    covariance,
    dense_hessian,
    gradients,
    network,
    randn,
)

x, labels = randn(2, 2), torch.tensor([0, 1])
loss = nn.CrossEntropyLoss()


def z(estimate, value):
    return (estimate.value - value) / estimate.standard_error


def test_traces_jointly_and_by_site():
    """One example, two sites: every mask of either site alone and of both."""
    net = network(sites=2)
    found = dl.gradient_noise(net, x[:1], labels[:1], loss, 500, seed=0)
    for only, estimate in [(None, found.trace), *((({n}), e) for n, e in found.by_site.items())]:
        weights, _, all_gradients = gradients(net, x[:1], labels[:1], loss, only=only)
        assert abs(z(estimate, covariance(weights, all_gradients).trace())) <= 4
        if only is None:
            mean = weights @ all_gradients
            assert abs(z(found.signal, mean @ mean)) <= 4
    assert found.parameters == all_gradients.shape[1]
    assert (found.trace.n, found.trace.over) == (500, "masks")


def test_one_site_alone_is_all_together_and_chosen_sites_are_listed():
    only = dl.gradient_noise(network(), x, labels, loss, 10, seed=0)
    assert only.by_site == {"2": only.trace}
    net = network(sites=2)
    assert list(dl.gradient_noise(net, x, labels, loss, 4, sites=["5"]).by_site) == ["5"]
    assert dl.gradient_noise(net, x, labels, loss, 4, sites=[]).by_site == {}


def test_examples_draw_their_own_masks():
    """The batch repeated: Σ of the mean gradient halves."""
    once = dl.gradient_noise(network(), x, labels, loss, 300, seed=0).trace
    twice = dl.gradient_noise(network(), x.repeat(2, 1), labels.repeat(2), loss, 300, seed=1).trace
    error = math.hypot(once.standard_error, 2 * twice.standard_error)
    assert abs(once.value - 2 * twice.value) <= 4 * error


def test_no_dropout_no_noise():
    for net in (network(p=0.0), nn.Linear(2, 2).double()):
        found = dl.gradient_noise(net, x, labels, loss, seed=0)
        assert (found.trace.value, found.trace.standard_error) == (0, 0)
        assert all(e.value == 0 for e in found.by_site.values())
        with pytest.raises(ValueError, match="no site of the model drops anything"):
            noise_alignment(net, x, labels, loss)


def test_sites_without_a_law_are_named():
    net = nn.Sequential(nn.Linear(2, 3), nn.AlphaDropout(0.5), nn.Dropout(0.5), nn.Linear(3, 2))
    found = dl.gradient_noise(net.double(), x, labels, loss, 4)
    assert "alpha" in found.unmeasured["1"]
    with pytest.raises(ValueError, match="sites holds '1', which is not a site with a law"):
        dl.gradient_noise(net, x, labels, loss, 4, sites=["1"])


def aligned_truth(net, units=3, examples=2):
    """H, Σ, and every number of their alignment from the dense matrices."""
    rows, classes = x[:examples], labels[:examples]
    H = dense_hessian(net, rows, classes, loss).detach()
    weights, _, found = gradients(net, rows, classes, loss, units=units)
    S = covariance(weights, found).detach()
    return H, S, numbers_of(H, S)


def numbers_of(H, S):
    """Every number of the alignment of two matrices."""
    d, one = len(H), torch.eye(len(H)).double()
    H0, S0 = H - H.trace() / d * one, S - S.trace() / d * one
    numbers = {
        "trace_product": float((H * S).sum()),
        "trace_noise": float(S.trace()),
        "trace_hessian": float(H.trace()),
        "norm_noise": float(S.norm()),
        "norm_hessian": float(H.norm()),
    }
    scale = numbers["norm_hessian"] * numbers["norm_noise"]
    numbers["value"] = numbers["trace_product"] / scale
    numbers["null"] = numbers["trace_hessian"] * numbers["trace_noise"] / (d * scale)
    numbers["null_deviation"] = (2 / ((d - 1) * (d + 2))) ** 0.5 * float(
        H0.norm() * S0.norm() / scale
    )
    if numbers["null_deviation"]:
        numbers["excess"] = (numbers["value"] - numbers["null"]) / numbers["null_deviation"]
    return numbers


@pytest.mark.parametrize("probes", [1000, 15], ids=["H formed", "H probed"])
def test_alignment_against_dense_matrices(probes):
    net = network()
    H, _, numbers = aligned_truth(net)
    found = noise_alignment(net, x, labels, loss, 300, probes, seed=0)
    assert found.parameters == len(H) == 17
    for name, value in numbers.items():
        estimate = getattr(found, name)
        if probes == 1000 and "hessian" in name:
            assert estimate.standard_error == 0
            assert estimate.value == pytest.approx(value, rel=1e-10)
        else:
            assert abs(z(estimate, value)) <= 4
    assert found.trace_noise.over == "masks"
    assert found.value.over == ("masks" if probes == 1000 else "masks and probes")
    assert found.norm_hessian.over == "probes"


def test_one_weight_aligns_and_has_no_deviation():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False)).double()
    found = noise_alignment(net, x[:, :1], x[:, 1:], nn.MSELoss(), 300, seed=0)
    assert abs(z(found.value, 1)) <= 4
    assert found.null.value == pytest.approx(found.value.value)
    assert (found.null_deviation.value, found.null_deviation.standard_error) == (0, 0)
    assert not math.isfinite(found.excess.value)


def test_the_null_is_that_of_random_eigenvectors():
    """Mean and deviation of Tr(H QΣQᵀ) over 2,000 Haar rotations, against the closed forms."""
    H, S, numbers = aligned_truth(network())
    d, scale = len(H), H.norm() * S.norm()
    source = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2000):
        Q, R = torch.linalg.qr(torch.randn(d, d, generator=source, dtype=torch.float64))
        Q = Q * R.diagonal().sign()
        found.append(float((H * (Q @ S @ Q.mT)).sum() / scale))
    found = torch.tensor(found, dtype=torch.float64)
    deviation = noise_alignment(network(), x, labels, loss, 300, 1000, seed=0).null_deviation
    assert abs(float(found.mean()) - numbers["null"]) <= 4 * float(found.std()) / 2000**0.5
    assert float(found.std()) == pytest.approx(deviation.value, rel=0.12)


def test_blocks_give_what_one_block_gives(monkeypatch):
    """Noise held in small blocks forms fewer pairs, and is unbiased all the same."""
    _, _, numbers = aligned_truth(network())
    monkeypatch.setattr("droplens.dynamics._alignment._HELD", 17 * 10)
    found = noise_alignment(network(), x, labels, loss, 300, 1000, seed=0)
    for name, value in numbers.items():
        assert "hessian" in name or abs(z(getattr(found, name), value)) <= 4


class BatchNormed(nn.Module):
    """It normalises by the batch whatever mode it is in, and moves its statistics."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.register_buffer("mean", torch.zeros(3).double())
        self.register_buffer("variance", torch.ones(3).double())

    def forward(self, rows):
        hidden = F.batch_norm(self.net[0](rows), self.mean, self.variance, training=True)
        return self.net[1:](hidden)


def test_alignment_with_statistics_of_the_batch():
    """What is measured is the loss of the whole batch, whose examples then depend on each other."""
    net, rows, classes = BatchNormed(), randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    before = state_of(net)
    found = noise_alignment(net, rows, classes, loss, 8, 1000, seed=0)
    assert_same_state(before, state_of(net))
    H = dense_hessian(net, rows, classes, loss)
    assert found.trace_hessian.value == pytest.approx(float(H.trace()), rel=1e-9)
    assert found.norm_hessian.value == pytest.approx(float(H.norm()), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 4}, "even number of at least 8"),
        ({"probes": 2}, "probes has to be a whole number of at least 4"),
        ({"probes": 8.5}, "probes has to be a whole number of at least 4, but got 8.5"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise_alignment(network(), x, labels, loss, **arguments)


def written_draws(monkeypatch, draws):
    """Gradients of two tensors, one draw after the other, and the loss that hands them out."""
    rows = randn(draws, 7, seed=draws) + 3
    table = torch.ones(draws, dtype=torch.float64), torch.arange(float(draws)), rows
    written, order = WrittenLoss({frozenset("a"): table}), iter(range(draws))
    monkeypatch.setattr(_gradients, "fresh_masks", lambda source, names: (source, names))
    written.gradient = lambda: (float(k := next(order)), (rows[k, :3], rows[k, 3:]))
    return rows, written


@pytest.mark.parametrize("draws", [4, 12, 40, 50, 60])
def test_a_group_gives_what_all_its_pairs_give(monkeypatch, draws):
    """Where memory is short: equal groups of 2 to 5 draws, every pair within them in the mean."""
    rows, written = written_draws(monkeypatch, draws)
    monkeypatch.setattr(_gradients, "_HELD", 0)
    found = _gradients.gradients_under(written, "a", draws, None)
    size = draws // len(found.loss)
    assert size == {4: 2, 12: 2, 40: 4, 50: 5, 60: 5}[draws]
    for k, group in enumerate(rows.split(size)):
        gram = group @ group.mT
        signal = (gram.sum() - gram.trace()) / (size * (size - 1))
        assert float(found.signal[k]) == pytest.approx(float(signal), rel=1e-12)
        assert float(found.noise[k]) == pytest.approx(float(group.var(0).sum()), rel=1e-12)
        assert float(found.loss[k]) == (k * size + (size - 1) / 2)


@pytest.mark.parametrize("draws", [4, 12])
def test_all_draws_together_give_the_jackknife_of_all_pairs(monkeypatch, draws):
    """Pseudo-values by leaving each draw out in turn, products of all pairs one by one."""
    rows, written = written_draws(monkeypatch, draws)
    monkeypatch.setattr(_gradients, "_COLUMNS", 3)
    found = _gradients.gradients_under(written, "a", draws, None)

    def signal(group):
        k = len(group)
        return sum(group[a] @ group[b] for a in range(k) for b in range(k) if a != b) / k / (k - 1)

    whole = signal(rows)
    for k in range(draws):
        others = signal(torch.cat([rows[:k], rows[k + 1 :]]))
        assert float(found.signal[k]) == pytest.approx(
            float(draws * whole - (draws - 1) * others), rel=1e-10
        )
    assert found.mean_square().value == pytest.approx(float(whole), rel=1e-12)
    assert found.plug_in == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-12)
    assert found.mean(found.noise).value == pytest.approx(float(rows.var(0).sum()), rel=1e-12)
    assert found.loss.tolist() == list(range(draws))


def test_blocks_of_draws_are_measured_alike_and_put_together(monkeypatch):
    """15 draws in blocks of at most 7: three of 5, each as if alone."""
    rows, written = written_draws(monkeypatch, 15)
    monkeypatch.setattr(_gradients, "_BLOCK", 7)
    found = _gradients.gradients_under(written, "a", 15, None)
    signals, squares = [], []
    for block in rows.split(5):
        products = block @ block.mT
        signals.append(float(products.sum() - products.trace()) / 20)
        squares.append(float(block.mean(0).square().sum()))
    for k, signal in enumerate(signals):
        own = found.signal[5 * k : 5 * k + 5]
        assert float(own.mean()) == pytest.approx(signal, rel=1e-10)
    assert found.plug_in == pytest.approx(sum(squares) / 3)
    torch.testing.assert_close(found.noise, found.square - found.signal)
    assert found.mean_square().value == pytest.approx(sum(signals) / 3)
    assert found.mean_square().n == 15


def test_a_trace_has_its_error_however_small_the_blocks_are(monkeypatch):
    """Masks as in `network`: blocks of six lose no error that all pairs have."""
    for held in (200, 50, 6):
        monkeypatch.setattr(_gradients, "_BLOCK", held)
        found = dl.gradient_noise(network(sites=2), x, labels, loss, seed=0)
        assert found.notes == ()
        assert found.trace.standard_error > 0


def test_gradients_that_no_mask_moves_have_no_noise():
    """Units that are zero whatever the mask: exactly, though the products of gradients round."""
    net = network(activation=nn.ReLU).float()
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    found = dl.gradient_noise(net, x.float(), labels, loss, 40, seed=0)
    assert (found.trace.value, found.trace.standard_error) == (0, 0)
    assert found.signal.value > 0
    assert found.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("examples", [1, 2])
def test_intervals_cover_the_truth_at_their_level(monkeypatch, examples):
    """1,000 repeats of the default draws: each 95% interval holds the enumerated truth in 93–97%.

    Of both sites together, and of each alone.
    """
    net = network(sites=2)
    tables = {
        frozenset(names): gradients(net, x[:examples], labels[:examples], loss, only=names)
        for names in (("2", "5"), ("2",), ("5",))
    }
    traces = {
        names: float(covariance(weights, found).trace())
        for names, (weights, _, found) in tables.items()
    }
    both = frozenset(("2", "5"))
    weights, _, found = tables[both]
    mean = weights @ found
    monkeypatch.setattr(_gradients, "fresh_masks", lambda source, names: (source, names))
    monkeypatch.setattr(_noise, "MaskedLoss", lambda *_: WrittenLoss(tables))
    truths = {"trace": traces[both], "signal": float(mean @ mean)}
    covering = Covering(truths | {name: traces[frozenset((name,))] for name in ("2", "5")})
    for seed in range(1000):
        result = dl.gradient_noise(net, x, labels, loss, seed=seed)
        covering.add(result, result.by_site)
    covering.assert_at_level()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "sites", "units"),
    [(p, sites, 3) for p in (0.01, 0.05, 0.5, 0.8, 0.9) for sites in (1, 2)]
    + [(p, 1, 1) for p in (0.5, 0.45, 0.4)],
)
def test_on_one_example_few_runs_state_a_wrong_interval(monkeypatch, p, sites, units):
    """1,000 repeats of few units a site: of all at most 7%, stated or not.

    Rare masks make most of the noise at p near 0 and 1; the noise of one coin near p = 0.5 hardly
    moves with a draw, and eight runs in ten state it.
    """
    net = network(p, sites, units)
    weights, losses, found = table = gradients(net, x[:1], labels[:1], loss, units=units)
    mean, trace = weights @ found, float(covariance(weights, found).trace())
    signal = float(mean @ mean)
    written = WrittenLoss({frozenset("2"): table}, loss(net.eval()(x[:1]), labels[:1]).item())
    monkeypatch.setattr(_gradients, "fresh_masks", lambda source, names: (source, names))
    monkeypatch.setattr(_noise, "MaskedLoss", lambda *_: written)
    monkeypatch.setattr(_modified, "MaskedLoss", lambda *_: written)
    monkeypatch.setattr(_modified, "_closed_form", lambda *_: None)
    explicit, dropped = float(weights @ losses) - written.base, float(weights @ losses)
    parts = {"drift": 0.025 * signal, "diffusion": 0.025 * trace}
    implicit = sum(parts.values())
    parts |= {"explicit": explicit, "implicit": implicit, "total": dropped + implicit}
    covering = Covering({"trace": trace, "signal": signal} | parts)
    for seed in range(1000):
        noise = dl.gradient_noise(net, x, labels, loss, seed=seed)
        modified = dl.modified_loss(net, x, labels, loss, 0.1, seed=seed)
        covering.add(noise, modified)
        for one in (noise, modified):
            untold = [v for v in vars(one).values() if isinstance(v, Estimate)]
            assert bool(one.notes) == any(math.isnan(v.standard_error) for v in untold)
    covering.assert_few_wrong()
    if p == 0.5 and sites == 2:
        covering.assert_at_level()
    if units == 1:
        assert min(covering.stated.values()) >= 800, str(covering)


class Formed:
    """H, written out."""

    def __init__(self, matrix):
        self.size, self._matrix = len(matrix), matrix.numpy()

    def products(self, V):
        return self._matrix @ V


@pytest.mark.slow
@pytest.mark.parametrize(
    ("examples", "held", "probes"),
    [(1, 128, None), (2, 128, None), (1, 128, 1000), (2, 128, 1000)]
    + [(2, held, 1000) for held in (4, 8, 64)],
)
def test_the_alignments_intervals_cover_the_truth_at_their_level(
    monkeypatch, examples, held, probes
):
    """1,000 repeats: each 95% interval holds the dense matrices' value in 93–97%.

    At the default draws, held in blocks of 4, 8 and 64 pairs, and in one; with H formed, and
    at the default probes. Written out are H and the gradients under all masks. Small blocks form
    few pairs, so that some of them make most of ‖Σ‖ in more runs: 85% state its error.
    """
    # With more weights than default probes.
    units = 5 if probes else {1: 12, 2: 7}[examples]
    net = network(units=units, classes=2 if probes else 8)
    H, _, numbers = aligned_truth(net, units, examples)
    rows, classes = x[:examples], labels[:examples]
    weights, _, found = gradients(net, rows, classes, loss, units=units)

    exact = ["trace_hessian", "norm_hessian"] if probes == 1000 else []
    covering = Covering({name: v for name, v in numbers.items() if name not in exact})
    write_out(monkeypatch, H, weights, found, held)
    options = {} if probes is None else {"probes": probes}
    assert probes or len(H) > 64
    for seed in range(1000):
        result = noise_alignment(net, rows, classes, loss, seed=seed, **options)
        covering.add(result)
    for name in exact:
        assert getattr(result, name).value == pytest.approx(numbers[name], rel=1e-12)
        assert getattr(result, name).standard_error == 0
    covering.assert_at_level(0.85 if held < 64 else 0.9)


def write_out(monkeypatch, H, weights, found, held=128):
    """Put H, and gradients (M, d) of probabilities (M), in place of a network's."""

    def draw(masked, source):
        first, second = found[torch.multinomial(weights, 2, True, generator=source)]
        return (first - second) / math.sqrt(2)

    for name, instead in (
        ("_draw", draw),
        ("_HELD", len(H) * held),
        ("LossHessian", lambda *_: Formed(H)),
    ):
        monkeypatch.setattr(_alignment, name, instead)


OF_SHAPE = ("null", "null_deviation", "excess")


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 6])
def test_isotropic_noise_has_no_null_to_count_from(monkeypatch, d):
    """Random signs: Σ is I; its traces and its alignment are at their level."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    weights, B = torch.full((2**d,), 2.0**-d, dtype=torch.float64), randn(d, d, seed=7)
    H = B @ B.mT
    numbers = numbers_of(H, torch.eye(d, dtype=torch.float64))
    wanted = ("value", "trace_product", "trace_noise", "norm_noise")
    covering = Covering({name: numbers[name] for name in wanted})
    write_out(monkeypatch, H, weights, signs)
    untold = 0
    for seed in range(1000):
        result = noise_alignment(network(), x, labels, loss, probes=1000, seed=seed)
        covering.add(result)
        missing = [math.isnan(getattr(result, name).standard_error) for name in OF_SHAPE]
        assert missing == [bool(result.notes)] * 3
        untold += missing[0]
    assert untold >= 990
    assert "do not tell the noise from isotropic noise" in result.notes[0]
    covering.assert_at_level()


@pytest.mark.slow
@pytest.mark.parametrize(("p", "sites"), [(0.05, 2), (0.1, 1), (0.7, 2), (0.9, 1), (0.9, 2)])
def test_where_rare_masks_matter_few_alignments_state_a_wrong_interval(monkeypatch, p, sites):
    """1,000 repeats on one example: of all runs at most 7%, stated or not."""
    units = 5 if sites == 1 else 3
    net = network(p, sites, units)
    H, _, numbers = aligned_truth(net, units, 1)
    weights, _, found = gradients(net, x[:1], labels[:1], loss, units=units)
    exact = ("trace_hessian", "norm_hessian")
    covering = Covering({name: v for name, v in numbers.items() if name not in exact})
    write_out(monkeypatch, H, weights, found)
    for seed in range(1000):
        covering.add(noise_alignment(net, x[:1], labels[:1], loss, probes=1000, seed=seed))
    covering.assert_few_wrong()


@pytest.mark.slow
def test_the_alignment_of_units_that_seldom_fire_is_at_its_level(monkeypatch):
    """1,000 repeats; taking what pairs count twice off the alignment's error held it in 92%."""
    net = network(0.75, 1, 6, 3, nn.ReLU)
    H, _, numbers = aligned_truth(net, 6, 2)
    weights, _, found = gradients(net, x, labels, loss, units=6)
    exact = ("trace_hessian", "norm_hessian")
    covering = Covering({name: v for name, v in numbers.items() if name not in exact})
    write_out(monkeypatch, H, weights, found)
    for seed in range(1000):
        covering.add(noise_alignment(net, x, labels, loss, probes=1000, seed=seed))
    covering.assert_at_level()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_batches_add_up_to_that_of_all(reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 3)).double()
    x, y = torch.randn(11, 4, dtype=torch.float64), torch.randint(3, (11,))
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double(), reduction=reduction)
    whole = MaskedLoss(model, [Batch(x, y)], loss)
    parts = MaskedLoss(model, [Batch(x[:4], y[:4]), Batch(x[4:], y[4:])], loss)
    with masks_off(model):
        value, gradient = whole.gradient()
        total, summed = parts.gradient()
    assert total == pytest.approx(value, rel=1e-12)
    assert parts.examples == 11
    for one, other in zip(summed, gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
