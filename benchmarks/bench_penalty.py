"""Penalties against a plain training step: `python -m benchmarks.bench_penalty`."""

import copy
import statistics
from functools import partial

import torch
from torch import nn

import droplens as dl
from benchmarks._memory import peak
from benchmarks._timing import ratio, row, seconds
from benchmarks.networks import NETWORKS, set_rate
from droplens.data import digits
from droplens.demonstration import trained
from droplens.gates import draw_masks, masks_replaced

loss = nn.CrossEntropyLoss()
# Passes that sum a kernel's gradient over examples make no example's own, which its noise is made
# of: the same arithmetic, but in one large product instead of a small one an example. What is
# reached over those, beside the limit over passes to every example's own weights.
KERNELS = {"small CNN": 2.5, "small ResNet": 3}
BARE = "over one forward + C backward passes to the first site"
TO_GATES = "over one forward + C backward passes to gates"
# Enough for a training step to take some 40 to 130 MB.
EXAMPLES = {"MLP": 4096, "small CNN": 2048, "small ResNet": 1024, "4-layer transformer": 1024}


def plain_step(net, x, y):
    loss(net(x), y).backward()


def passes(net, x):
    """One forward and C backward passes to gates of ones at all sites."""
    gates = []

    def visit(call, units):
        gates.append(torch.ones_like(units, requires_grad=True))
        return units * gates[-1]

    with masks_replaced(net, visit):
        outputs = net(x)
    pull_back(outputs, gates)


def bare_passes(net, x):
    """One forward without masks and C backward passes to where the first site lies: nothing else.

    Attention drops inside, so the passes go on to what enters it.
    """
    met, training = [], net.training
    kinds = (nn.Dropout, nn.Dropout2d, nn.MultiheadAttention)
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0]))
        for module in net.modules()
        if isinstance(module, kinds)
    ]
    outputs = net.eval()(x)
    pull_back(outputs, met[:1])
    for hook in hooks:
        hook.remove()
    net.train(training)


def weight_passes(net, x):
    """One forward without masks and C backward passes to all weights: where DropConnect drops."""
    weights = [module.weight for module in net.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    pull_back(net.eval()(x), weights)


def own_weight_passes(net, x):
    """One forward and C backward passes to weights of every example's own: its noise's Jacobian."""
    own = {
        f"{name}.weight": module.weight.detach().expand(len(x), *module.weight.shape)
        for name, module in net.eval().named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
    }
    own = {name: weight.requires_grad_() for name, weight in own.items()}

    def outputs(weights, example):
        return torch.func.functional_call(net, weights, (example.unsqueeze(0),)).squeeze(0)

    pull_back(torch.func.vmap(outputs)(own, x), list(own.values()))


def pull_back(outputs, tensors):
    for c in range(outputs.shape[1]):
        cotangent = torch.zeros_like(outputs)
        cotangent[:, c] = 1
        torch.autograd.grad(outputs, tensors, cotangent, retain_graph=True)


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
    row(f"penalty value, 16 masks, {name}, {TO_GATES}", measured, 6)
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
            (own_weight_passes, "to every example's own weights", 1.5),
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
