"""Dropout inside C++ composites, other libraries' layers, and draws that have no name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import droplens as dl
from droplens.gates import draw_masks, masks_off, masks_replaced
from droplens.masks import Bernoulli, Path

x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
generator = torch.Generator().manual_seed(1)


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


RECURRENT = {
    "LSTM, three layers, both ways": (
        nn.LSTM(8, 6, 3, dropout=0.5, bidirectional=True, batch_first=True),
        [("dropout", "LSTM", (4, 5, 12)), ("dropout#2", "LSTM", (4, 5, 12))],
    ),
    "GRU, sequence first": (nn.GRU(8, 6, 2, dropout=0.5), [("dropout", "GRU", (4, 5, 6))]),
    "RNN, tanh": (nn.RNN(8, 6, 2, dropout=0.5), [("dropout", "RNN", (4, 5, 6))]),
    "RNN, ReLU, no bias": (
        nn.RNN(8, 6, 2, nonlinearity="relu", bias=False, dropout=0.5),
        [("dropout", "RNN", (4, 5, 6))],
    ),
    "one layer drops nowhere": (nn.GRU(8, 6, 1), []),
    "rate zero": (nn.LSTM(8, 6, 2, dropout=0.0), []),
}


@pytest.mark.parametrize("case", RECURRENT.values(), ids=RECURRENT.keys())
def test_dropout_between_recurrent_layers(case):
    model, expected = case
    found = dl.sites(model.eval(), x)
    assert [(s.name, s.kind, s.shape) for s in found] == expected
    assert all(s.law == Bernoulli(0.5) and not s.active for s in found)
    with masks_off(model):
        outputs, state = model(x)
    plain, plain_state = model(x)
    torch.testing.assert_close(outputs, plain)
    for ours, torchs in zip(state, plain_state, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_recurrent_masks_follow_the_law_of_torch():
    """Mean and variance over masks, ours against torch's own training passes: z-bound of 6."""
    torch.manual_seed(0)
    model = nn.GRU(8, 4, 2, dropout=0.5, batch_first=True)
    draws = 2000
    batch = x[:1].expand(draws, -1, -1)
    with torch.no_grad():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            theirs = model.train()(batch)[0][:, -1, 0]
        with masks_replaced(model, draw_masks(torch.Generator().manual_seed(4))):
            ours = model(batch)[0][:, -1, 0]
    for statistic in (lambda v: v, lambda v: (v - theirs.mean()).square()):
        a, b = statistic(theirs), statistic(ours)
        error = ((a.var() + b.var()) / draws).sqrt()
        assert float((a.mean() - b.mean()).abs()) <= 6 * float(error)


def test_packed_sequences():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 6, 2, dropout=0.5, batch_first=True)

        def forward(self, sequences):
            packed = nn.utils.rnn.pack_padded_sequence(sequences, [5, 4, 2, 1], batch_first=True)
            return self.lstm(packed)[1][0][-1]

    model = Packed().eval()
    assert [(s.name, s.shape) for s in dl.sites(model, x)] == [("lstm.dropout", (12, 6))]
    with masks_off(model):
        torch.testing.assert_close(model(x), model.eval()(x))


class Attends(nn.Module):
    """Attention of given options at rate 0.2, whatever the mode."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k):
        rate = 0.2 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, k, dropout_p=rate, **self.options)


q = torch.randn(2, 4, 5, 8, generator=generator)
k = torch.randn(2, 4, 6, 8, generator=generator)
seen = torch.rand(2, 1, 5, 6, generator=generator) > 0.4
seen[0, 0, 2] = False  # a query that may attend to nothing
ATTENTION = {
    "plain": ({}, k),
    "causal": ({"is_causal": True}, k),
    "scale": ({"scale": 0.7}, k),
    "boolean mask": ({"attn_mask": seen}, k),
    "additive mask": ({"attn_mask": torch.randn(5, 6, generator=generator)}, k),
    "grouped queries": ({"enable_gqa": True}, k[:, :2]),
}


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
def test_attention_weights_are_a_site_and_the_arithmetic_is_torchs(case):
    options, keys = case
    model = Attends(**options).eval()
    (site,) = dl.sites(model, (q, keys))
    assert (site.name, site.kind) == ("attention", "F.scaled_dot_product_attention")
    assert (site.law, site.shape, site.active) == (Bernoulli(0.2), (2, 4, 5, 6), False)
    with masks_off(model):
        ours = model(q, keys)
    theirs = F.scaled_dot_product_attention(q, keys, keys, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_transformer_encoder_names_every_site():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    names = [s.name for s in dl.sites(model, x)]
    per_layer = ["self_attn.attention", "dropout1", "dropout", "dropout2"]
    assert names == [f"layers.{i}.{name}" for i in range(2) for name in per_layer]
    with masks_off(model):
        ours = model(x)
    torch.testing.assert_close(ours, model.eval()(x), atol=1e-5, rtol=1e-4)


def test_a_transformer_decoder_with_cross_attention():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    found = dl.sites(layer, (x, x[:, :3]))
    assert len(found) == 6
    assert {s.law for s in found} == {Bernoulli(0.1)}


def test_random_numbers_with_no_dropout_name_are_caught_by_the_net():
    class Own(nn.Module):
        def forward(self, h):
            return h * (torch.rand_like(h) > 0.3) / 0.7 if self.training else h

    (site,) = dl.sites(Own().eval(), x)
    assert site.law is None
    assert not site.active
    assert "it draws random numbers by rand_like, outside any dropout call" in site.reason


class DropPath(nn.Module):
    """As timm writes it."""

    def __init__(self, drop_prob, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, h):
        raise AssertionError("never run: the mask takes its place")


class StochasticDepth(nn.Module):
    """As torchvision writes it."""

    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, h):
        raise AssertionError("never run: the mask takes its place")


class DropBlock2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.1

    def forward(self, h):
        raise AssertionError("never run: the mask takes its place")


@pytest.mark.parametrize(
    ("layer", "law", "reason"),
    [
        (DropPath(0.2), Path(0.2), None),
        (DropPath(0.2, scale_by_keep=False), None, "biased"),
        (StochasticDepth(0.3, "row"), Path(0.3), None),
        (StochasticDepth(0.3, "batch"), None, "one coin for the whole batch"),
        (DropBlock2d(), None, "rescales by the mask it happened to draw"),
    ],
    ids=["DropPath", "unscaled", "row", "batch", "DropBlock"],
)
def test_other_libraries_layers_are_known_by_name(layer, law, reason):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    (site,) = dl.sites(model, x)
    assert (site.name, site.kind, site.law) == ("1", type(layer).__name__, law)
    assert reason is None or reason in site.reason
    assert "forward" not in vars(layer)


def test_a_layer_of_ones_own_is_registered():
    class MyDrop(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate = rate

        def forward(self, h):
            raise AssertionError("never run: the mask takes its place")

    class Child(MyDrop):
        pass

    dl.register_site(MyDrop, lambda module: Bernoulli(module.rate))
    assert dl.sites(MyDrop(0.3), x)[0].law == Bernoulli(0.3)
    assert dl.sites(Child(0.4).eval(), x)[0].law == Bernoulli(0.4)
    dl.register_site(MyDrop, lambda module: None)
    assert dl.sites(MyDrop(0.3), x)[0].reason == "its registered law is None"


def test_registration_refuses_what_is_not_a_module_or_a_function():
    with pytest.raises(TypeError, match="module_type has to be a class of modules"):
        dl.register_site(int, lambda module: None)
    with pytest.raises(TypeError, match="to_law has to be a function of the module"):
        dl.register_site(nn.Identity, None)
