"""What follows a site: found by the forward pass, through whatever keeps units apart."""

import math

import pytest
import torch
from torch import nn

from droplens import measure
from droplens.batches import as_batches
from droplens.measure._readers import readers


def images(n=5, channels=1):
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def vectors(n=6, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1))


def sequences(n=3, length=5, d=8):
    return torch.randn(n, length, d, generator=torch.Generator().manual_seed(1))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.drop, self.inner = (
            nn.Dropout(0.2),
            kind(8, 6, 2, dropout=0.3, batch_first=True, **options),
        )
        self.after = nn.Dropout(0.1)
        self.last = nn.Linear(12 if options else 6, 3)

    def forward(self, x):
        return self.last(self.after(self.inner(self.drop(x))[0][:, -1]))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.cell, self.last = nn.Dropout(0.2), nn.LSTMCell(8, 4), nn.Linear(4, 2)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(self.drop(x[:, t]), state)
        return self.last(state[0])


class Joined(nn.Module):
    """The site's units are the last three of seven that the layer reads."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 3), nn.Dropout(0.2), nn.Linear(7, 2)

    def forward(self, x):
        return self.last(torch.cat([x, torch.relu(self.drop(self.first(x)))], -1))


class Gated(nn.Module):
    """Two layers read the same units."""

    def __init__(self):
        super().__init__()
        self.drop, self.gate, self.up = nn.Dropout(0.2), nn.Linear(4, 3), nn.Linear(4, 5)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        h = self.drop(x)
        return self.last(torch.sigmoid(self.gate(h)) * self.up(h)[:, :3])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(x + self.drop(self.inner(x)))


class Product(nn.Module):
    def __init__(self, mix=False):
        super().__init__()
        self.drop, self.own, self.mix = nn.Dropout(0.2), nn.Parameter(torch.randn(4, 2)), mix

    def forward(self, x):
        h = self.drop(x)
        return (h.softmax(-1) if self.mix else h * 2) @ self.own


def found_in(model, x):
    torch.manual_seed(0)
    found, missing = readers(model, as_batches(x))
    return {name: own.layer for name, own in found.items()}, missing, found


def test_convolutions_through_norm_activation_and_pooling():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout2d(0.3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2, groups=2), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 3), nn.Dropout(0.1),
    )  # fmt: skip
    layers, missing, found = found_in(net, images())
    assert layers == {"1": "5", "6": "9"}
    assert missing == {"10": "no layer with weights reads its units"}
    net.eval()
    read = net[:5](images()).double().square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(found["1"].rms, read.detach(), rtol=1e-6, atol=0)
    assert found["1"].outgoing.shape == (12, 4)


def test_transposed_convolutions():
    net = nn.Sequential(nn.Dropout(0.3), nn.ConvTranspose2d(2, 4, 3, groups=1), nn.Flatten())
    layers, _, found = found_in(net, images(channels=2))
    assert layers == {"0": "1"}
    norms = net[1].weight.detach().double().square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(found["0"].outgoing.norm(dim=0), norms)


def test_attention_reads_by_queries_keys_and_values():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.LayerNorm(8), encoder)
    layers, missing, found = found_in(net, sequences())
    assert layers == {"1": "3.self_attn", "3.dropout": "3.linear2"}
    assert torch.equal(found["1"].outgoing, encoder.self_attn.in_proj_weight.detach().double())
    assert set(missing) == {"3.self_attn.attention", "3.dropout1", "3.dropout2"}
    assert missing["3.self_attn.attention"].startswith("its units are attention weights")
    assert "residual stream" in missing["3.dropout1"]


class Crossed(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.attention = nn.MultiheadAttention(8, 2, kdim=8, vdim=4, batch_first=True)

    def forward(self, x):
        return self.attention(x, self.drop(x), x[..., :4])[0]


def test_keys_alone_are_read_by_their_weights_alone():
    net = Crossed()
    layers, _, found = found_in(net, sequences())
    assert list(layers) == ["drop"]
    assert torch.equal(found["drop"].outgoing, net.attention.k_proj_weight.detach().double())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
def test_recurrent_layers_read_by_their_input_weights(kind, options):
    net = Recurrent(kind, **options)
    layers, missing, found = found_in(net, sequences())
    assert layers == {"drop": "inner", "after": "last"}
    assert "between the layers of one recurrent module" in missing["inner.dropout"]
    own = [net.inner.weight_ih_l0] + ([net.inner.weight_ih_l0_reverse] if options else [])
    assert torch.equal(found["drop"].outgoing, torch.cat(own).detach().double())


def test_cells():
    layers, _, _ = found_in(Cell(), sequences())
    assert layers["drop"] == "cell"


def test_units_among_others():
    net = Joined()
    layers, _, found = found_in(net, vectors())
    assert layers == {"drop": "last"}
    assert torch.equal(found["drop"].outgoing, net.last.weight[:, 4:].detach().double())
    read = torch.relu(net.first(vectors())).double().square().mean(0).sqrt()
    torch.testing.assert_close(found["drop"].rms, read.detach(), rtol=1e-6, atol=0)


def test_two_layers_read_together():
    net = Gated()
    layers, _, found = found_in(net, vectors())
    assert layers == {"drop": "gate + up"}
    both = torch.cat([net.gate.weight, net.up.weight]).detach().double()
    assert torch.equal(found["drop"].outgoing, both)


def test_products_with_a_parameter_and_units_that_mix():
    layers, _, found = found_in(Product(), vectors())
    assert layers == {"drop": "own"}
    assert found["drop"].outgoing.shape == (2, 4)
    assert found_in(Product(mix=True), vectors())[1] == {
        "drop": "softmax mixes them before a layer reads them"
    }
    assert "residual stream" in found_in(Residual(), vectors())[1]["drop"]


def test_batches_add_up():
    net, x = Joined(), vectors(12)
    whole, _ = readers(net, as_batches(x), spectra=True)
    parts, _ = readers(net, as_batches([x[:5], x[5:9], x[9:]]), spectra=True)
    torch.testing.assert_close(parts["drop"].rms, whole["drop"].rms)
    values = [torch.linalg.svdvals(r["drop"].factor[:, 1:]) for r in (whole, parts)]
    torch.testing.assert_close(values[1], values[0])
    features = torch.relu(net.first(x)).detach().double()
    torch.testing.assert_close(values[0], torch.linalg.svdvals(features), rtol=1e-6, atol=1e-9)


def test_scores_are_products_of_what_is_read_and_what_reads():
    net, x = Joined(), vectors()
    result = measure.equalization_by_site(net, x)
    read = torch.relu(net.first(x)).detach().double().square().mean(0).sqrt()
    expected = net.last.weight[:, 4:].detach().double().norm(dim=0) * read
    torch.testing.assert_close(result.by_site["drop"].scores, expected, rtol=1e-6, atol=0)
    assert result.layers == {"drop": "last"}
    assert result.missing == {}


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="model has to be a torch module, but got int"):
        measure.equalization_by_site(3, vectors())
    with pytest.raises(ValueError, match="inputs holds NaN or Inf"):
        measure.equalization_by_site(Joined(), vectors() * math.nan)
    broken = Joined()
    broken.last.weight.data[0, 5] = math.nan
    with pytest.raises(ValueError, match="outgoing holds NaN or Inf"):
        measure.equalization_by_site(broken, vectors())
