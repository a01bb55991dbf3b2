"""Intervals of what a recorder samples hold the truth in 93–97% of 1,000 measurements.

Of its other metrics, and of penalties that take few backward passes, nothing is sampled.
"""

import pytest
import torch
from torch import nn

import droplens as dl
from droplens.batches import Batch
from droplens.recording._metrics import METRICS, Sample
from tests.penalties.test_decompose import cross_entropy, deep_network, labels, truth, x

pytestmark = pytest.mark.slow
REPEATS = 1000


def assert_cover(metric, model, batch, loss, truths):
    held = dict.fromkeys(truths, 0)
    for k in range(REPEATS):
        found = METRICS[metric](Sample(model, batch, loss, REPEATS * k))
        for (site, name), value in truths.items():
            low, high = found[site][name].interval()
            held[site, name] += low <= value <= high
    assert all(0.93 <= count / REPEATS <= 0.97 for count in held.values()), held


def test_gaps_on_five_examples():
    net, names = deep_network(0.3), ("gap", "spread", "shift")
    alone = {"2": truth(net, 0.3, (None, 0)), "5": truth(net, 0.3, (0, None))}
    truths = {(s, n): v for s, own in alone.items() for n, v in zip(names, own, strict=True)}
    assert_cover("gap", net, Batch(x, labels), cross_entropy, truths)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_penalties_by_probes(loss):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5),
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3),
        nn.Linear(8, 40),
    ).double()  # fmt: skip
    inputs = torch.randn(5, 4).double()
    targets = torch.arange(5) if isinstance(loss, nn.CrossEntropyLoss) else torch.zeros(5, 40)
    batch = Batch(inputs, targets if targets.dim() == 1 else targets.double())
    with torch.no_grad():
        exact = dl.penalty(net, inputs, loss, "second_order", targets=batch.targets).by_site
    truths = {(site, "penalty"): float(value) for site, value in exact.items()}
    assert_cover("penalty", net, batch, loss, truths)
