"""What a penalty refuses, and what it takes that might have been refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import droplens as dl
from droplens.dynamics import averaged
from droplens.gates import open_gates
from tests.penalties.test_penalty import METHODS, cross_entropy, deep_network, labels, randn, x
from tests.reference import softmax_hessian

ALL = [*METHODS, "sampled", "masks"]


def price(net, method="gaussian", inputs=x, loss=cross_entropy, **options):
    drawn = {"seed": 0} if method in ("sampled", "masks") else {}
    return dl.penalty(net, inputs, loss, method, **drawn, **options)


class Tail(nn.Module):
    """Linear, something around a dropout, linear."""

    def __init__(self, around, wrap=lambda outputs: outputs):
        super().__init__()
        torch.manual_seed(0)
        self.around, self.wrap = around, wrap
        self.first, self.drop, self.last = nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.wrap(self.last(self.around(self, self.first(inputs))))


def plain(m, h):
    return m.drop(h).relu() + 1


def written_after(m, h):
    dropped = m.drop(h)
    dropped *= 2
    return F.relu_(dropped) * 0.5 + 1


def written_by_the_dropout(m, h):
    return F.dropout(h, 0.3, m.training, inplace=True).relu() + 1


def input_written_after(m, h):
    dropped = m.drop(h)
    h.add_(1)
    return dropped


def input_of_a_weight_written_after(m, h):
    bent = torch.tanh(h).detach()
    out = F.linear(bent, m.drop_connected.weight)
    bent.mul_(2)
    return out


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("around", [written_after, written_by_the_dropout])
def test_in_place_operations_behind_a_site_change_nothing(method, around):
    net, other = Tail(around).double(), Tail(plain).double()
    found, expected = (price(each, method, x.clone()) for each in (net, other))
    torch.testing.assert_close(found.total, expected.total)
    for each, twin in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(found.total, each, retain_graph=True)[0],
            torch.autograd.grad(expected.total, twin, retain_graph=True)[0],
        )


@pytest.mark.parametrize("method", [*METHODS, "sampled"])
def test_a_site_whose_input_is_written_into_is_refused(method):
    net = Tail(input_written_after).double()
    with pytest.raises(ValueError, match="writes into a tensor that its derivatives need, such as"):
        price(net, method)
    assert float(price(net, "masks")) > 0  # no derivative, no harm


def test_a_weight_whose_factor_is_written_into_is_refused():
    net = Tail(input_of_a_weight_written_after)
    net.drop_connected = dl.nn.drop_connect(nn.Linear(4, 4), "weight", 0.3)
    found = price(net.double())
    (reason,) = found.unmeasured.values()
    assert "writes into what that weight was multiplied with" in reason


def batch_norm(**options):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4, **options), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)
    ).double()
    net.train()(x)
    return net


@pytest.mark.parametrize("method", [*METHODS, "sampled"])
def test_batch_norm_in_train_mode_takes_its_running_statistics_and_says_so(method):
    net = batch_norm()
    before = [buffer.clone() for buffer in net.buffers()]
    found = price(net.train(), method)
    expected = price(net.eval(), method)
    torch.testing.assert_close(found.total, expected.total)
    assert all(map(torch.equal, before, net.buffers()))
    told = "norm layers used their running statistics, as in eval mode"
    assert any(told in note for note in found.notes)
    assert not any(told in note for note in expected.notes)


@pytest.mark.parametrize("method", [*METHODS, "sampled"])
def test_batch_norm_without_running_statistics_is_refused_by_name(method):
    net = batch_norm(track_running_stats=False)
    message = "the model's '1' is a BatchNorm1d without running statistics, which mixes examples"
    with pytest.raises(ValueError, match=message):
        price(net, method)
    assert float(price(net, "masks")) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    net = deep_network().to(dtype)
    half = str(dtype).removeprefix("torch.")
    for run in (
        *(lambda m=m: price(net, m, x.to(dtype)) for m in ALL),
        lambda: dl.penalty_curve(net, x.to(dtype), cross_entropy, [0.5]),
        lambda: dl.decompose(net, x.to(dtype), labels, cross_entropy, 2),
    ):
        with pytest.raises(ValueError, match=f"weights are torch.{half}, too coarse"):
            run()


@pytest.mark.parametrize("method", ALL)
def test_frozen_parameters_change_no_value_and_get_no_gradient(method):
    net = deep_network()
    frozen = copy.deepcopy(net)
    for parameter in frozen[0].parameters():
        parameter.requires_grad_(False)
    found = price(frozen, method)
    assert float(found) == pytest.approx(float(price(net, method)), rel=1e-12)
    found.total.backward()
    assert frozen[0].weight.grad is None
    assert frozen[3].weight.grad is not None
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    assert float(price(frozen, method)) == pytest.approx(float(found), rel=1e-12)


def shared():
    """One linear layer and one dropout, each used twice."""
    torch.manual_seed(0)
    inner, drop = nn.Linear(3, 3), nn.Dropout(0.3)
    return nn.Sequential(inner, nn.Tanh(), drop, inner, nn.Tanh(), drop, nn.Linear(3, 3)).double()


def test_shared_parameters_and_shared_dropouts():
    net, inputs = shared(), randn(4, 3)
    found = price(net, "second_order", inputs)
    expected = {}
    for i in range(4):
        opened = open_gates(net, inputs[i : i + 1])
        (f,) = opened.outputs
        H = softmax_hessian(f.detach())
        for gate in opened.gates:
            rows = [torch.autograd.grad(c, gate.tensor, retain_graph=True)[0] for c in f]
            J = torch.stack(rows).flatten(1)
            part = 0.5 * 0.3 / 0.7 * float(torch.trace(J.mT @ H @ J)) / 4
            expected[gate.name] = expected.get(gate.name, 0.0) + part
    assert list(expected) == ["2", "2#2"]
    assert {k: float(v.detach()) for k, v in found.by_site.items()} == pytest.approx(expected)
    for method in ALL:
        value = price(net, method, inputs).total
        (gradient,) = torch.autograd.grad(value, net[0].weight)
        step = randn(3, 3, seed=5)
        moved = []
        for size in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                net[0].weight += size * step
                moved.append(float(price(net, method, inputs)))
        slope = (moved[0] - moved[1]) / 2e-5
        assert float((gradient * step).sum()) == pytest.approx(slope, rel=1e-6)


OUTPUTS = {
    "tuple": (lambda f: (f, f), "returned a tuple of 2, but one tensor of predictions is needed"),
    "dict": (lambda f: {"scores": f}, "returned a dict with 'scores', but one tensor"),
    "none": (lambda f: None, "returned a NoneType, but one tensor"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_not_one_tensor_are_refused(kind):
    wrap, message = OUTPUTS[kind]
    net = Tail(plain, wrap).double()
    for run in (
        *(lambda m=m: price(net, m) for m in ALL),
        lambda: dl.penalty_curve(net, x, cross_entropy, [0.5]),
        lambda: dl.decompose(net, x, labels, cross_entropy, 2),
    ):
        with pytest.raises(TypeError, match=message):
            run()


def test_a_dict_with_logits_is_taken():
    net, other = Tail(plain, lambda f: {"logits": f, "loss": None}).double(), Tail(plain).double()
    for method in ALL:
        assert float(price(net, method)) == pytest.approx(float(price(other, method)))


def test_many_sites_are_said():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)]
    net = nn.Sequential(*layers, nn.Linear(30, 3))
    found = price(net, inputs=torch.randn(3, 30))
    assert any("4 sites act through one another" in note for note in found.notes)


class Around(nn.Module):
    """A dropout inside a block that `run` calls."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.run, self.first, self.last = run, nn.Linear(2, 4), nn.Linear(4, 3)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, inputs):
        return self.last(self.run(self.block, self.first(inputs)))


def without_derivatives(block, h):
    with torch.no_grad():
        return block(h)


def checkpointed(reentrant):
    return lambda block, h: checkpoint(block, h, use_reentrant=reentrant)


def test_a_site_that_no_derivative_reaches_is_not_free():
    net = Around(without_derivatives).double()
    for method in METHODS:
        found = price(net, method)
        assert "where no derivative is recorded" in found.unmeasured["block.2"]
    assert float(price(net, "masks")) > 0
    with pytest.raises(ValueError, match=r"site 'block\.2' has no penalty: the forward runs it"):
        price(net, sites=["block.2"])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's checkpoint
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_are_refused_where_they_would_run_again(reentrant):
    net = Around(checkpointed(reentrant)).double()
    again = "and checkpointed parts would run again on the way back, under other masks"
    error = ValueError if reentrant else RuntimeError
    for method in ALL:
        with pytest.raises(error, match=again):
            price(net, method)
    with pytest.raises(error, match=again):
        dl.gradient_noise(net, x, labels, cross_entropy, 4)
    with pytest.raises(error, match=again):
        averaged(cross_entropy)(net, x, labels)
    with torch.no_grad():
        assert dl.decompose(net, x, labels, cross_entropy, 20, seed=0).spread.value > 0
        assert float(price(net, "masks")) > 0
    net(x).sum().backward()  # outside it checkpoints as before


def test_batch_norm_as_a_function_of_the_batch_is_refused():
    net = Tail(lambda m, h: F.batch_norm(m.drop(h), None, None, training=True)).double()
    for method in METHODS:
        with pytest.raises(ValueError, match=r"calls F\.batch_norm in train mode, which mixes"):
            price(net, method)
    assert float(price(net, "masks")) > 0


def test_a_compiled_network_costs_what_it_costs_uncompiled():
    net = deep_network()
    compiled = torch.compile(net, backend="eager")
    for method in ALL:
        assert float(price(compiled, method)) == float(price(net, method))


CUTS = {
    "detached": lambda m, h: m.drop(h).detach(),
    "through numpy": lambda m, h: torch.from_numpy(m.drop(h).detach().numpy().copy()),
    "argmax": lambda m, h: F.one_hot(m.drop(h).argmax(-1), 4).to(h),
}


@pytest.mark.parametrize("around", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_site_behind_which_the_graph_is_cut_is_not_measured(around, method):
    net = Tail(around).double()
    found = price(net, method)
    assert found.total == 0
    assert "the forward cuts the graph behind it" in found.unmeasured["drop"]
    with pytest.raises(ValueError, match="site 'drop' has no penalty: no derivative"):
        price(net, method, sites=["drop"])
    with pytest.raises(ValueError, match="site 'drop' cannot be replaced by a penalty: no deriv"):
        dl.replace_dropout(net, cross_entropy, method)(x, labels)


def test_a_site_that_outputs_do_not_depend_on_costs_nothing():
    net = Tail(lambda m, h: (m.drop(h), h)[1]).double()
    found = price(net)
    assert found.unmeasured == {}
    assert abs(float(found.by_site["drop"].detach())) < 1e-15
    assert "no output moves with the units at 'drop' to first order" in found.notes[0]


def test_steps_are_said_to_have_no_first_order():
    found = price(Tail(lambda m, h: m.drop(h).sign()).double())
    assert "by steps alone (round, sign)" in found.notes[0]


@pytest.mark.parametrize("method", [*METHODS, "sampled"])
def test_units_in_half_precision_are_not_measured(method):
    class Cast(Tail):
        def forward(self, inputs):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(inputs).float()

    net = Cast(plain)
    found = price(net, method, x.float())
    assert "its units are in half precision" in found.unmeasured["drop"]
    with pytest.raises(ValueError, match="site 'drop' has no penalty: its units are in half"):
        price(net, method, x.float(), sites=["drop"])


def test_units_in_double_precision_among_single():
    net = Tail(lambda m, h: m.drop(h.double()).relu().float() + 1)
    assert float(price(net, inputs=x.float())) == pytest.approx(
        float(price(Tail(plain), inputs=x.float())), rel=1e-5
    )
