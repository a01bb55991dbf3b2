"""The measures of geometry, on request, through inspect, compare, the page and the JSON."""

import json

import pytest
import torch
from torch import nn

import droplens as dl
from droplens import measure
from droplens.inspection import _geometry

NAMES = ("curvature", "orientations", "ranks", "shrinkage")


def network(p=0.5, seed=0, out=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(p), nn.Linear(5, out))


def examples(n=30):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def regression(n=30):
    x, _ = examples(n)
    return x, torch.randn(n, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", autouse=True)
def little():
    """Fewer passes than a page takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_geometry, "_DIRECTIONS", 3)
        patch.setattr(_geometry, "_MASKS", 2)
        patch.setattr(_geometry, "_SLICE", 5)
        patch.setattr(_geometry, "_EXAMPLES", 12)
        yield


@pytest.fixture(scope="module")
def inspection(little):
    return dl.inspect(
        network(), regression(), nn.MSELoss(), draws=5, directions=2, seed=0, measures=NAMES
    )


def test_results_are_those_of_the_measures(inspection):
    model, data = network(), regression()
    assert set(inspection.extras) == set(NAMES)
    own = measure.condensation_by_layer(model, data)
    found = inspection.extras["orientations"].layers
    assert {name: layer.cover.orientations for name, layer in found.items()} == {
        name: layer.cover.orientations for name, layer in own.items()
    }
    values = measure.ranks(model, data).predictions.singular_values
    torch.testing.assert_close(inspection.extras["ranks"].predictions.singular_values, values)
    assert inspection.extras["shrinkage"].distance == pytest.approx(
        measure.prediction_spectrum(model, data).distance
    )
    both = inspection.extras["curvature"]
    assert set(both.plain) == set(both.averaged) == {"e", "m"}
    inputs = data[0][:12]
    again = measure.curvature(model, inputs, nn.MSELoss(), "e", 3, parameters=5, seed=0)
    assert both.plain["e"].intrinsic.value == pytest.approx(again.intrinsic.value)
    assert len(both.averaged["e"].values) == 3


def test_page_and_json_tell_them(inspection, tmp_path):
    page = inspection.to_html(tmp_path / "page.html").read_text()
    for title in (
        "How curved is the manifold of predictions?",
        "Where do the neurons point?",
        "Of what rank are features and predictions?",
        "Did dropout shrink the predictions as theory has it?",
        "Direction and amplitude of the neurons of 0.weight",
    ):
        assert title in page
    numbers = json.loads((tmp_path / "page.json").read_text())["numbers"]["extras"]
    assert set(numbers) == set(NAMES)
    assert numbers["shrinkage"]["distance"] == pytest.approx(
        inspection.extras["shrinkage"].distance
    )


def test_refusals_stand_on_the_page_with_their_reasons():
    found = dl.inspect(
        network(), examples(), nn.CrossEntropyLoss(), draws=5, directions=2, seed=0, measures=NAMES
    )
    assert "real-valued targets" in found.not_measured["shrinkage"]
    assert set(found.extras) == {"curvature", "orientations", "ranks"}


def test_networks_side_by_side():
    sets = {"with": [network(0.5, 0), network(0.5, 1)], "without": network(0.0, 2)}
    found = dl.compare(
        sets,
        regression(),
        nn.MSELoss(),
        draws=5,
        directions=2,
        seed=0,
        measures=("orientations", "ranks", "curvature"),
    )
    told = [section.title for section in found.to_document().sections]
    assert "How curved is the manifold of predictions?" in told
    plain, bare = found.sets["with"][0], found.sets["without"][0]
    assert plain.extras["curvature"].averaged
    assert not bare.extras["curvature"].averaged


def test_attention_and_recurrent_weights_are_told_by_default():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
            self.inner, self.last = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            h = self.attention(x, x, x)[0]
            return self.last(self.inner(h)[0][:, -1])

    torch.manual_seed(0)
    x = torch.randn(12, 3, 4)
    found = dl.inspect(Net(), (x, examples(12)[1]), nn.CrossEntropyLoss(), draws=3, directions=2)
    names = [f"attention.in_proj_weight[{part}]" for part in "qkv"]
    names += ["attention.out_proj.weight", "inner.weight_ih_l0", "last.weight"]
    assert list(found.condensation) == names
    assert list(found.spectra) == names
    assert "ranks and directions of other weights" not in found.not_measured
