"""Penalties against a plain training step: `python -m benchmarks.bench_penalty`."""

import copy
import statistics
from functools import partial

import torch
from torch import nn

import droplens as dl
from benchmarks._memory import peak
from benchmarks._passes import (
    bare_passes,
    mapped_passes,
    passes,
    unfolded_passes,
    weight_passes,
)
from benchmarks._timing import ratio, row, seconds
from benchmarks.networks import NETWORKS, set_rate
from droplens.data import digits
from droplens.demonstration import trained
from droplens.gates import draw_masks, masks_replaced

loss = nn.CrossEntropyLoss()
# A site's gates are every example's own. Where a weight is masked, the passes to them make every
# example's own gradient, which its noise is made of: of kernels that takes twice as long as their
# sum over examples, in either of the ways in use. The limit is over those; over the passes to the
# sums, which serve no noise, these are no more than what is reached.
KERNELS = {"small CNN": 2.5, "small ResNet": 3}
BARE = "over one forward + C backward passes to the first site"
TO_GATES = "over one forward + C backward passes to gates"
# Enough for a training step to take some 40 to 130 MB.
EXAMPLES = {"MLP": 4096, "small CNN": 2048, "small ResNet": 1024, "4-layer transformer": 1024}


def plain_step(net, x, y):
    loss(net(x), y).backward()


def value(net, x, method):
    with torch.no_grad():
        return dl.penalty(net, x, loss, method)


def gaussian_over_masks(net, x, y):
    """Seconds of the Gaussian value over those of masks with the same median error per example.

    The masks' error falls as 1/sqrt(K); K is found from the spread of 400 of them against a
    long reference run.
    """

    def spread(draws, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), masks_replaced(net, draw_masks(generator)):
            outputs = torch.stack([net(x) for _ in range(draws)])
        return torch.logsumexp(outputs, -1).mean(0) - torch.logsumexp(outputs.mean(0), -1)

    truth = torch.stack([spread(1000, seed) for seed in range(8)]).mean(0)
    gaussian = value(net, x, "gaussian").per_example * len(x)
    wanted = float((gaussian - truth).abs().median())
    short = 400
    found = float((spread(short, 99) - truth).abs().median())
    needed = short * (found / wanted) ** 2
    with_masks = statistics.median(seconds(lambda: spread(100, 1)) for _ in range(3)) / 100
    ours = statistics.median(seconds(lambda: value(net, x, "gaussian")) for _ in range(9))
    return ours / (with_masks * needed), needed


def untrained(name, n):
    """A network and a batch of n images of noise with labels."""
    torch.manual_seed(0)
    return NETWORKS[name](0.3), torch.randn(n, 64), torch.randint(10, (n,))


def over_passes(name, net, x):
    for method in ("gaussian", "second_order"):
        for reference, what in ((bare_passes, BARE), (passes, TO_GATES)):
            measured = ratio(lambda m=method: value(net, x, m), lambda r=reference: r(net, x))
            row(f"penalty value, {method}, {name}, {what}", measured, 1.5)


def overheads(name):
    net, x, y = untrained(name, EXAMPLES[name] // 4)
    over_passes(name, net, x)
    measured = ratio(lambda: value(net, x, "masks"), lambda: passes(net, x), 5)
    row(f"penalty value, 16 masks, {name}, {TO_GATES}", measured, 10)  # drawing does not thread
    net.train()
    measured = ratio(lambda: value(net, x, "sampled"), lambda: plain_step(net, x, y), 15)
    row(f"penalty value, sampled, {name}, over a plain step", measured, 1.7)


def drop_connected(name):
    """Every weight masked: the outer products come on top of the passes."""
    plain, x, _ = untrained(name, EXAMPLES[name] // 4)
    net = set_rate(copy.deepcopy(plain), 0.0)  # attention has no module to take out
    for module in list(net.modules()):
        for part, child in list(module.named_children()):
            if isinstance(child, nn.Dropout | nn.Dropout2d):
                setattr(module, part, nn.Identity())
        if type(module) in (nn.Linear, nn.Conv2d):
            dl.nn.drop_connect(module, "weight", 0.3)
    for method in ("gaussian", "second_order"):
        for reference, what, limit in (
            (mapped_passes, "to every example's own weights, mapped", 1.5),
            (unfolded_passes, "to every example's own weights, unfolded", 1.5),
            (weight_passes, "to the weights, summed over examples", KERNELS.get(name, 1.5)),
        ):
            measured = ratio(lambda m=method: value(net, x, m), lambda r=reference: r(plain, x), 5)
            what = f"over one forward + C backward passes {what}"
            row(f"DropConnect everywhere, {method}, {name}, {what}", measured, limit)


def prepared(name, method, n):
    """A call whose memory is looked at: a training step, or a penalty's value."""
    net, x, y = untrained(name, n)
    net.train()

    def call(x, y):
        if method is None:
            plain_step(net, x, y)
        else:
            value(net, x, method)

    call(x[:4], y[:4])  # kernels and pools, which are not the call's
    net.zero_grad(set_to_none=True)
    return partial(call, x, y)


def memory(name):
    n = EXAMPLES[name]
    step = peak(partial(prepared, name, None, n))
    for method in ("gaussian", "second_order", "sampled"):
        grown = peak(partial(prepared, name, method, n))
        row(f"peak memory, {method}, {name}, {n} examples, over a training step", grown / step, 2)


def main():
    torch.manual_seed(0)
    x, y = digits().train
    net = trained(1, 0)["with dropout"][0].train()
    print(f"threads: {torch.get_num_threads()}")
    print("what | ratio | limit")
    for method in ("gaussian", "second_order"):
        measured = ratio(lambda m=method: value(net, x, m), lambda: plain_step(net, x, y))
        row(f"penalty value, {method}, demo network, over a plain step", measured, 4)
    over_passes("demo network", net, x)
    measured = ratio(lambda: value(net, x, "sampled"), lambda: plain_step(net, x, y))
    row("penalty value, sampled, demo network, over a plain step", measured, 1.7)
    for name in NETWORKS:
        overheads(name)
        drop_connected(name)
        memory(name)
    measured, needed = gaussian_over_masks(net, x, y)
    row(f"Gaussian per example, over {needed:.0f} masks of the same median error", measured, 0.05)


if __name__ == "__main__":
    main()
