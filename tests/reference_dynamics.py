"""Slow twins of what dropout does to gradients: sums over every mask of a small network."""

import itertools
from contextlib import contextmanager

import torch
from torch import nn

from tests.reference import all_coins


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(p=0.4, sites=1, units=3, classes=2, activation=nn.Tanh):
    """2 inputs, `sites` hidden layers of `units` with dropout after each, float64."""
    torch.manual_seed(5)
    layers, width = [], 2
    for _ in range(sites):
        layers += [nn.Linear(width, units), activation(), nn.Dropout(p)]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, classes)).double()


def masked_output(net, x, masks):
    """The network's output with `masks` (already over their mean) in place of its dropouts."""
    masks = iter(masks)
    for layer in net:
        x = x * next(masks) if isinstance(layer, nn.Dropout) else layer(x)
    return x


def all_masks(net, n, units, only=None):
    """Probability and masks (n, units) of every site; those not in `only` are ones."""
    drops = [(name, layer) for name, layer in net.named_children() if isinstance(layer, nn.Dropout)]
    outcomes = []
    for name, layer in drops:
        if only is None or name in only:
            coins = all_coins(n * units, layer.p)
            outcomes.append([(w, z.reshape(n, units) / (1 - layer.p)) for w, z in coins])
        else:
            outcomes.append([(1.0, torch.ones(n, units, dtype=torch.float64))])
    for combination in itertools.product(*outcomes):
        weight = 1.0
        for w, _ in combination:
            weight *= w
        yield weight, [mask for _, mask in combination]


def gradients(net, x, y, loss, units=3, only=None):
    """Over all masks: probabilities (M), losses (M), flat gradients (M, d)."""
    weights, losses, found = [], [], []
    parameters = [p for p in net.parameters() if p.requires_grad]
    for weight, masks in all_masks(net, len(x), units, only):
        value = loss(masked_output(net, x, masks), y)
        gradient = torch.autograd.grad(value, parameters)
        weights.append(weight)
        losses.append(value.item())
        found.append(torch.cat([g.flatten() for g in gradient]))
    return (
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(losses, dtype=torch.float64),
        torch.stack(found),
    )


def covariance(weights, samples):
    """The covariance matrix of `samples` (M, d) of probabilities `weights` (M)."""
    centred = samples - weights @ samples
    return centred.mT @ (weights[:, None] * centred)


def dense_hessian(net, x, y, loss):
    """The Hessian of the loss without dropout in all weights, (d, d)."""
    parameters = list(net.parameters())
    sizes = [p.numel() for p in parameters]

    def value(flat):
        parts = [part.view(p.shape) for part, p in zip(flat.split(sizes), parameters, strict=True)]
        named = dict(zip([n for n, _ in net.named_parameters()], parts, strict=True))
        return loss(torch.func.functional_call(net.eval(), named, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    return torch.autograd.functional.hessian(value, flat)


class WrittenLoss:
    """A loss under masks whose gradients, of every mask at every choice of sites, are written out.

    It stands for `MaskedLoss`; masks are told by the names of the sites that drop, and those in
    `tables` are what `gradients` returns. `base` is the loss without masks.
    """

    device = torch.device("cpu")

    def __init__(self, tables, base=0.0):
        self._tables, self._table, self._source = tables, None, None
        self.lawful = [name for names in tables if len(names) == 1 for name in names]
        self.parameters, self.examples, self.unmeasured, self.base = [], 1, {}, base

    def is_idle(self, names):
        return False

    @contextmanager
    def under(self, masks):
        self._source, names = masks
        self._table = self._tables[frozenset(names)]
        yield

    def gradient(self):
        weights, losses, found = self._table
        drawn = int(torch.multinomial(weights, 1, generator=self._source))
        return float(losses[drawn]), (found[drawn],)
