"""Every evaluation of the spread against Monte Carlo: `python -m benchmarks.spread_table`.

Prints the table of docs/gaussian.md: four networks, untrained and trained, at three rates.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import droplens as dl
from benchmarks.networks import NETWORKS, set_rate
from droplens.data import digits

EPOCHS, TRAINED_AT = 15, 0.2
RATES = (0.1, 0.3, 0.5)
EXAMPLES = 256
loss = nn.CrossEntropyLoss()


def fit(net, x, y):
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    net.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return net


def made(name, trained):
    torch.manual_seed(0)
    net = NETWORKS[name](TRAINED_AT)
    x, y = digits().train
    if trained:
        return fit(net, x, y).eval()
    with torch.no_grad():  # norm layers see the data
        for _ in range(20):
            net.train()(x[:512])
    return net.eval()


def line(name, trained, p, net, x):
    set_rate(net, p)
    with torch.no_grad():
        truth = dl.penalty(net, x, loss, "masks", draws=600, seed=1)
        values = {
            "gaussian": dl.penalty(net, x, loss),
            "second_order": dl.penalty(net, x, loss, "second_order"),
            "masks": dl.penalty(net, x, loss, "masks", seed=2),
        }
    whole = float(truth)
    errors = [f"{100 * (float(v) / whole - 1):+.0f}%" for v in values.values()]
    share = values["masks"].standard_error / whole
    fewest = min(values["gaussian"].participation.values())
    print(
        f"| {name} | {'trained' if trained else 'untrained'} | {p} "
        f"| {whole:.5f} ± {truth.standard_error:.5f} | {errors[0]} | {errors[1]} "
        f"| {errors[2]} ± {100 * share:.0f}% | {fewest:.0f} |",
        flush=True,
    )


def main():
    x = digits().test.inputs[:EXAMPLES]
    print(
        "| network | | p | spread, 600 masks | Gaussian | second order | 16 masks | fewest units |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or NETWORKS:
        for trained in (False, True):
            net = made(name, trained)
            for p in RATES:
                line(name, trained, p, net, x)


if __name__ == "__main__":
    main()
