"""The recorder's time and what geometry holds in memory: `python -m benchmarks.bench_geometry`."""

import statistics
import time
from functools import partial

import torch
from torch import nn

from benchmarks._memory import peak
from benchmarks._timing import row
from droplens import Recorder, data, measure

LOSS = nn.CrossEntropyLoss()
MEASURES = {
    "a training step": None,
    "curvature": lambda m, d: measure.curvature(m, d[0], LOSS, "e", 1, parameters=8, seed=0),
    "curvature, averaged": lambda m, d: measure.curvature(
        m, d[0], LOSS, "m", 1, 2, parameters=4, seed=0
    ),
    "equalisation by site": measure.equalization_by_site,
    "condensation by layer": lambda m, d: measure.condensation_by_layer(m, d, tolerances=(0.05,)),
    "ranks": measure.ranks,
    "recorder": lambda m, d: Recorder(m, d, LOSS).measure(),
}


def digits_training(recorded):
    """Twenty epochs on digits in a plain loop; returns the recorder, if there is one."""
    torch.manual_seed(0)
    x, y = data.digits().train
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 256), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters())
    recorder = Recorder(model, (x, y), LOSS) if recorded else None
    for _ in range(20):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            LOSS(model(x[rows]), y[rows]).backward()
            optimizer.step()
            if recorder is not None:
                recorder.step()
    return recorder


def recorder_time():
    """Share of the time by the recorder's own clock, extra time by ours, and how often it looked.

    Ours is processor time, the median of trainings that take turns: load disturbs it least.
    """
    digits_training(True), digits_training(False)
    watched, plain, shares = [], [], []
    for _ in range(15):
        start = time.process_time()
        recorder = digits_training(True)
        watched.append(time.process_time() - start)
        start = time.process_time()
        digits_training(False)
        plain.append(time.process_time() - start)
        shares.append(recorder.share)
    looks = len({record.step for record in recorder.history})
    return max(shares), statistics.median(watched) / statistics.median(plain) - 1, looks


def prepared(name):
    """A call whose memory is looked at."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 1024), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(1024, 10),
    )  # fmt: skip
    call = MEASURES[name] or training_step
    small = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3))
    call(
        small, (torch.randn(30, 4), torch.randint(3, (30,)))
    )  # loads code, which is not the call's
    return partial(call, model, (torch.randn(2048, 256), torch.randint(10, (2048,))))


def many_neurons():
    weights = torch.randn(100_000, 256, generator=torch.Generator().manual_seed(0))
    return partial(measure.orientation_picture, weights)


def training_step(model, data):
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        LOSS(model(data[0]), data[1]).backward()
        optimizer.step()


def main():
    print("what | ratio | limit")
    share, extra, looks = recorder_time()
    row(f"recorder at its default, share of the time by its own clock ({looks} looks)", share, 0.05)
    row("recorder at its default, extra time over the same training without", extra, 0.05)
    pictured = peak(many_neurons) / 2**30
    row("orientation picture of 100,000 neurons × 256, GiB with the weights", pictured + 0.095, 1)
    step, *others = (peak(partial(prepared, name)) for name in MEASURES)
    for name, grown in zip(list(MEASURES)[1:], others, strict=True):
        row(f"peak memory, {name}, over a training step", grown / step, 2)


if __name__ == "__main__":
    main()
