"""One network inspected: numbers that agree with their rooms, nothing lost, nothing left behind."""

import html
import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import droplens as dl
from droplens.batches import as_batches
from droplens.measure._readers import readers
from droplens.measure._reading import outgoing_channels
from tests.discovery.test_sites import assert_same_state, state_of

loss = nn.CrossEntropyLoss()


def network(p=0.5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Dropout(p), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(p),
        nn.Linear(8, 3),
    )  # fmt: skip


def data(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def quick(model, given, **options):
    return dl.inspect(model, given, loss, draws=20, directions=2, seed=0, **options)


def test_numbers_are_those_of_the_rooms():
    net, (x, y) = network(), data()
    found = quick(net, (x, y))
    with torch.no_grad():
        assert found.cost.gaussian == pytest.approx(float(dl.penalty(net, x, loss)), rel=1e-5)
        assert found.cost.second_order == pytest.approx(
            float(dl.penalty(net, x, loss, "second_order")), rel=1e-5
        )
        assert found.base == pytest.approx(float(loss(net.eval()(x), y)), rel=1e-5)
    assert found.cost.base.value == pytest.approx(found.base, rel=1e-5)
    assert [site.name for site in found.sites] == ["2", "5"]
    assert list(found.cost.by_site) == list(found.equalization) == ["2", "5"]
    assert found.layers == {"2": "3", "5": "6"}
    assert list(found.spectra) == ["0.weight", "3.weight", "6.weight"]
    hidden = torch.relu(net[0](x))
    expected = dl.measure.equalization(net[3].weight, hidden, rows="examples")
    torch.testing.assert_close(found.equalization["2"].scores, expected.scores)
    assert float(found.fisher.trace) == pytest.approx(
        float(dl.measure.fisher(net, (x, y), loss).trace), rel=1e-5
    )
    assert found.accuracy == pytest.approx(float((net.eval()(x).argmax(1) == y).float().mean()))
    assert found.examples == 40


def test_batches_give_the_numbers_of_the_whole():
    net, (x, y) = network(), data()
    whole = quick(net, (x, y))
    parts = quick(net, DataLoader(TensorDataset(x, y), batch_size=15))
    assert parts.cost.gaussian == pytest.approx(whole.cost.gaussian, rel=1e-5)
    assert parts.cost.by_site["5"].second_order == pytest.approx(
        whole.cost.by_site["5"].second_order, rel=1e-5
    )
    assert parts.base == pytest.approx(whole.base, rel=1e-5)
    torch.testing.assert_close(
        parts.equalization["2"].scores, whole.equalization["2"].scores, rtol=1e-5, atol=0
    )
    distance = parts.cost.gap.value - whole.cost.gap.value
    error = (parts.cost.gap.standard_error**2 + whole.cost.gap.standard_error**2) ** 0.5
    assert abs(distance) <= 5 * error


def test_a_sum_of_terms_is_not_averaged_over_batches():
    net, (x, y) = network(), data()
    summed = nn.CrossEntropyLoss(reduction="sum")
    found = dl.inspect(net, DataLoader(TensorDataset(x, y), 15), summed, draws=5, directions=1)
    with torch.no_grad():
        assert found.cost.gaussian == pytest.approx(float(dl.penalty(net, x, summed)), rel=1e-5)
        assert found.base == pytest.approx(float(summed(net.eval()(x), y)), rel=1e-5)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_network_is_left_as_it_was(mode):
    net = network().train(mode)
    weights = [p.detach().clone() for p in net.parameters()]
    before = state_of(net)
    quick(net, data())
    assert_same_state(before, state_of(net))
    assert all(map(torch.equal, weights, net.parameters()))


def test_a_seed_repeats_and_fresh_calls_differ():
    first, second = quick(network(), data()), quick(network(), data())
    assert first.cost == second.cost
    assert torch.equal(first.flatness.values, second.flatness.values)
    fresh = dl.inspect(network(), data(), loss, draws=20, directions=2)
    assert fresh.seed != first.seed
    assert fresh.cost.gap != first.cost.gap


def test_a_site_that_drops_everything_is_named_and_the_rest_measured(tmp_path):
    net = network()
    net[2].p = 1.0
    found = quick(net, data())
    assert found.cost is None
    assert "p = 1 at '2': every unit is dropped" in found.not_measured["cost of dropout"]
    assert set(found.equalization) == {"2", "5"}
    found.to_html(tmp_path / "page.html")
    beside = dl.compare({"closed": net, "open": network(seed=1)}, data(), loss, draws=20, seed=0)
    assert any("p = 1 at '2'" in why for why in beside.not_measured.values())


def test_a_model_without_dropout_still_has_a_page_that_says_so(tmp_path):
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    found = quick(net, data())
    assert found.cost is None
    assert found.not_measured["cost of dropout"] == (
        "the forward pass meets no dropout whose law is known"
    )
    page = found.to_html(tmp_path / "page.html")
    assert "meets no dropout at all" in page.read_text("utf-8")
    assert "meets no dropout whose law is known" in str(found)


def test_a_site_without_a_law_is_named_and_the_rest_is_measured():
    net = nn.Sequential(nn.Linear(6, 8), nn.AlphaDropout(0.2), nn.Dropout(0.2), nn.Linear(8, 3))
    found = quick(net, data())
    assert "no mask" in found.not_measured["site 1"]
    assert list(found.cost.by_site) == ["2"]


def test_page_and_twin_say_the_same(tmp_path):
    found = quick(network(), data())
    page = found.to_html(tmp_path / "page.html")
    twin = json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert twin["kind"] == "inspection"
    assert twin["numbers"]["cost"]["gap"]["value"] == found.cost.gap.value
    assert twin["numbers"]["fisher"]["trace"]["value"] == found.fisher.trace.value
    assert twin["seed"] == 0
    assert page.stat().st_size < 2_000_000
    shown = html.unescape(found._repr_html_())
    for verdict in found.verdicts:
        assert verdict.sentence in shown
        assert verdict.sentence.split()[0] in str(found)


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    found = quick(network(), data())
    with pytest.raises(OSError, match="missing"):
        found.to_html(tmp_path / "missing" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_squared_loss_has_its_own_unit():
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Linear(4, 2))
    x, _ = data()
    found = dl.inspect(net, (x, x[:, :2]), nn.MSELoss(), draws=10, directions=1, seed=0)
    assert found.unit == "units of the loss"
    assert found.accuracy is None
    assert found.cost.gaussian == pytest.approx(found.cost.second_order, rel=1e-6)


class NaNWeight(nn.Sequential):
    def __init__(self):
        super().__init__(*network())
        nn.init.constant_(self[3].weight, torch.nan)


x, y = data()
BAD = {
    "NaN data": (network(), (x * torch.nan, y), loss, ValueError, "inputs holds NaN or Inf"),
    "Inf data": (network(), (x + torch.inf, y), loss, ValueError, "inputs holds NaN or Inf"),
    "NaN weight": (NaNWeight(), (x, y), loss, ValueError, r"weight '3\.weight' holds NaN"),
    "label": (network(), (x, y + 1), loss, ValueError, "the label 3, but the outputs have 3 class"),
    "empty": (network(), (x[:0], y[:0]), loss, ValueError, "inputs is empty"),
    "empty loader": (network(), [], loss, ValueError, "data is empty"),
    "no targets": (network(), x, loss, ValueError, "data has no targets"),
    "unknown loss": (network(), (x, y), nn.L1Loss(), TypeError, "loss L1Loss is not one whose"),
    "forward raises": (
        network(), (x[:, :5], y), loss, RuntimeError, "forward raised RuntimeError: mat1"
    ),
    "unequal": (network(), (x, y[:3]), loss, ValueError, "inputs has 40 examples but targets"),
    "not data": (network(), 7, loss, TypeError, "data has to be a tensor, a pair"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_gives_one_clear_error(case):
    model, given, criterion, error, message = case
    before = state_of(model)
    with pytest.raises(error, match=message):
        dl.inspect(model, given, criterion, draws=5, directions=1)
    assert_same_state(before, state_of(model))


def test_readers_through_flatten_and_of_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Dropout(0.2), nn.ReLU(), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(6 * 16, 3),
    )  # fmt: skip
    images = torch.randn(5, 1, 4, 4)
    found, missing = readers(net, as_batches((images, torch.zeros(5, dtype=torch.long))))
    assert {name: reader.layer for name, reader in found.items()} == {"2": "3", "4": "8", "6": "8"}
    assert missing == {}
    channels = torch.relu(net[0](images))
    expected = channels.double().square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(found["2"].rms, expected.detach(), rtol=1e-6, atol=0)
    assert found["6"].outgoing.shape == (3, 96)


def test_outgoing_weights_of_a_grouped_convolution():
    """Column i holds every weight that multiplies input channel i."""
    conv = nn.Conv1d(4, 6, 3, groups=2, bias=False)
    columns = outgoing_channels(conv.weight.detach(), 2, 4)
    for channel in range(4):
        impulse = torch.zeros(1, 4, 5)
        impulse[0, channel, 2] = 1
        energy = conv(impulse).square().sum()
        torch.testing.assert_close(columns[:, channel].square().sum(), energy.detach())


def test_measures_on_request_join_the_result_the_page_and_the_twin(tmp_path):
    found = quick(network(), data(), measures=["hessian"])
    assert len(found.extras["hessian"].top_eigenvalues) == 5
    assert "hessian" not in found.not_measured
    page = found.to_html(tmp_path / "page.html")
    twin = json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert twin["numbers"]["extras"]["hessian"]["trace"]["value"] == float(
        found.extras["hessian"].trace
    )
    assert "more closely" in html.unescape(page.read_text("utf-8"))
    plain = quick(network(), data())
    assert plain.extras == {}
    assert plain.not_measured["hessian"].startswith("not asked for; measures=('hessian',) gives")


def test_a_trace_that_is_known_badly_says_so_on_the_page(tmp_path):
    found = quick(network(), data())
    notes = found.hessian.notes
    assert any("in place of 16 would make that 5%" in note for note in notes)
    page = html.unescape(found.to_html(tmp_path / "page.html").read_text("utf-8"))
    twin = json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert twin["numbers"]["hessian"]["notes"] == list(notes)
    assert all(note in page for note in notes)


def test_sets_are_compared_on_request_too():
    sets = {"a": network(), "b": network(seed=1)}
    found = dl.compare(
        sets, data(), loss, draws=5, directions=1, measures=("hessian", "hessian"), seed=0
    )
    assert all("hessian" in each.extras for (each,) in found.sets.values())
    assert any("more closely" in part.title for part in found.to_document().sections)
    assert "hessian" not in found.not_measured


@pytest.mark.parametrize(
    ("measures", "error", "message"),
    [
        (("hesian",), ValueError, "measures holds 'hesian', which is none of 'hessian'"),
        ("hessian", TypeError, "has to be a sequence of names .* but got 'hessian'"),
        (3, TypeError, "has to be a sequence of names .* but got 'int'"),
    ],
)
def test_unknown_measures_are_refused(measures, error, message):
    with pytest.raises(error, match=message):
        quick(network(), data(), measures=measures)


def test_every_measure_on_request_has_a_section(tmp_path):
    names = ("expected_hessian", "spectral_density", "fisher_spectrum", "expected_fisher", "plane")
    found = quick(network(), data(), measures=names)
    assert set(found.extras) == set(names)
    page = html.unescape(found.to_html(tmp_path / "page.html").read_text("utf-8"))
    for title in (
        "curved is the loss under dropout", "curvatures spread", "do the data determine",
        "weights, under dropout", "landscape look like",
    ):  # fmt: skip
        assert title in page
    twin = json.loads((tmp_path / "page.json").read_text("utf-8"))["numbers"]
    assert twin["extras"]["expected_hessian"]["masks"] == "expected"
    assert "eigenvectors" not in twin["extras"]["expected_hessian"]
    assert len(twin["extras"]["plane"]["loss"]) == 11


def test_flatness_under_masks_and_sharpness_join_by_default():
    found = quick(network(), data())
    assert found.expected_flatness.masks == "expected"
    assert found.expected_flatness.draws == 8
    assert found.sharpness.raw[0].n == 2
    twin = found.to_dict()["numbers"]
    assert twin["sharpness"]["scale_free"][0]["value"] == found.sharpness.scale_free[0].value
    assert twin["expected_flatness"]["masks"] == "expected"
    plain = quick(nn.Sequential(nn.Linear(6, 3)), data())
    assert plain.expected_flatness is None
    assert plain.not_measured["flatness under masks"] == (
        "the network drops nothing whose law is known"
    )
