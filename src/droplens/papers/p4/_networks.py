"""P4, RQ3: the deep networks, and how many of one architecture train at once."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn

from droplens._stacks import lent_stream, stack
from droplens.masks import Grouped
from droplens.papers._claim import Setting
from droplens.papers._streams import device_of
from droplens.papers._theory import Theory
from droplens.randomness import private_generator


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        result: Tensor = x + self.inner(x)
        return result


def mlp(shape: tuple[int, int, int], features: int, width: int) -> nn.Sequential:
    """Two hidden layers of `width`."""
    sizes = (shape[0] * shape[1] * shape[2], width, width)
    hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, features))


def vgg(shape: tuple[int, int, int], features: int, width: int) -> nn.Sequential:
    """Three convolutions in two stages, each with pooling."""
    c, h, w = shape
    return nn.Sequential(
        nn.Conv2d(c, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (h // 4) * (w // 4), features),
    )


def resnet(shape: tuple[int, int, int], features: int, width: int) -> nn.Sequential:
    """Two residual blocks in two stages, without normalisation."""
    c, h, w = shape
    return nn.Sequential(
        nn.Conv2d(c, width, 3, padding=1),
        Residual(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        Residual(2 * width),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (h // 4) * (w // 4), features),
    )


BODIES: Final[Mapping[str, Callable[[tuple[int, int, int], int, int], nn.Sequential]]] = {
    "MLP": mlp,
    "VGG": vgg,
    "ResNet": resnet,
}
"""Name -> a network from images (c, h, w) to features."""


class Networks:
    """N networks of one architecture: a body, dropout of its r features, a last layer without bias.

    Bodies are stacked, but for convolutions on a CPU, which run one after the other: with weights
    of N networks they become grouped ones, and these take up to 1.5 times as long there.
    """

    def __init__(
        self,
        bodies: Sequence[nn.Module],
        last: Sequence[nn.Linear],
        streams: list[torch.Generator],
        inputs: Tensor,
    ) -> None:
        self._last = torch.stack([layer.weight.detach() for layer in last]).requires_grad_()
        convolves = any(isinstance(part, nn.Conv2d) for part in bodies[0].modules())
        if convolves and inputs.device.type == "cpu":
            self._features = _one_by_one(bodies)
            own: list[Tensor] = [weight for body in bodies for weight in body.parameters()]
        else:
            stacked = stack(bodies, nn.MSELoss(), streams, inputs)
            self._features, own = stacked.outputs, stacked.parameters
        self.parameters = [*own, self._last]

    def __call__(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Outputs (N, B, 10) for x (N, B, c, h, w)."""
        features = self._features(x)  # (N, B, r)
        if masks is not None:
            features = features * masks
        outputs: Tensor = features @ self._last.mT
        return outputs


def _one_by_one(bodies: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    def features(x: Tensor) -> Tensor:
        return torch.stack([body(images) for body, images in zip(bodies, x, strict=True)])

    return features


def train_networks(
    data: tuple[Tensor, Tensor],
    setting: Setting,
    seeds: Sequence[int],
    theory: Theory,
    signed: bool,
) -> Tensor:
    """The predictions (CS, n, 10) on the training images after training with squared loss.

    A run draws its weights, its order of examples and its masks from one stream of its own, so that
    it does not depend on those beside it. Adam; its step size falls linearly to zero over the
    second half.
    """
    device = device_of(setting)
    inputs, targets = (tensor.to(device) for tensor in data)
    laws = [
        Grouped(0.0 if theory.swapped else 1 - keep, block)
        for keep, block in zip(setting["keep"], setting["block"], strict=True)
        for _ in seeds
    ]
    streams = [private_generator(seed=seed)[0] for _ in setting["keep"] for seed in seeds]
    coins = streams if device == "cpu" else [_twin(stream, device) for stream in streams]
    bodies, last = _started(setting, inputs, streams, signed)
    networks = Networks(bodies, last, coins, inputs)
    rate, steps, size, n = setting["rate"], setting["steps"], setting["batch"], len(inputs)
    optimizer = torch.optim.Adam(networks.parameters, lr=rate, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        orders = [torch.randperm(n, generator=stream)[:size] for stream in streams]
        rows = torch.stack(orders).to(device)  # (N, B)
        masks = _masks(laws, (rows.shape[1], setting["r"]), coins)
        errors = networks(inputs[rows], masks) - targets[rows]
        optimizer.zero_grad(set_to_none=True)
        errors.square().sum(2).mean(1).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return networks(inputs.expand(len(streams), *inputs.shape)).double().cpu()


def _started(
    setting: Setting, inputs: Tensor, streams: Sequence[torch.Generator], signed: bool
) -> tuple[list[nn.Module], list[nn.Linear]]:
    """A body and a last layer from each stream."""
    _, c, h, w = inputs.shape
    bodies: list[nn.Module] = []
    last: list[nn.Linear] = []
    for stream in streams:
        # Layers start from torch's global stream.
        with lent_stream(stream):
            body = BODIES[setting["network"]]((c, h, w), setting["r"], setting["width"])
            bodies.append(body if signed else nn.Sequential(body, nn.ReLU()))
            last.append(nn.Linear(setting["r"], 10, bias=False))
    return [body.to(inputs.device) for body in bodies], [one.to(inputs.device) for one in last]


def _twin(stream: torch.Generator, device: str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(stream.initial_seed())


def _masks(
    laws: Sequence[Grouped], shape: tuple[int, int], streams: Sequence[torch.Generator]
) -> Tensor | None:
    """A mask (N, B, r) from each network's law and stream; at a rate of 0 nothing is drawn."""
    if not any(law.p for law in laws):
        return None
    device = streams[0].device
    pairs = zip(laws, streams, strict=True)
    return torch.stack([law.sample(shape, generator=g, device=device) for law, g in pairs])
