"""Many seeds at once against one after the other: `python -m benchmarks.bench_training`."""

import torch
from torch import nn

from benchmarks._timing import ratio, row, seconds
from droplens import data, training

SEEDS, WIDTH, STEPS = 20, 1000, 300


def two_layers():
    return nn.Sequential(nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def digits_network(p):
    hidden = (nn.Linear(256, 256), nn.ReLU(), nn.Dropout(p))
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(p), *hidden, nn.Linear(256, 10))


def loop(networks, examples, steps):
    for network in networks:
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        loss = nn.MSELoss()
        for _ in range(steps):
            optimizer.zero_grad()
            loss(network(examples.inputs), examples.targets).backward()
            optimizer.step()


def stacked_against_loop():
    """20 seeds of a 1-1000-1 ReLU network, 40 points, full batch."""
    x = torch.linspace(-1, 1, 40)[:, None]
    examples = data.relu_pair(x.flatten())
    networks = training.initialise(two_layers, SEEDS, seed=0)
    plan = training.Plan(STEPS, None)
    return ratio(
        lambda: training.train(networks, examples, nn.MSELoss(), plan, seed=0),
        lambda: loop(networks, examples, STEPS),
        5,
    )


def demo_seconds():
    """Ten digits networks, 40 epochs."""
    split = data.digits()
    networks = [
        network
        for p in (0.5, 0.0)
        for network in training.initialise(lambda p=p: digits_network(p), 5, seed=0)
    ]
    plan = training.Plan(40, 32)
    return seconds(
        lambda: training.train(networks, split.train, nn.CrossEntropyLoss(), plan, seed=0)
    )


def main():
    row(
        "20 seeds of 1-1000-1, full batch, over a loop with torch's Adam",
        stacked_against_loop(),
        0.13,
    )
    row("ten digits networks, 40 epochs, batches of 32, in seconds", demo_seconds(), 25)


if __name__ == "__main__":
    main()
