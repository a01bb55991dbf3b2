"""What was tried to better the Gaussian spread: `python -m benchmarks.spread_attempts`.

Prints the second table of docs/gaussian.md: the networks of the first, each attempt's error against
Monte Carlo, all in float64. Then, for the trained MLP, what balanced masks do.
"""

import sys

import torch
from torch import Tensor, nn

import droplens as dl
from benchmarks.networks import NETWORKS, set_rate
from benchmarks.spread_table import RATES, loss, made
from droplens.data import digits
from droplens.gates import draw_masks, masks_off, masks_replaced
from droplens.losses import family
from droplens.penalties._masks import pseudo_values

EXAMPLES, DRAWS, FEW = 128, 400, 8
BALANCED, REPEATS = 16, 200
# A step along the masks' noise so small that the network is linear in it.
STEP = 1e-5
CATEGORICAL = family(loss)


def outputs(net: nn.Module, x: Tensor, draws: int, step: float = 1.0) -> Tensor:
    """The outputs under masks 1 + step (z − 1), (draws, n, C); the same z at every step."""
    draw = draw_masks(torch.Generator().manual_seed(1))

    def visit(call, units):
        return units + step * (draw(call, units) - units)

    with torch.no_grad(), masks_replaced(net, visit):
        return torch.stack([net(x) for _ in range(draws)])


def spread(f: Tensor) -> float:
    """E A(f_z) − A(E f_z) of the draws, averaged over examples; biased by 1/draws, unlike truth."""
    return float((f.logsumexp(-1).mean(0) - f.mean(0).logsumexp(-1)).mean())


def covariance(f: Tensor) -> Tensor:
    """Of the draws' contrasts, (n, C − 1, C − 1)."""
    noise = (f - f.mean(0)) @ CATEGORICAL.contrasts(f[0, :, None]).mT  # (draws, n, C − 1)
    return torch.einsum("kni,knj->nij", noise, noise) / (len(f) - 1)


def gaussian(at: Tensor, K: Tensor) -> float:
    return float(CATEGORICAL.noise_spread(at, K).mean())


def explained(f: Tensor, linear: Tensor, at: Tensor) -> float:
    """The share of the variance between draws that the second-order value of each explains."""
    own = f.logsumexp(-1) - (torch.softmax(f.mean(0), -1) * (f - f.mean(0))).sum(-1)
    step, mean = linear - at, torch.softmax(at, -1)
    second = 0.5 * ((mean * step.square()).sum(-1) - (mean * step).sum(-1).square())
    pairs = torch.stack([own.mean(1), second.mean(1)])
    return float(torch.corrcoef(pairs)[0, 1].square())


def line(name: str, trained: bool, p: float, net: nn.Module, x: Tensor) -> None:
    set_rate(net, p)
    with torch.no_grad(), masks_off(net):
        at = net(x)
    with torch.no_grad():
        truth = float(dl.penalty(net, x, loss, "masks", draws=DRAWS, seed=1))
        plain = float(dl.penalty(net, x, loss))
    f = outputs(net, x, DRAWS)
    linear = at + (outputs(net, x, DRAWS, STEP) - at) / STEP
    true, first, few = covariance(f), covariance(linear), f[:FEW]
    scale = covariance(few).diagonal(dim1=1, dim2=2).sum() / first.diagonal(dim1=1, dim2=2).sum()
    found = [
        plain,
        spread(linear),
        gaussian(at, true),
        gaussian(f.mean(0), true),
        gaussian(few.mean(0), scale * first),
    ]
    errors = " | ".join(f"{100 * (value / truth - 1):+.0f}%" for value in found)
    share = 100 * explained(f, linear, at)
    state = "trained" if trained else "untrained"
    print(f"| {name} | {state} | {p} | {errors} | {share:.0f}% |", flush=True)


def balanced(shape: torch.Size, p: float, source: torch.Generator) -> Tensor:
    """Masks (K, *shape) that drop every unit in ⌊pK⌋ or ⌈pK⌉ of the K draws, pK on average."""
    options = {"generator": source, "dtype": torch.float64}
    turns = torch.rand(BALANCED, *shape, **options).argsort(0)
    return ((turns + torch.rand(shape, **options)) / BALANCED % 1 >= p) / (1 - p)


def from_few(net: nn.Module, x: Tensor, p: float, source: torch.Generator, even: bool) -> float:
    """The jackknife's spread from K masks, balanced or drawn independently."""
    masks: dict[str, Tensor] = {}
    drawn = []
    independent = draw_masks(source)
    for k in range(BALANCED):

        def visit(call, units, k=k):
            if not even:
                return independent(call, units)
            if call.name not in masks:
                masks[call.name] = balanced(units.shape, p, source)
            return units * masks[call.name][k]

        with torch.no_grad(), masks_replaced(net, visit):
            drawn.append(net(x))
    f = torch.stack(drawn).unsqueeze(2)  # (K, n, 1, C)
    return float(pseudo_values(CATEGORICAL, f).mean())


def balance(net: nn.Module, x: Tensor) -> None:
    """The table of balanced masks: deviations and errors in percent of the spread."""
    print(f"\n| p | deviation of {BALANCED} masks | balanced | error of balanced |")
    print("| --- | --- | --- | --- |")
    for p in RATES:
        set_rate(net, p)
        found = {}
        for even in (False, True):
            source = torch.Generator().manual_seed(0)
            found[even] = torch.tensor([from_few(net, x, p, source, even) for _ in range(REPEATS)])
        truth = found[False].mean()  # unbiased
        deviations = " | ".join(f"{100 * values.std() / truth:.1f}%" for values in found.values())
        error = 100 * (found[True].mean() / truth - 1)
        print(f"| {p} | {deviations} | {error:+.1f}% |", flush=True)


def main() -> None:
    x = digits().test.inputs[:EXAMPLES].double()
    print(
        "| network | | p | Gaussian | linearised, real coins | true covariance around f "
        "| around E f_z | scaled by 8 masks | explained by a control |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or NETWORKS:
        for trained in (False, True):
            net = made(name, trained).double()
            for p in RATES:
                line(name, trained, p, net, x)
    balance(made("MLP", True).double(), x)


if __name__ == "__main__":
    main()
