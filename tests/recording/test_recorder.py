import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import droplens as dl
from droplens import recording

CE = nn.CrossEntropyLoss()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(12, 8),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(8, 3),
    )


def examples(n=40):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 6, generator=generator),
        torch.randint(3, (n,), generator=generator),
    )


def train(recorder_of, steps=8):
    """A plain loop that uses every stream: the loader shuffles, dropout draws, numpy too."""
    model = network()
    random.seed(3), np.random.seed(3)
    loader = DataLoader(TensorDataset(*examples()), batch_size=10, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters())
    recorder = recorder_of(model)
    done = 0
    while done < steps:
        for x, y in loader:
            optimizer.zero_grad()
            CE(model(x) + 0.01 * float(np.random.rand()), y).backward()
            optimizer.step()
            if recorder is not None:
                recorder.step()
            done += 1
    weights = [
        t.clone() for t in (*model.state_dict().values(), *(p.grad for p in model.parameters()))
    ]
    return weights, (torch.rand(1), random.random(), np.random.rand()), recorder


@pytest.mark.parametrize(
    "metrics", [["rate", "penalty", "equalisation"], list(recording._metrics.METRICS)]
)
def test_training_is_the_same_to_the_bit(metrics):
    alone, streams, _ = train(lambda model: None)
    sample = DataLoader(TensorDataset(*examples()), batch_size=20, shuffle=True)

    def recorder_of(model):
        return dl.Recorder(model, sample, CE, metrics=metrics, every=1, budget=1)

    watched, others, recorder = train(recorder_of)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert streams[0] == others[0]
    assert streams[1:] == others[1:]
    assert {record.step for record in recorder.history} == set(range(1, 9))
    assert not recorder.failures


def meddle(sample):
    sample.model.eval()
    torch.rand(3)
    next(sample.model.buffers()).add_(1)
    return {"all": {"nothing": 1.0}}


def test_a_careless_metric_does_not_disturb_either():
    alone, streams, _ = train(lambda model: None)
    watched, others, recorder = train(
        lambda model: dl.Recorder(
            model, examples(), metrics={"careless": meddle}, every=2, budget=1
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert streams[0] == others[0]
    assert recorder.series("all", "nothing") == ((2, 4, 6, 8), (1.0,) * 4)


def test_numbers_are_those_of_the_rooms_they_come_from():
    model, (x, y) = network(), examples()
    recorder = dl.Recorder(model, (x, y), CE, every=1, budget=1, seed=0)
    recorder.step(7)
    found = {(r.site, r.metric): r for r in recorder.history}
    expected = dl.penalty(model, x, CE, "second_order").by_site
    assert found["3", "penalty"].value == pytest.approx(float(expected["3"].detach()))
    assert found["3", "penalty"].standard_error == 0
    assert found["3", "rate"].value == 0.5
    equal = dl.inspect(model, (x, y), CE, draws=2, directions=2).equalization["6"]
    assert found["6", "participation"].value == pytest.approx(equal.participation / 8)
    assert found["6", "variation"].value == pytest.approx(equal.variation)
    assert found["6", "rate"].tag == "dropout/6/rate"
    assert {r.step for r in recorder.history} == {7}


def test_schedules_show_in_the_rates():
    model = network()
    recorder = dl.Recorder(model, examples(), metrics=["rate"], every=1, budget=1)
    for p in (0.1, 0.3):
        model[3].p = p
        recorder.step()
    assert recorder.series("3", "rate") == ((1, 2), (0.1, 0.3))


def test_many_outputs_are_probed_with_an_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 40))
    x, y = examples()
    recorder = dl.Recorder(model, (x, y), CE, metrics=["penalty"], every=1, budget=1, seed=3)
    (record,) = recorder.step()
    truth = float(dl.penalty(model, x, CE, "second_order"))
    assert record.standard_error > 0
    assert abs(record.value - truth) < 5 * record.standard_error
    again = dl.Recorder(model, (x, y), CE, metrics=["penalty"], every=1, budget=1, seed=3)
    assert again.step() == (record,)


def test_interval_and_budget():
    model = network()
    recorder = dl.Recorder(model, examples(), metrics=["rate"], every=3, budget=1)
    steps = [bool(recorder.step()) for _ in range(7)]
    assert steps == [False, False, True, False, False, True, False]
    stingy = dl.Recorder(model, examples(), metrics=["rate"], every=1, budget=1e-9)
    assert not any(stingy.step() for _ in range(5))
    assert stingy.postponed == 4
    assert stingy.share == 0
    assert stingy.measure()
    assert 0 < stingy.share <= 1


class Writer:
    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, value, step):
        self.rows.append((tag, value, step))


def test_a_writer_gets_everything():
    writer = Writer()
    recorder = dl.Recorder(
        network(), examples(), metrics=["rate"], every=1, budget=1, writer=writer
    )
    recorder.step()
    recorder.close()
    assert writer.rows == [("dropout/3/rate", 0.5, 1), ("dropout/6/rate", 0.2, 1)]


def test_a_folder_becomes_tensorboards(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with dl.Recorder(
            network(), examples(), CE, every=1, budget=1, writer=tmp_path / "runs"
        ) as recorder:
            recorder.step()
        events = EventAccumulator(str(tmp_path / "runs"))
        events.Reload()
    assert "dropout/3/penalty" in events.Tags()["scalars"]
    (event,) = events.Scalars("dropout/3/rate")
    assert (event.step, event.value) == (1, 0.5)


def test_wrapped_models_keep_their_names():
    model = network()
    compiled = torch.compile(model, backend="eager")
    recorder = dl.Recorder(compiled, examples(), metrics=["rate"], every=1, budget=1)
    assert [record.site for record in recorder.step()] == ["3", "6"]


def test_a_broken_network_does_not_end_the_training():
    model = network()
    recorder = dl.Recorder(model, examples(), CE, metrics=["rate", "penalty"], every=1, budget=1)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="could not measure 'penalty' at step 1: .*NaN"):
        first = recorder.step()
    assert {record.metric for record in first} == {"rate"}
    recorder.step()  # warned of once
    assert "NaN" in recorder.failures["penalty"]
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    assert {record.metric for record in recorder.step()} == {"rate", "penalty"}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, examples()), {}, TypeError, "model has to be a torch module, but got int"),
        ((network(), examples()), {}, ValueError, "'penalty' is in units of the loss; pass loss="),
        ((network(), examples(), CE), {"every": 0}, ValueError, "every has to be a whole number"),
        ((network(), examples(), CE), {"budget": 0}, ValueError, r"budget has to be in \(0, 1\]"),
        ((network(), examples(), CE), {"metrics": ["x"]}, ValueError, "'x', but there are rate,"),
        ((network(), examples(), CE), {"metrics": []}, ValueError, "metrics is empty"),
        ((network(), examples(), CE), {"metrics": "rate"}, TypeError, "metrics has to be a list"),
        (
            (network(), examples(), CE),
            {"metrics": {"a": 3}},
            TypeError,
            r"metrics\['a'\] has to be",
        ),
        ((network(), examples(), CE), {"writer": 3}, TypeError, "writer has to have add_scalar"),
        ((network(), torch.full((2, 6), math.nan), CE), {}, ValueError, "inputs holds NaN or Inf"),
        ((network(), [], CE), {}, ValueError, "data is empty"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        dl.Recorder(*arguments, **options)


def test_an_unknown_series_is_refused():
    recorder = dl.Recorder(network(), examples(), metrics=["rate"], every=1, budget=1)
    with pytest.raises(ValueError, match="there is nothing at all"):
        recorder.series("3", "rate")
    recorder.step()
    with pytest.raises(ValueError, match="'dropout/x/rate'; there is dropout/3/rate, dropout/6"):
        recorder.series("x", "rate")
