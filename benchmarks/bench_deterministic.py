"""A step on base + penalty against a plain step: `python -m benchmarks.bench_deterministic`.

The arithmetic of C backward passes and of their backward is 11 plain steps at C = 10 classes; a
step with one probe is 2.
"""

import torch
from torch import nn

import droplens as dl
from benchmarks._timing import ratio, row
from benchmarks.networks import NETWORKS
from droplens.data import digits

loss = nn.CrossEntropyLoss()
BATCH = 512


def plain_step(net, x, y):
    loss(net(x), y).backward()


def main():
    x, y = (part[:BATCH] for part in digits().train)
    print(f"threads: {torch.get_num_threads()}; batches of {BATCH}, 10 classes")
    print("what | ratio | limit")
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        net = build(0.3).train()
        for method, limit in (("gaussian", 11), ("second_order", 11), ("sampled", 2)):
            step = dl.replace_dropout(net, loss, method)
            measured = ratio(
                lambda s=step: s(x, y).backward(), lambda n=net: plain_step(n, x, y), 9
            )
            row(f"deterministic step, {method}, {name}, over a plain step", measured, limit)


if __name__ == "__main__":
    main()
