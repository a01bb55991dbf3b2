"""Objectives that take the effects of dropout apart: their means, their noise, their gradients."""

import pytest
import torch
from torch import nn

import droplens as dl
from droplens import dynamics
from tests.discovery.test_sites import assert_same_state, state_of
from tests.reference_dynamics import covariance, gradients, network, randn

x, targets, labels = randn(2, 2), randn(2, 2, seed=1), torch.tensor([0, 1])
squared, cross_entropy = nn.MSELoss(), nn.CrossEntropyLoss()
EPSILON = 0.1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(value, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))])


# objective -> (times the noise's covariance, whether the mean is that of dropout)
MOMENTS = {
    "one mask": (dynamics.averaged, {}, 1, True),
    "four masks": (dynamics.averaged, {"masks": 4}, 1 / 4, True),
    "restored": (dynamics.restored, {"masks": 4}, 1, True),
    "noise": (dynamics.noise_only, {}, 1, False),
    "penalty": (dynamics.penalty_only, {}, 0, True),
    "both": (dynamics.penalty_and_noise, {}, 1, True),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_mean_and_covariance_of_the_gradient(name):
    """Squared loss before the last layer, against all masks: mean by coordinate, trace of Σ."""
    build, options, share, explicit = MOMENTS[name]
    net = network()
    weights, _, found = gradients(net, x, targets, squared)
    mean, noise = weights @ found, covariance(weights, found).trace()
    if not explicit:
        mean = flat(squared(net.eval()(x), targets), net)
    objective = build(squared, generator=generator(), **options)
    drawn = torch.stack([flat(objective(net, x, targets), net) for _ in range(300)])
    errors = drawn.std(0) / 300**0.5
    assert float(((drawn.mean(0) - mean).abs() / (errors + 1e-12)).max()) <= 4.5
    distances = (drawn - mean).square().sum(1)
    error = distances.std() / 300**0.5
    assert abs(float(distances.mean() - share * noise)) <= 4 * float(error) + 1e-12


def test_values_are_made_of_the_masks_that_the_generator_gives():
    net = network()
    one = dynamics.averaged(cross_entropy, generator=(source := generator()))
    single = [one(net, x, labels).item() for _ in range(5)]
    assert source is not None
    three = dynamics.averaged(cross_entropy, 3, generator=generator())(net, x, labels)
    assert three.item() == pytest.approx(sum(single[:3]) / 3, rel=1e-12)
    mended = dynamics.restored(cross_entropy, 3, generator=generator())(net, x, labels)
    expected = sum(single[:3]) / 3 + ((1 - 1 / 3) / 2) ** 0.5 * (single[3] - single[4])
    assert mended.item() == pytest.approx(expected, rel=1e-12)
    noise = dynamics.noise_only(cross_entropy, generator=generator())(net, x, labels)
    plain = cross_entropy(net.eval()(x), labels).item()
    assert noise.item() == pytest.approx(plain + (single[0] - single[1]) / 2**0.5, rel=1e-12)


def test_the_four_losses_are_what_their_names_say():
    """One mask, the same in R^drop and in R̃_2."""
    net = network()
    dropped = dynamics.averaged(cross_entropy, generator=generator())(net, x, labels)
    square = EPSILON / 4 * flat(dropped, net).square().sum().item()
    plain = cross_entropy(net.eval()(x), labels).item()
    explicit = dl.penalty(net, x, cross_entropy, "second_order").total.item()
    values = {
        "L1": dynamics.L1(cross_entropy, "second_order")(net, x, labels),
        "L2": dynamics.L2(cross_entropy, EPSILON, generator=generator())(net, x, labels),
        "L3": dynamics.L3(cross_entropy, EPSILON, generator=generator())(net, x, labels),
        "L4": dynamics.L4(cross_entropy, "second_order", generator=generator())(net, x, labels),
    }
    dropped = dropped.item()
    expected = {
        "L1": plain + explicit,
        "L2": plain + square,
        "L3": dropped - square,
        "L4": dropped - explicit,
    }
    found = {name: value.item() for name, value in values.items()}
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("build", [dynamics.L2, dynamics.L3])
def test_double_backward_against_finite_differences(build):
    net = network(sites=2, units=4)
    gradient = flat(build(cross_entropy, EPSILON, generator=generator())(net, x, labels), net)
    direction = randn(len(gradient), seed=7)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    values = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * 1e-5 * direction, net.parameters())
        value = build(cross_entropy, EPSILON, generator=generator())(net, x, labels)
        values.append(value.item())
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-6)


EVERY = {
    "averaged": dynamics.averaged(cross_entropy, 2),
    "restored": dynamics.restored(cross_entropy, 2),
    "noise_only": dynamics.noise_only(cross_entropy),
    "penalty_only": dynamics.penalty_only(cross_entropy),
    "penalty_and_noise": dynamics.penalty_and_noise(cross_entropy),
    "L2": dynamics.L2(cross_entropy, EPSILON),
    "L3": dynamics.L3(cross_entropy, EPSILON),
    "L4": dynamics.L4(cross_entropy),
}


@pytest.mark.parametrize("name", EVERY)
def test_modes_are_left_and_norm_layers_train_in_train_mode(name):
    def normed():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
        ).double()

    net = normed().eval()
    before = state_of(net)
    rng = torch.get_rng_state()
    EVERY[name](net, x, labels)
    torch.set_rng_state(rng)
    assert_same_state(before, state_of(net))
    net.train()
    EVERY[name](net, x, labels)
    assert all(module.training for module in net.modules())
    assert net[1].num_batches_tracked >= 1


@pytest.mark.parametrize("name", EVERY)
def test_sites_without_a_law_are_refused(name):
    net = nn.Sequential(nn.Linear(2, 3), nn.AlphaDropout(0.5), nn.Linear(3, 2)).double().eval()
    with pytest.raises(ValueError, match=r"site '1'.*alpha dropout"):
        EVERY[name](net, x, labels)
    assert not any(module.training for module in net.modules())


def test_torchs_global_stream_repeats_the_masks():
    net, values = network(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(EVERY["averaged"](net, x, labels).item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: dynamics.averaged(cross_entropy, 0), ValueError, "masks has to be at least 1"),
        (lambda: dynamics.restored(cross_entropy, 2.0), TypeError, "masks has to be an int"),
        (lambda: dynamics.averaged(nn.MSELoss), TypeError, "loss has to be a loss object"),
        (lambda: dynamics.L2(cross_entropy, -1), ValueError, "learning_rate has to be at least 0"),
        (lambda: dynamics.L3(cross_entropy, None), TypeError, "learning_rate has to be a number"),
        (lambda: dynamics.L1(cross_entropy, "all"), ValueError, "method has to be one of"),
        (lambda: dynamics.L4(nn.HuberLoss()), TypeError, "loss HuberLoss is not one"),
        (
            lambda: dynamics.averaged(cross_entropy)(network(), x, labels + 5),
            ValueError,
            "label 6, but the outputs have 2 classes",
        ),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
