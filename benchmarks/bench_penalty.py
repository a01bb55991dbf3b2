"""Penalties against a plain training step: `python -m benchmarks.bench_penalty`."""

import torch
from torch import nn

import droplens as dl
from benchmarks._timing import ratio, row
from droplens.data import digits
from droplens.demonstration import trained
from droplens.gates import open_gates

loss = nn.CrossEntropyLoss()


def plain_step(net, x, y):
    loss(net(x), y).backward()


def passes(net, x, n_classes=10):
    """One forward and C backward passes to the earliest site: what any exact value has to do."""
    opened = open_gates(net, x)
    gates = [gate.tensor for gate in opened.gates]
    for c in range(n_classes):
        cotangent = torch.zeros_like(opened.outputs)
        cotangent[:, c] = 1
        torch.autograd.grad(opened.outputs, gates, cotangent, retain_graph=True)


def value(net, x, method):
    with torch.no_grad():
        return dl.penalty(net, x, loss, method)


def main():
    torch.manual_seed(0)
    x, y = digits().train
    net = trained(1, 0)["with dropout"][0].train()
    print(f"threads: {torch.get_num_threads()}")
    print("what | ratio | limit")
    for method in ("gaussian", "second_order"):
        measured = ratio(lambda m=method: value(net, x, m), lambda: plain_step(net, x, y))
        row(f"penalty value, {method}, demo network, over a plain step", measured, 4)
        measured = ratio(lambda m=method: value(net, x, m), lambda: passes(net, x))
        row(f"penalty value, {method}, over one forward + C backward passes", measured, 1.5)


if __name__ == "__main__":
    main()
