"""Deterministic dropout: base + penalty, its gradient, and a model that stays as it was."""

import pytest
import torch
from torch import nn

import droplens as dl
from droplens.dynamics import penalty_only
from tests.discovery.test_sites import Raises, assert_same_state, state_of
from tests.dynamics.test_modified import InPlace, Outputs
from tests.reference_dynamics import gradients, network, randn

x, targets, labels = randn(2, 2), randn(2, 2, seed=1), torch.tensor([0, 1])
cross_entropy = nn.CrossEntropyLoss()


def flat(value, net):
    found = torch.autograd.grad(value, [p for p in net.parameters() if p.requires_grad])
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("method", ["gaussian", "second_order"])
def test_squared_loss_before_the_last_layer_is_the_mean_over_all_masks(method):
    """Value and gradient equal E_z R(w, z) and its gradient to rounding."""
    net = network()
    weights, losses, all_gradients = gradients(net, x, targets, nn.MSELoss())
    value = dl.replace_dropout(net, nn.MSELoss(), method)(x, targets)
    assert value.item() == pytest.approx(float(weights @ losses), rel=1e-12)
    torch.testing.assert_close(flat(value, net), weights @ all_gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["gaussian", "second_order"])
def test_the_gradient_is_that_of_the_value(method):
    """Finite differences along a random direction, two sites and cross-entropy."""
    net = network(sites=2, units=4)

    def objective(x, labels):
        same = torch.Generator().manual_seed(3)
        return dl.replace_dropout(net, cross_entropy, method, generator=same)(x, labels)

    gradient = flat(objective(x, labels), net)
    direction = randn(len(gradient), seed=7)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    values = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * 1e-5 * direction, net.parameters())
        values.append(objective(x, labels).item())
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-6)


def test_probes_are_unbiased_for_the_second_orders_gradient():
    net = network(sites=2)
    truth = flat(dl.replace_dropout(net, cross_entropy, "second_order")(x, labels), net)
    source = torch.Generator().manual_seed(0)
    objective = dl.replace_dropout(net, cross_entropy, "sampled", generator=source)
    drawn = torch.stack([flat(objective(x, labels), net) for _ in range(400)])
    errors = drawn.std(0) / 20
    assert float(((drawn.mean(0) - truth).abs() / (errors + 1e-12)).max()) <= 4.5


def test_probes_follow_torchs_global_seed():
    objective = dl.replace_dropout(network(classes=3), cross_entropy, "sampled")
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(objective(x, labels).item())
    assert values[0] == values[1] != values[2]


def test_parts_and_the_objective_of_the_same_name():
    net = network()
    step = dl.replace_dropout(net, cross_entropy, "second_order").parts(x, labels)
    assert step.base.item() == cross_entropy(net.eval()(x), labels).item()
    assert step.penalty.item() == dl.penalty(net, x, cross_entropy, "second_order").total.item()
    same = penalty_only(cross_entropy, "second_order")
    assert step.total.item() == same(net, x, labels).item()


def test_points_turn_at_every_call():
    """Three classes, so that there is something to turn: values differ, their mean is the value."""
    net = network(classes=3, p=0.6)
    objective = dl.replace_dropout(net, cross_entropy, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([objective.parts(x, labels).penalty.item() for _ in range(200)])
    assert float(values.std()) > 0
    fixed = [dl.penalty(net, x, cross_entropy).total.item() for _ in range(2)]
    assert fixed[0] == fixed[1]
    assert float(values.mean()) == pytest.approx(fixed[0], rel=0.05)


def test_to_go_back_is_to_stop_calling_it():
    net = network(sites=2).train()
    before = state_of(net)
    rng = torch.get_rng_state()
    dl.replace_dropout(net, cross_entropy)(x, labels)
    assert not torch.equal(torch.get_rng_state(), rng)  # a seed, as a mask would take one
    torch.set_rng_state(rng)
    assert_same_state(before, state_of(net))
    assert not net._forward_hooks
    assert not torch.equal(net(x), net(x))
    with pytest.raises(RuntimeError, match="the forward is broken"):
        dl.replace_dropout(broken := Raises(), cross_entropy)(torch.zeros(2, 1, 4, 4), labels)
    assert not broken._forward_hooks


def test_what_draws_nothing_leaves_the_global_stream_alone():
    net = network()
    state = torch.get_rng_state()
    dl.replace_dropout(net, cross_entropy, "second_order")(x, labels)
    dl.replace_dropout(net, nn.MSELoss())(x, targets)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_gradients_no_graph_is_kept():
    with torch.no_grad():
        assert not dl.replace_dropout(network(), cross_entropy)(x, labels).requires_grad


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)
    ).double()


def test_masks_behind_norm_layers_in_train_mode_leave_the_mean_over_all_masks():
    """Statistics do not see these masks: squared loss is exact, its gradient through them too."""
    net, twin = normed().train(), normed().train()
    weights, losses, all_gradients = gradients(twin, x, targets, nn.MSELoss(), units=4)
    value = dl.replace_dropout(net, nn.MSELoss())(x, targets)
    assert value.item() == pytest.approx(float(weights @ losses), rel=1e-12)
    torch.testing.assert_close(flat(value, net), weights @ all_gradients, rtol=1e-9, atol=1e-12)


def masks_before_norms():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4), nn.ReLU(inplace=True),
        nn.Dropout(0.3), nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3, momentum=None), nn.Tanh(),
        nn.Dropout1d(0.2), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4, affine=False),
        nn.Dropout(0.4), nn.Linear(4, 3),
    ).double()  # fmt: skip


series, three = randn(5, 2, 5, seed=3), torch.tensor([0, 1, 2, 0, 1])


def held_at_its_batch(net, inputs):
    """The network without masks in eval, with the batch's statistics for running ones."""
    h = inputs
    with torch.no_grad():
        for layer in net.eval():
            if isinstance(layer, nn.BatchNorm1d):
                rows = h.movedim(1, -1).flatten(0, -2)
                layer.running_mean = rows.mean(0)
                layer.running_var = rows.var(0, unbiased=False)
            h = layer(h)
    return net


def test_norm_layers_in_train_mode_follow_the_batch_and_hold_it_in_the_penalty():
    net, twin = masks_before_norms().train(), masks_before_norms().train()
    step = dl.replace_dropout(net, cross_entropy, "second_order").parts(series, three)
    for layer in twin:
        layer.train(isinstance(layer, nn.BatchNorm1d))
    assert step.base.item() == cross_entropy(twin(series), three).item()
    for found, expected in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(module.training and "forward" not in vars(module) for module in net.modules())
    held = held_at_its_batch(twin, series)
    expected = dl.penalty(held, series, cross_entropy, "second_order").total
    assert step.penalty.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("method", ["gaussian", "second_order", "sampled"])
def test_the_gradient_follows_the_batchs_statistics(method):
    net = masks_before_norms().train()

    def objective():
        same = torch.Generator().manual_seed(3)
        return dl.replace_dropout(net, cross_entropy, method, generator=same)(series, three)

    gradient = flat(objective(), net)
    direction = randn(len(gradient), seed=7)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    values = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * 1e-6 * direction, net.parameters())
        values.append(objective().item())
    slope = (values[0] - values[1]) / 2e-6
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-6)


def test_norm_layers_follow_without_gradients_too(monkeypatch):
    """Parts of a batch would have other statistics."""
    monkeypatch.setattr("droplens.penalties._noise._HELD_NUMBERS", 1)
    expected = dl.replace_dropout(masks_before_norms().train(), cross_entropy, "second_order")(
        series, three
    )
    net = masks_before_norms().train()
    with torch.no_grad():
        found = dl.replace_dropout(net, cross_entropy, "second_order")(series, three)
    assert not found.requires_grad
    assert found.item() == expected.item()
    assert net[1].num_batches_tracked == 1


def test_norm_layers_that_fail_stay_as_they_are():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.AlphaDropout(0.5), nn.Linear(2, 2)).double()
    before = state_of(net)
    source = torch.Generator().manual_seed(0)
    objective = dl.replace_dropout(net, cross_entropy, generator=source)
    with pytest.raises(ValueError, match="site '1' cannot be replaced"):
        objective(x, labels)
    with pytest.raises(RuntimeError, match="needs more than one value per channel, but got"):
        objective(x[:1], labels[:1])
    assert_same_state(before, state_of(net))
    assert "forward" not in vars(net[0])


def test_norm_layers_of_ones_own_stand_in_eval_in_the_penalty():
    class Own(nn.BatchNorm1d):
        pass

    net, twin = normed().train(), normed().train()
    net[1] = Own(4).double()
    step = dl.replace_dropout(net, cross_entropy, "second_order").parts(x, labels)
    twin[3].eval()
    assert step.base.item() == cross_entropy(twin(x), labels).item()
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)
    assert net[1].num_batches_tracked == 1
    expected = dl.penalty(normed(), x, cross_entropy, "second_order").total
    assert step.penalty.item() == expected.item()


def test_other_buffers_move_as_in_a_training_step():
    """Power iterations of a spectral norm, counters: in train mode they belong to the step."""

    def build():
        torch.manual_seed(0)
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 4))
        return nn.Sequential(normed, nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)).double()

    net, twin, still = build(), build(), build()
    dl.replace_dropout(net, cross_entropy)(x, labels)
    twin(x)
    assert not all(map(torch.equal, net.buffers(), still.buffers()))
    for found, expected in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    before = [b.clone() for b in net.buffers()]
    dl.replace_dropout(net.eval(), cross_entropy)(x, labels)
    assert all(map(torch.equal, before, net.buffers()))


def test_norm_layers_in_eval_stay_as_they_are():
    net = normed().train()
    net[1].eval()
    before = state_of(net)
    source = torch.Generator().manual_seed(0)
    dl.replace_dropout(net, cross_entropy, generator=source)(x, labels)
    assert_same_state(before, state_of(net))


def test_sites_that_no_penalty_can_replace_are_refused():
    net = nn.Sequential(nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Linear(2, 2)).double()
    with pytest.raises(ValueError, match="site '1' cannot be replaced by a penalty: alpha"):
        dl.replace_dropout(net, cross_entropy)(x, labels)
    chosen = dl.replace_dropout(net, cross_entropy, sites=["0"])
    assert chosen.parts(x, labels).base.item() == cross_entropy(net.eval()(x), labels).item()


def test_logits_in_a_mapping_and_operations_in_place():
    plain = dl.replace_dropout(network(), cross_entropy)(x, labels)
    wrapped = Outputs(lambda f: {"logits": f, "hidden": None})
    assert dl.replace_dropout(wrapped, cross_entropy)(x, labels).item() == plain.item()
    net = InPlace()
    found = flat(dl.replace_dropout(net, cross_entropy)(x, labels), net)
    assert bool(found.isfinite().all())


def test_frozen_and_shared_weights():
    net = network()
    whole = flat(dl.replace_dropout(net, nn.MSELoss())(x, targets), net)
    net[0].requires_grad_(False)
    part = flat(dl.replace_dropout(net, nn.MSELoss())(x, targets), net)
    torch.testing.assert_close(part, whole[-len(part) :])
    shared = nn.Linear(2, 2, bias=False).double()
    tied = nn.Sequential(shared, nn.Tanh(), nn.Dropout(0.4), shared)
    weights, _, found = gradients(tied, x, targets, nn.MSELoss(), units=2)
    value = dl.replace_dropout(tied, nn.MSELoss())(x, targets)
    torch.testing.assert_close(flat(value, tied), weights @ found)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "net"}, TypeError, "model has to be a torch module, but got str"),
        ({"loss": nn.HuberLoss()}, TypeError, "loss HuberLoss is not one"),
        ({"method": "exact"}, ValueError, "method has to be one of 'gaussian', 'second_order'"),
        ({"method": "masks"}, ValueError, "method has to be one of 'gaussian'.*, but got 'masks'"),
        ({"sites": ["head"]}, ValueError, "sites holds 'head'"),
        ({"model": network().half()}, ValueError, "too coarse"),
        ({"model": Outputs(lambda f: (f, f))}, TypeError, "returned a tuple of 2"),
        ({"model": network(p=1.0)}, ValueError, "p = 1 drops every unit"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_arguments_are_named(arguments, error, message):
    given = {"model": network(), "loss": cross_entropy, **arguments}
    inputs = x.half() if "coarse" in message else x
    with pytest.raises(error, match=message):
        dl.replace_dropout(**given)(inputs, labels)


def test_bad_batches_are_named():
    objective = dl.replace_dropout(network(), cross_entropy)
    with pytest.raises(ValueError, match="label 9, but the outputs have 2 classes"):
        objective(x, labels + 8)
    with pytest.raises(ValueError, match="inputs is empty"):
        objective(x[:0], labels[:0])
