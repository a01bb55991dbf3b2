"""The gap explained over the processes of torch.distributed."""

import math

import pytest
import torch
from torch import nn

from droplens.estimates import Estimate
from tests.dynamics.test_explain import cross_entropy, explain
from tests.processes import both
from tests.reference_dynamics import network

WORKER = """
import os, sys, torch
import torch.distributed as dist
from torch import nn
import droplens as dl
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
from tests.dynamics.test_explain import labels, network, unseen, unseen_labels, x
from tests.dynamics.test_processes import LOSSES, numbers
first = rank == 0
seen = (x[:1], labels[:1]) if first else (x[1:], labels[1:])
apart = (unseen[:4], unseen_labels[:4]) if first else (unseen[4:], unseen_labels[4:])
found = {}
for name, loss in LOSSES.items():
    found[name] = numbers(dl.explain_gap(network(), seen, apart, loss, 200, seed=rank).all_reduce())
bad = dl.explain_gap(network(), seen, apart, LOSSES["mean"], 2, seed=5)
try:
    bad.all_reduce()
except ValueError as error:
    assert "drew from seed 5" in str(error), error
else:
    raise AssertionError("one seed was not refused")
torch.save(found, f"{out}{rank}")
dist.barrier()
dist.destroy_process_group()
# gloo's threads may outlive the group; leaving at once spares their race with the interpreter.
os._exit(0)
"""
LOSSES = {
    "mean": cross_entropy,
    "class weights": nn.CrossEntropyLoss(torch.tensor([1.0, 3.0], dtype=torch.float64)),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
}


def numbers(found):
    """Value, error and count of every estimate."""
    estimates = {**vars(found), **vars(found.ensembles)}
    return {
        name: (e.value, e.standard_error, e.n)
        for name, e in estimates.items()
        if isinstance(e, Estimate)
    }


def test_two_processes_hold_the_whole(tmp_path):
    """1 and 3 training, 4 and 2 validation examples; both end with the numbers of all."""
    first = both(WORKER, tmp_path)
    for name, loss in LOSSES.items():
        whole = numbers(explain(network(), loss, 200, seed=9))
        assert list(first[name]) == list(whole)
        for part, (value, error, n) in whole.items():
            found, own, count = first[name][part]
            if part in ("validation", "scaled", "generalization"):
                assert found == pytest.approx(value, rel=1e-10)
            else:
                assert abs(found - value) <= 4.5 * math.hypot(error, own) + 1e-12
            if "divergence" not in part:  # so near zero its error varies
                assert own == pytest.approx(error, rel=0.5)
            assert count == n
        total = sum(
            first[name][part][0] for part in ("spread", "shift", "norm_mode", "generalization")
        )
        assert total == pytest.approx(first[name]["gap"][0], rel=1e-10)


def test_without_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        explain(network(), draws=2).all_reduce()
