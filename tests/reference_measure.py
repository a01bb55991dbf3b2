"""Slow, obvious twins of the measures: dense Jacobians and Hessians, brute force over neurons."""

import math

import torch
from torch.func import functional_call, hessian, jacrev


def flat_parameters(model):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = dict(model.named_parameters())
    return names, torch.cat([values[name].detach().flatten() for name in names])


def unflatten(model, names, flat):
    values = dict(model.named_parameters())
    sizes = [values[name].numel() for name in names]
    return {
        name: part.view(values[name].shape)
        for name, part in zip(names, flat.split(sizes), strict=True)
    }


def loss_of_parameters(model, inputs, targets, loss):
    """The loss as a function of one flat vector; the model has to be in eval."""
    names, flat = flat_parameters(model)

    def value(vector):
        return loss(functional_call(model, unflatten(model, names, vector), (inputs,)), targets)

    return value, flat


def dense_hessian(model, inputs, targets, loss):
    value, flat = loss_of_parameters(model, inputs, targets, loss)
    return hessian(value)(flat)


def dense_jacobian(model, inputs):
    """∂outputs/∂parameters: (*outputs, d)."""
    names, flat = flat_parameters(model)
    return jacrev(
        lambda vector: functional_call(model, unflatten(model, names, vector), (inputs,))
    )(flat)


def dense_fisher(model, inputs, targets, loss):
    """Jᵀ (∇²loss in the outputs) J: for these losses the output Hessian needs no label."""
    with torch.no_grad():
        outputs = model(inputs)
    H = hessian(lambda f: loss(f, targets))(outputs)
    J = dense_jacobian(model, inputs).flatten(0, outputs.dim() - 1)
    return J.mT @ H.reshape(outputs.numel(), outputs.numel()) @ J


def dense_empirical_fisher(model, inputs, targets, loss):
    """(1/n) Σ g gᵀ with g the gradient of one example's own loss; mean reduction."""
    n = len(inputs)
    total = 0
    for i in range(n):
        value, flat = loss_of_parameters(model, inputs[i : i + 1], targets[i : i + 1], loss)
        g = jacrev(value)(flat)
        total = total + torch.outer(g, g) / n
    return total


def greedy_cover(weights, amplitudes, tolerance, signed):
    """Labels by falling amplitude, one neuron and one representative at a time."""
    order = sorted(range(len(weights)), key=lambda j: (-float(amplitudes[j]), j))
    largest = max(float(a) for a in amplitudes)
    representatives, labels = [], [-1] * len(weights)
    for j in order:
        norm = float(weights[j].norm())
        if float(amplitudes[j]) < 0.01 * largest or norm == 0 or float(amplitudes[j]) == 0:
            continue
        unit = weights[j] / norm
        for group, r in enumerate(representatives):
            cosine = float(unit @ weights[r] / weights[r].norm())
            if (cosine if signed else abs(cosine)) > 1 - tolerance:
                labels[j] = group
                break
        else:
            labels[j] = len(representatives)
            representatives.append(j)
    return labels, representatives


def entropy_number(shares):
    return math.exp(-sum(s * math.log(s) for s in shares if s > 0))


def dense_curvature(point, metric, theta, v):
    """κ and the parameter effects of z(θ) along v from the whole J and all second derivatives."""
    J = torch.func.jacfwd(point)(theta)
    second = torch.func.jacfwd(torch.func.jacfwd(point))(theta)  # (m, d, d)
    d, a = J @ v, torch.einsum("mij,i,j->m", second, v, v)
    # A square root of the metric turns its lengths into plain ones.
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.clamp_min(0).sqrt()
    span, sizes, _ = torch.linalg.svd(root.mT @ J, full_matrices=False)
    span = span[:, sizes > 1e-11 * sizes[0]]
    inside = span @ (span.mT @ (root.mT @ a))
    speed = float((root.mT @ d).norm()) ** 2
    return float((root.mT @ a - inside).norm()) / speed, float(inside.norm()) / speed


def mean_metric(f, connection, loss):
    """Block diagonal over inputs, H or its pseudo-inverse, divided by n; loss "ce" or "mse"."""
    n, C = f.shape
    blocks = []
    for row in f:
        if loss == "ce":
            pi = torch.softmax(row, 0)
            H = torch.diag(pi) - torch.outer(pi, pi)
            blocks.append(H if connection == "e" else torch.linalg.pinv(H, hermitian=True))
        else:
            blocks.append(2 / C * torch.eye(C, dtype=f.dtype))
    return torch.block_diag(*blocks) / n
