"""A training step on base + penalty against a plain one.

`python -m benchmarks.bench_deterministic`.

The arithmetic of C backward passes and of their backward is 11 plain steps at C = 10 classes; a
step with one probe is 2.
"""

import torch
from torch import nn

import droplens as dl
from benchmarks._timing import ratio, row
from benchmarks.bench_penalty import small_cnn
from droplens.data import digits
from droplens.demonstration import network

loss = nn.CrossEntropyLoss()
BATCH = 256


def plain_step(net, x, y):
    loss(net(x), y).backward()


def main():
    torch.manual_seed(0)
    x, y = (part[:BATCH] for part in digits().train)
    networks = {
        "demo MLP": (network(0.5).train(), x),
        "small CNN": (small_cnn().train(), x.reshape(-1, 1, 8, 8)),
    }
    print(f"threads: {torch.get_num_threads()}; batches of {BATCH}, 10 classes")
    print("what | ratio | limit")
    for name, (net, images) in networks.items():
        for method, limit in (("gaussian", 11), ("second_order", 11), ("sampled", 2)):
            step = dl.replace_dropout(net, loss, method)
            measured = ratio(
                lambda s=step, i=images: s(i, y).backward(),
                lambda n=net, i=images: plain_step(n, i, y),
            )
            row(f"deterministic step, {method}, {name}, over a plain step", measured, limit)


if __name__ == "__main__":
    main()
