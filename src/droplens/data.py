"""Data to train on: embedded digits, the papers' small problems, MNIST and CIFAR from disk.

Nothing here touches the network. Rows are examples; images lie in [0, 1].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from droplens import _archives
from droplens.randomness import check_seed


class Examples(NamedTuple):
    """Inputs (n, …) and their targets (n, …), ready to be passed on as a pair."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Split:
    """A training and a test part of one data set, and the names of its classes."""

    train: Examples
    test: Examples
    classes: tuple[str, ...]


def digits(test_share: float = 0.2, seed: int = 0) -> Split:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels: inputs (n, 64) float32 in [0, 1].

    The split is stratified (every digit gives the same share to the test part) and depends on
    `seed` alone.

    >>> split = digits()
    >>> split.train.inputs.shape, split.test.inputs.shape
    (torch.Size([1438, 64]), torch.Size([359, 64]))

    Raises:
        ValueError: if `test_share` is not inside (0, 1), or so extreme that a part is empty.
    """
    from sklearn.datasets import load_digits

    if not 0 < test_share < 1:
        raise ValueError(f"test_share has to be between 0 and 1, but got {test_share}")
    raw = load_digits()
    inputs = torch.as_tensor(raw.data, dtype=torch.float32) / 16
    targets = torch.as_tensor(raw.target, dtype=torch.int64)
    train, test = stratified_split(targets, test_share, seed)
    return Split(
        Examples(inputs[train], targets[train]),
        Examples(inputs[test], targets[test]),
        tuple(str(digit) for digit in range(10)),
    )


def stratified_split(labels: Tensor, test_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part in which every class has the same share.

    Raises:
        ValueError: if a part would be empty.
    """
    generator = torch.Generator().manual_seed(check_seed(seed))
    train, test = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        n_test = round(test_share * len(members))
        test.append(order[:n_test])
        train.append(order[n_test:])
    parts = torch.cat(train).sort().values, torch.cat(test).sort().values
    if not all(len(part) for part in parts):
        raise ValueError(
            f"test_share = {test_share} leaves a part of the {len(labels)} examples empty; "
            "choose it nearer to 0.5"
        )
    return parts


def linear_map(
    n: int, d_in: int = 80, d_out: int = 120, decay: float = 0.1, seed: int = 0
) -> tuple[Examples, Tensor]:
    """A linear teacher y = M x on x ~ N(0, I), with spectrum exp(−decay·i) (P1 Fig. 3).

    M has random singular spaces. Returns the examples, in float64, and M (d_out, d_in).

    Raises:
        ValueError: if `n`, `d_in` or `d_out` is not positive.
    """
    for name, length in (("n", n), ("d_in", d_in), ("d_out", d_out)):
        if length < 1:
            raise ValueError(f"{name} has to be at least 1, but got {length}")
    generator = torch.Generator().manual_seed(check_seed(seed))

    def basis(d: int) -> Tensor:
        # A Gaussian's left singular vectors are uniform over rotations.
        gaussian = torch.randn(d, min(d_in, d_out), generator=generator, dtype=torch.float64)
        U, _, V = torch.linalg.svd(gaussian, full_matrices=False)
        rotation: Tensor = U @ V
        return rotation

    spectrum = torch.exp(-decay * torch.arange(min(d_in, d_out), dtype=torch.float64))
    M = basis(d_out) * spectrum @ basis(d_in).mT
    X = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    return Examples(X, X @ M.mT), M


def double_step(n: int = 15) -> Examples:
    """The double step y = tanh(x − 6) + tanh(x + 6) at `n` points of [−12, 12] (P2 Fig. 4).

    >>> double_step(3).inputs.flatten().tolist()
    [-12.0, 0.0, 12.0]
    """
    x = torch.linspace(-12, 12, n)[:, None]
    return Examples(x, torch.tanh(x - 6) + torch.tanh(x + 6))


def relu_pair(points: Tensor | None = None) -> Examples:
    """Two kinks, y = ½ReLU(−x − ⅓) + ½ReLU(x − ⅓), by default at ±5/3, ±1, ±1/3 (P2 Fig. 1)."""
    x = (torch.arange(-5, 6, 2) / 3 if points is None else points.flatten())[:, None]
    return Examples(x, (torch.relu(-x - 1 / 3) + torch.relu(x - 1 / 3)) / 2)


def tanh_ridge(n: int = 30, d_in: int = 10, seed: int = 0) -> Examples:
    """A ridge y = tanh(Σ x_i) on x ~ N(0, I) (P2 Fig. 7): (n, d_in), (n, 1)."""
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(check_seed(seed)))
    return Examples(x, torch.tanh(x.sum(1, keepdim=True)))


def two_neurons(n: int, seed: int = 0) -> Examples:
    """A teacher of two tanh neurons, six parameters, on x ~ U[−10, 10] (P2 Fig. 8): (n, 1)."""
    generator = torch.Generator().manual_seed(check_seed(seed))
    x = torch.rand(n, 1, generator=generator) * 20 - 10
    w, b, a = torch.randn(3, 2, generator=generator)
    return Examples(x, (torch.tanh(x * w + b) * a).sum(1, keepdim=True))


def mnist(folder: str | Path, limit: int | None = None) -> Split:
    """MNIST (or a data set in its format) from IDX files in `folder`: inputs (n, 1, 28, 28).

    Reads `train-images-idx3-ubyte` and its three companions, also with `.gz` and also from
    torchvision's `MNIST/raw`. `limit` reads only that many first images of each part.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is corrupt, images and labels differ in number, or `limit` is not
            positive.
    """
    _check_limit(limit)

    def part(prefix: str) -> Examples:
        images = _archives.read_idx(folder, f"{prefix}-images-idx3-ubyte", 3, limit)
        labels = _archives.read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1, limit)
        if len(images) != len(labels):
            raise ValueError(
                f"folder {str(folder)!r} holds {len(images)} {prefix} images but "
                f"{len(labels)} labels; fetch the files again"
            )
        return Examples(_scaled(images[:, None]), torch.tensor(labels, dtype=torch.int64))

    return Split(part("train"), part("t10k"), tuple(str(digit) for digit in range(10)))


def cifar10(folder: str | Path, limit: int | None = None) -> Split:
    """CIFAR-10 from `folder`: inputs (n, 3, 32, 32), targets (n,) in 0…9.

    Reads the python or the binary version, unpacked or as the archive that its authors publish
    (`cifar-10-python.tar.gz`, `cifar-10-binary.tar.gz`). The python version consists of pickles;
    they are read by an unpickler that can build arrays, numbers, text and containers and runs
    nothing else. `limit` reads only that many first images of each part.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is corrupt or carries code, or `limit` is not positive.
    """
    _check_limit(limit)
    train, test, names = _archives.read_cifar(folder, _archives.CIFAR10, "fine", limit)
    return _cifar_split(train, test, names)


def cifar100(
    folder: str | Path, labels: Literal["fine", "coarse"] = "fine", limit: int | None = None
) -> Split:
    """CIFAR-100 from `folder`, by its 100 `"fine"` or 20 `"coarse"` labels; else as `cifar10`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is corrupt or carries code, `labels` is neither of the two, or
            `limit` is not positive.
    """
    if labels not in {"fine", "coarse"}:
        raise ValueError(f"labels has to be 'fine' or 'coarse', but got {labels!r}")
    _check_limit(limit)
    train, test, names = _archives.read_cifar(folder, _archives.CIFAR100, labels, limit)
    return _cifar_split(train, test, names)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit has to be at least 1, but got {limit}")


def _cifar_split(
    train: _archives.RawImages, test: _archives.RawImages, names: tuple[str, ...]
) -> Split:
    def part(raw: _archives.RawImages) -> Examples:
        images = raw.pixels.reshape(-1, 3, 32, 32)
        return Examples(_scaled(images), torch.tensor(raw.labels))

    return Split(part(train), part(test), names)


def _scaled(pixels: "_archives.Bytes") -> Tensor:
    # A copy: the array may be a read-only view of the file's bytes.
    return torch.tensor(pixels).float().div_(255)
