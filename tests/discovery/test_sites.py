"""Every dropout that a forward pass meets is found, named, and nothing is left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import droplens as dl
from droplens.discovery import guarded, intercept, switch_on
from droplens.masks import Bernoulli, Channel


class Everything(nn.Module):
    """One of each kind, some called twice, one hard-wired on and one hard-wired off."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop2d = nn.Dropout2d(0.1)
        self.drop = nn.Dropout(0.2)
        self.alpha = nn.AlphaDropout(0.3)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        h = self.drop2d(self.norm(self.conv(x)))
        h = self.drop(h)
        h = F.dropout1d(h.flatten(2), 0.15, self.training)
        h = self.drop(h)
        h = F.dropout(h, 0.25, training=self.training)
        h = F.dropout(h, p=0.35)
        h = F.dropout(h, 0.4, training=False)
        h = torch.dropout(h, 0.45, self.training)
        h = self.alpha(h)
        return self.head(h.flatten(1))


EXPECTED = [
    ("drop2d", "Dropout2d", Channel(0.1), (2, 4, 4, 4), False),
    ("drop", "Dropout", Bernoulli(0.2), (2, 4, 4, 4), False),
    ("dropout1d", "F.dropout1d", Channel(0.15), (2, 4, 16), False),
    ("drop#2", "Dropout", Bernoulli(0.2), (2, 4, 16), False),
    ("dropout", "F.dropout", Bernoulli(0.25), (2, 4, 16), False),
    ("dropout#2", "F.dropout", Bernoulli(0.35), (2, 4, 16), True),
    ("dropout#3", "F.dropout", None, (2, 4, 16), False),
    ("dropout#4", "torch.dropout", Bernoulli(0.45), (2, 4, 16), False),
    ("alpha", "AlphaDropout", None, (2, 4, 16), False),
]


def test_every_kind_of_dropout_is_found_with_name_law_shape_and_activity():
    found = dl.sites(Everything().eval(), torch.randn(2, 1, 4, 4))
    assert [(s.name, s.kind, s.law, s.shape, s.active) for s in found] == EXPECTED
    reasons = {s.name: s.reason for s in found}
    assert "stays off in train mode too" in reasons["dropout#3"]
    assert "no mask" in reasons["alpha"]
    assert reasons["drop"] is None


def test_activity_is_that_of_the_mode_the_model_came_in():
    model = Everything().train()
    model.drop2d.eval()
    active = {s.name: s.active for s in dl.sites(model, torch.randn(2, 1, 4, 4))}
    assert not active["drop2d"]
    assert active["drop"]
    assert active["dropout"]
    assert not active["dropout#3"]


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [buffer.clone() for buffer in model.buffers()],
        torch.get_rng_state(),
        [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ],
        [parameter.grad for parameter in model.parameters()],
    )


def assert_same_state(before, after):
    assert before[0] == after[0]
    assert all(map(torch.equal, before[1], after[1]))
    assert torch.equal(before[2], after[2])
    assert before[3] == after[3]
    assert all(a is b for a, b in zip(before[4], after[4], strict=True))


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_nothing_is_left_behind(mode):
    model = Everything()
    model.train(mode != "eval")
    if mode == "mixed":
        model.norm.eval()
        model.drop.eval()
    before = state_of(model)
    dl.sites(model, torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert_same_state(before, state_of(model))


class Raises(Everything):
    def forward(self, x):
        self.drop(self.norm(self.conv(x)))
        torch.rand(3)
        raise RuntimeError("the forward is broken")


def test_nothing_is_left_behind_when_the_forward_raises():
    model = Raises().eval()
    before = state_of(model)
    override_check = F.has_torch_function
    with pytest.raises(RuntimeError, match="the forward is broken"):
        dl.sites(model, torch.zeros(2, 1, 4, 4))
    assert_same_state(before, state_of(model))
    assert F.has_torch_function is override_check


def test_buffers_that_a_forward_writes_are_restored():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            self.calls += 1
            return self.drop(x)

    model = Counts()
    assert len(dl.sites(model, torch.ones(2, 2))) == 1
    assert float(model.calls) == 0


def test_a_flag_is_set_module_by_module_not_through_train():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def train(self, mode=True):
            raise AssertionError("the caller's train() is its own business")

        def forward(self, x):
            return self.drop(x)

    assert dl.sites(Frozen(), torch.ones(1, 2))[0].law == Bernoulli(0.5)


def test_a_model_without_dropout_has_no_sites():
    assert dl.sites(nn.Linear(2, 2), torch.ones(1, 2)) == ()


def test_channel_dropout_without_a_batch_axis_has_no_law():
    site = dl.sites(nn.Dropout1d(0.5), torch.ones(3, 4))[0]
    assert site.law is None
    assert "no batch axis" in site.reason


def test_attention_inside_a_composite_is_found_once():
    model = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
    x = torch.randn(3, 5, 8)
    found = dl.sites(model, (x, x, x))
    assert [(s.name, s.law, s.shape) for s in found] == [("dropout", Bernoulli(0.1), (6, 5, 5))]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(0, 3), ValueError, "inputs is empty"),
        (torch.tensor([[float("nan")]]), ValueError, "inputs holds NaN or Inf"),
        (torch.tensor([[float("inf")]]), ValueError, "inputs holds NaN or Inf"),
        ("digits", TypeError, "inputs has to be a tensor, a tuple or a mapping of tensors"),
    ],
    ids=["empty", "nan", "inf", "not a tensor"],
)
def test_bad_inputs_are_named(inputs, error, message):
    with pytest.raises(error, match=message):
        dl.sites(nn.Dropout(0.5), inputs)


def test_inputs_as_tuple_and_mapping():
    class Two(nn.Module):
        def forward(self, a, b):
            return F.dropout(a + b, 0.5, self.training)

    ones = torch.ones(2, 3)
    assert len(dl.sites(Two(), (ones, ones))) == 1
    assert len(dl.sites(Two(), {"a": ones, "b": ones})) == 1


def test_the_visitor_decides_what_a_call_returns():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.2))
    with guarded(model), intercept(model, lambda call, x: x + 1):
        switch_on(model)
        assert torch.equal(model(torch.zeros(2)), torch.full((2,), 2.0))
    assert torch.equal(model.eval()(torch.zeros(2)), torch.zeros(2))


@pytest.mark.parametrize("p", [float("nan"), 1.5, -0.1])
def test_an_impossible_rate_names_its_site(p):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[1].p = p  # torch checks it only when the layer is built
    with pytest.raises(ValueError, match=r"site '1': dropout probability has to be between 0 and"):
        dl.sites(model, torch.ones(1, 2))


def test_a_law_that_does_not_fit_names_its_site():
    model = nn.Sequential(nn.Linear(2, 5), dl.nn.GroupedDropout(0.5, 2))
    with pytest.raises(ValueError, match="site '1': size has to divide the last unit axis"):
        dl.decompose(model, torch.ones(1, 2), torch.tensor([0]), nn.CrossEntropyLoss(), 2)
