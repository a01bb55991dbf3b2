"""One forward and C backward passes, to wherever a penalty has to go: what its value is held to."""

import torch
import torch.nn.functional as F
from torch import nn

from droplens.gates import masks_replaced


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


def mapped_passes(net, x):
    """One forward and C backward passes to weights of every example's own, by `torch.func.vmap`."""
    own = {
        f"{name}.weight": module.weight.detach().expand(len(x), *module.weight.shape)
        for name, module in net.eval().named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
    }
    own = {name: weight.requires_grad_() for name, weight in own.items()}

    def outputs(weights, example):
        return torch.func.functional_call(net, weights, (example.unsqueeze(0),)).squeeze(0)

    pull_back(torch.func.vmap(outputs)(own, x), list(own.values()))


def unfolded_passes(net, x):
    """The same by hand: every layer's gradient at its result times what its weight met.

    Patches of an image are laid out once, and a product an example made in every pass.
    """
    met = []

    def keep(layer, given, result):
        met.append((layer, given[0].detach(), result))

    kinds = (nn.Linear, nn.Conv2d)
    hooks = [m.register_forward_hook(keep) for m in net.modules() if type(m) in kinds]
    outputs = net.eval()(x)
    for hook in hooks:
        hook.remove()
    results = [result for *_, result in met]
    factors = [_factor(layer, given) for layer, given, _ in met]
    for c in range(outputs.shape[1]):
        cotangent = torch.zeros_like(outputs)
        cotangent[:, c] = 1
        gradients = torch.autograd.grad(outputs, results, cotangent, retain_graph=True)
        for gradient, factor, (layer, *_) in zip(gradients, factors, met, strict=True):
            rows = gradient.flatten(2) if type(layer) is nn.Conv2d else _rows(gradient).mT
            rows @ factor


def _factor(layer, given):
    """What a layer's weight meets, (n, places, numbers)."""
    if type(layer) is nn.Linear:
        return _rows(given)
    return F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT


def _rows(vectors):
    return vectors.flatten(1, -2) if vectors.dim() > 2 else vectors.unsqueeze(1)


def pull_back(outputs, tensors):
    for c in range(outputs.shape[1]):
        cotangent = torch.zeros_like(outputs)
        cotangent[:, c] = 1
        torch.autograd.grad(outputs, tensors, cotangent, retain_graph=True)
