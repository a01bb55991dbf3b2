import math

import pytest
import torch
from torch import nn

from droplens import nn as dn


def model() -> nn.Sequential:
    return nn.Sequential(dn.Dropout(0.4), nn.Linear(2, 2), dn.DropBlock2d(0.2, 3), nn.Dropout(0.1))


def run(schedule: dn.RateSchedule, layer: nn.Module, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(layer.p))
        schedule.step()
    return rates


SHAPES = {
    "constant": [0.4, 0.4, 0.4, 0.4, 0.4, 0.4],
    "linear": [0.0, 0.1, 0.2, 0.3, 0.4, 0.4],
    "cosine": [0.4 * (1 - math.cos(math.pi * min(k, 4) / 4)) / 2 for k in range(6)],
    "early": [0.4, 0.4, 0.4, 0.4, 0.0, 0.0],
    "late": [0.0, 0.0, 0.0, 0.0, 0.4, 0.4],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    net = model()
    schedule = dn.RateSchedule(net, shape, steps=4)
    assert run(schedule, net[0], 6) == pytest.approx(SHAPES[shape], abs=1e-12)


def test_every_layer_goes_to_its_own_rate() -> None:
    net = model()
    schedule = dn.RateSchedule(net, "linear", steps=2)
    assert schedule.rates() == {"0": 0.0, "2": 0.0, "3": 0.0}
    schedule.step()
    assert schedule.rates() == pytest.approx({"0": 0.2, "2": 0.1, "3": 0.05})
    schedule.step()
    assert schedule.rates() == pytest.approx({"0": 0.4, "2": 0.2, "3": 0.1})


def test_one_rate_for_all_and_linear_in_depth() -> None:
    net = model()
    dn.RateSchedule(net, "constant", steps=1, end=0.3)
    assert [net[i].p for i in (0, 2, 3)] == [0.3] * 3
    dn.RateSchedule(net, "constant", steps=1, end=0.3, depth="linear")
    assert [net[i].p for i in (0, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])


def test_named_layers_alone() -> None:
    net = model()
    schedule = dn.RateSchedule(net, "linear", steps=1, end={"2": 0.5})
    schedule.step()
    assert [net[i].p for i in (0, 2, 3)] == [0.4, 0.5, 0.1]


def test_a_function_of_progress() -> None:
    net = model()
    schedule = dn.RateSchedule(net, lambda t: t**2, steps=4, start=0.1, end=0.5)
    assert run(schedule, net[0], 3) == pytest.approx([0.1, 0.125, 0.2])


def test_the_layers_draw_at_the_scheduled_rate() -> None:
    net = model()
    schedule = dn.RateSchedule(net, "linear", steps=4, end=0.8)
    x = torch.ones(20_000)
    torch.manual_seed(0)
    for step in range(5):
        rate = float((net[0](x) == 0).double().mean())
        p = 0.2 * step
        assert abs(rate - p) <= 5 * math.sqrt(p * (1 - p) / len(x)), step
        schedule.step()
    assert net[2].law.p == pytest.approx(0.8)


def test_drop_connect_is_scheduled_too() -> None:
    layer = dn.drop_connect(nn.Linear(2, 2), "weight", 0.4)
    schedule = dn.RateSchedule(layer, "linear", steps=2)
    schedule.step()
    assert layer.parametrizations.weight[0].p == pytest.approx(0.2)


def test_saved_and_resumed() -> None:
    first, second = model(), model()
    schedule = dn.RateSchedule(first, "cosine", steps=10, end=0.6)
    for _ in range(4):
        schedule.step()
    resumed = dn.RateSchedule(second, "cosine", steps=99)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.rates() == schedule.rates()
    schedule.step()
    resumed.step()
    assert resumed.rates() == schedule.rates()
    # The model's own checkpoint holds no rate.
    assert set(first.state_dict()) == {"1.weight", "1.bias"}


def test_a_state_of_other_layers_is_refused() -> None:
    state = dn.RateSchedule(model(), steps=3).state_dict()
    other = dn.RateSchedule(nn.Sequential(dn.Dropout(0.1)), steps=3)
    with pytest.raises(ValueError, match="the saved schedule is of the layers"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"shape": "quadratic", "steps": 3},
            ValueError,
            "one of .*got 'quadratic'",
        ),
        ({"shape": 3, "steps": 3}, TypeError, "shape has to be a name or a function, but got int"),
        ({"steps": 0}, ValueError, "steps has to be at least 1, but got 0"),
        ({"steps": 1.5}, TypeError, "steps has to be an int, but got float"),
        ({"steps": 3, "start": -1}, ValueError, "between 0 and 1, but got -1"),
        ({"steps": 3, "end": 1.5}, ValueError, "between 0 and 1, but got 1.5"),
        ({"steps": 3, "end": {"9": 0.5}}, ValueError, r"does not have: \['9'\]"),
        ({"steps": 3, "depth": "deep"}, ValueError, 'depth has to be "linear" or None'),
        ({"steps": 3, "shape": lambda t: 9.0}, ValueError, "between 0 and 1, but got"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=message):
        dn.RateSchedule(model(), **options)


def test_a_model_without_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="model has no dropout layer"):
        dn.RateSchedule(nn.Linear(2, 2), steps=3)
    with pytest.raises(TypeError, match="model has to be a torch module, but got int"):
        dn.RateSchedule(3, steps=3)  # type: ignore[arg-type]
