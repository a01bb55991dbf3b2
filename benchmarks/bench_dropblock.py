"""DropBlock2d against its peers and the memory limit: `python -m benchmarks.bench_dropblock`.

torchvision cannot be installed beside a CPU build of torch, so the peer is the stand-in of
tests/stand_ins.py: it follows torchvision's published sampling rule (a Bernoulli(γ) at every
admissible position, pad, max-pool, multiply, rescale by numel/sum) with the same torch calls.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from droplens import nn as dn
from droplens.masks import Block
from tests.stand_ins import VisionDropBlock2d

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14))
P, SIZE = 0.1, 7


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(functions, device, repeats=15):
    """Median seconds of each function; taken in turns, so that a busy machine hits all alike."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def passes(shape, device):
    """Forward and backward of ours, the peer, torch's dropout and the bare product."""
    x = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.randn(shape, device=device)
    mask = torch.rand(shape, device=device)
    ours, peer = dn.DropBlock2d(P, SIZE), VisionDropBlock2d(P, SIZE)

    def both(forward):
        def run():
            forward(x).backward(grad)
            x.grad = None

        run()  # warm
        return run

    return {
        "ours": both(ours),
        "peer": both(peer),
        "F.dropout": both(lambda x: F.dropout(x, P)),
        "x*m": both(lambda x: x * mask),
    }


def sampling_memory(shape, p):
    """Peak bytes beyond the mask, per element, that torch allocates while drawing one."""
    law = Block(p, SIZE, 2)
    law.sample(shape)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        mask = law.sample(shape)
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / mask.numel() - mask.element_size()


def realised(shape):
    """The drop rate of one large mask, as a check that the fast path draws the law."""
    return float((Block(P, SIZE, 2).sample(shape, seed=0) == 0).double().mean())


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"threads: {torch.get_num_threads()}, device: {device.type}")
    print("what | measured | limit")
    for shape in SHAPES:
        times = interleaved(passes(shape, device), device)
        own, name = times["ours"], "x".join(map(str, shape))
        if device.type == "cpu":
            print(f"{name} over torchvision's rule | {own / times['peer']:.3f} | 0.1")
            print(f"{name} over x*m | {own / times['x*m']:.2f} | 4")
            print(f"{name} F.dropout over x*m | {times['F.dropout'] / times['x*m']:.2f} | -")
            for p in (0.1, 0.02):
                print(
                    f"{name} bytes beyond the mask an element, p = {p} "
                    f"| {sampling_memory(shape, p):.3f} | 1"
                )
        else:
            print(f"{name} over F.dropout | {own / times['F.dropout']:.2f} | 1.5")
            moved = 5 * 4 * torch.Size(shape).numel()  # x, out, grad, grad of x, and the mask once
            print(f"{name} GB/s | {moved / own / 1e9:.0f} | -")
        print(f"{name} realised rate | {realised(shape):.4f} | 0.1")


if __name__ == "__main__":
    main()
