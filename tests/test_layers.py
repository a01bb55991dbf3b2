"""Weights that are computed from others: parametrisations, norms, pruning, DropConnect."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import droplens as dl
from droplens.layers import effective_weight

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

cross_entropy = nn.CrossEntropyLoss()
torch.manual_seed(0)
x = torch.randn(24, 6)
y = x[:, :3].argmax(1)


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda m: parametrize.register_parametrization(m, "weight", Halved()),
    "older weight_norm": nn.utils.weight_norm,
    "older spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruning twice": lambda m: [prune.random_unstructured(m, "weight", 0.3) for _ in range(2)],
    "DropConnect": lambda m: dl.nn.drop_connect(m, "weight", 0.3),
}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).eval()


def state_of(model):
    return copy.deepcopy([*model.state_dict().values()])


@pytest.mark.parametrize("way", WAYS)
def test_a_page_is_that_of_a_plain_network_with_the_same_weights(way):
    net, plain = network(), network()
    for layer in (0, 3):
        WAYS[way](net[layer])
    with torch.no_grad():
        for _ in range(400 if "spectral" in way else 1):  # until its iteration stands still
            net.train()(x)
        net.eval()(x)
        for layer in (0, 3):
            plain[layer].weight.copy_(net[layer].weight)
    assert not torch.equal(network()[0].weight, net[0].weight) or way == "DropConnect"
    found, expected = (
        dl.inspect(m, (x, y), cross_entropy, draws=2, directions=2, seed=0) for m in (net, plain)
    )
    assert found.layers == expected.layers == {"2": "3"}
    torch.testing.assert_close(found.equalization["2"].scores, expected.equalization["2"].scores)
    assert list(found.spectra) == list(expected.spectra) == ["0.weight", "3.weight"]
    for name, own in expected.spectra.items():
        torch.testing.assert_close(found.spectra[name].singular_values, own.singular_values)
        cover = expected.condensation[name]
        assert found.condensation[name].orientations == cover.orientations
        assert found.condensation[name].effective_ratio == pytest.approx(cover.effective_ratio)
    assert "ranks and directions of other weights" not in found.not_measured


@pytest.mark.parametrize("way", WAYS)
def test_measures_of_weights_name_the_layers(way):
    net = network()
    for layer in (0, 3):
        WAYS[way](net[layer])
    net(x)
    covers = dl.measure.condensation_by_layer(net, x)
    assert list(covers) == ["0.weight", "3.weight"]
    assert covers["0.weight"].outgoing == "3"
    assert list(dl.measure.ranks(net, x).weights) == ["0.weight", "3.weight"]


def test_a_weight_is_read_anew_and_nothing_moves():
    """A hook's tensor is that of the last pass; a spectral norm iterates when read in training."""
    stale = nn.utils.weight_norm(nn.Linear(3, 2))
    with torch.no_grad():
        stale.weight_g.mul_(3.0)
    lengths = effective_weight(stale, "weight").norm(dim=1)
    torch.testing.assert_close(lengths, stale.weight_g[:, 0].detach())
    for norm in (parametrizations.spectral_norm, nn.utils.spectral_norm):
        layer = norm(nn.Linear(6, 4)).train()
        before = state_of(layer)
        first = effective_weight(layer, "weight")
        assert all(map(torch.equal, before, state_of(layer)))
        assert torch.equal(first, effective_weight(layer.eval(), "weight"))
        assert not first.requires_grad


def test_drop_connect_on_a_normed_weight_is_not_masked():
    layer = parametrizations.weight_norm(nn.Linear(5, 4))
    whole = layer.weight.detach().clone()
    dl.nn.drop_connect(layer, "weight", 0.5).train()
    state = torch.get_rng_state()
    torch.testing.assert_close(effective_weight(layer, "weight"), whole)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in layer.modules())


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_recurrent_gates_have_the_weights_that_the_layer_multiplies_with(norm, name):
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, batch_first=True)
    expected = torch.cat([lstm.weight_ih_l0, lstm.weight_hh_l0], 1).detach().clone()
    norm(lstm, name)
    with torch.no_grad():
        for other, parameter in lstm.named_parameters():
            if other.endswith(("_g", "original0")):
                parameter.mul_(2.0)
    part = slice(0, 3) if "ih" in name else slice(3, 7)
    expected[:, part] *= 2
    (own,) = dl.measure.neurons(lstm)
    assert own.name == "weight_ih_l0"
    torch.testing.assert_close(own.weights, expected)


def test_kernels_and_attention_are_read_likewise():
    torch.manual_seed(0)
    up, heads = nn.ConvTranspose1d(2, 3, 2), nn.MultiheadAttention(4, 2)
    expected = [own.weights for m in (up, heads) for own in dl.measure.neurons(m)]
    parametrizations.weight_norm(up)
    parametrize.register_parametrization(heads, "in_proj_weight", Halved())
    found = [own.weights for m in (up, heads) for own in dl.measure.neurons(m)]
    torch.testing.assert_close(found[0], expected[0])
    for half, whole in zip(found[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(half, 0.5 * whole)


def test_two_computed_weights_that_read_one_site_count_together():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.2)
            self.a = parametrizations.weight_norm(nn.Linear(6, 3))
            self.b = parametrizations.weight_norm(nn.Linear(6, 3))

        def forward(self, x):
            h = self.drop(x)
            return self.a(h) + self.b(h)

    net = Twice()
    found = dl.measure.equalization_by_site(net, x)
    assert found.layers == {"drop": "a + b"}
    weights = torch.cat([net.a.weight, net.b.weight]).detach().double()
    torch.testing.assert_close(
        found.by_site["drop"].scores, weights.norm(dim=0) * x.double().square().mean(0).sqrt()
    )


def test_a_recorder_reads_the_weights_of_a_normed_network():
    net = network()
    parametrizations.weight_norm(net[0])
    recorder = dl.Recorder(
        net, (x, y), cross_entropy, metrics=("condensation", "rank"), every=1, budget=1
    )
    recorder.step()
    assert {"0.weight", "3.weight"} <= {entry.site for entry in recorder.history}
