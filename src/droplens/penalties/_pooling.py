"""Values of parts of the data put together: batches of a loader, processes of a group."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from droplens.batches import Batches, as_batches
from droplens.calling import check_model
from droplens.estimates import Estimate, cumulants, from_cumulants

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def streamed(
    inputs: Any, targets: Tensor | None, model: nn.Module, loss: object = None
) -> Batches | None:
    """Batches to stream, where `inputs` is a loader or a data set rather than a model's inputs.

    Raises:
        TypeError: if `model` is no torch module, or `targets` are no tensor.
        ValueError: if `targets` are given beside a loader, which brings its own.
    """
    check_model(model)
    if targets is not None and not isinstance(targets, Tensor):
        raise TypeError(f"targets has to be a tensor, but got {type(targets).__name__}")
    if isinstance(inputs, Tensor | Mapping | list | tuple | str):
        return None
    if not isinstance(inputs, Iterable | torch.utils.data.Dataset | Batches):
        return None
    if targets is not None:
        raise ValueError(
            "targets has to be None where inputs is a loader or a data set: its batches bring them"
        )
    return as_batches(inputs, model, loss)


def check_sites(sites: object) -> None:
    """Refuse one name where a list of them is asked for: its letters would be taken for names.

    Raises:
        TypeError: if `sites` is a string.
    """
    if isinstance(sites, str):
        raise TypeError(f"sites has to be a list of names, but got a string; write [{sites!r}]")


def shares(divisors: Sequence[float | None]) -> list[float]:
    """What each part counts in the whole: by what its mean divides by; 1 for sums (None)."""
    total = sum(divisor or 0.0 for divisor in divisors)
    return [1.0 if divisor is None else divisor / total for divisor in divisors]


def weighted(weights: Sequence[float], values: Iterable[Any]) -> Any:
    """Σ w v, of numbers or tensors; a part of no weight has no value, its mean is 0/0."""
    return sum(w * v for w, v in zip(weights, values, strict=True) if w)


def by_name(weights: Sequence[float], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Σ w v under every name; a part that does not have it adds nothing."""
    names = dict.fromkeys(name for part in values for name in part)
    return {
        name: sum(
            w * part[name] for w, part in zip(weights, values, strict=True) if w and name in part
        )
        for name in names
    }


def merged(reasons: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """All reasons, the first of each name."""
    whole: dict[str, str] = {}
    for part in reasons:
        whole = {**part, **whole}
    return whole


def pooled(weights: Sequence[float], values: Sequence[Estimate]) -> Estimate:
    """Σ w v of independent estimates; a part of no weight has no value."""
    parts = [cumulants(v, w) for w, v in zip(weights, values, strict=True) if w]
    sums = zip(*parts, strict=True) if parts else [[0.0]] * 4
    return from_cumulants([sum(column) for column in sums], values[0])


class Group:
    """The processes of a torch.distributed group, each with a part of the data.

    Args:
        divisor: what this process's mean divides by; None for sums.
        names: what the processes hold numbers for; they have to agree.
        group: None means the default group.

    Raises:
        RuntimeError: if torch.distributed has not been initialised.
        ValueError: if the processes hold different names.
    """

    def __init__(
        self, divisor: float | None, names: Iterable[str], group: "ProcessGroup | None"
    ) -> None:
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "all_reduce needs a process group; call torch.distributed.init_process_group first"
            )
        self._group = group
        self.size = distributed.get_world_size(group)
        nccl = distributed.get_backend(group) == "nccl"
        self._device = torch.device("cuda" if nccl else "cpu")
        if not self.agree(zlib.crc32("\n".join(names).encode())):
            raise ValueError(
                "the processes met different sites or rates; give all of them the same model and "
                "the same arguments"
            )
        total = self.summed([divisor or 0.0])[0]
        # What this process counts in the whole.
        self.share = 1.0 if divisor is None else divisor / total
        self.divisor = None if divisor is None else total

    def agree(self, number: int) -> bool:
        """Whether all processes hold the same number."""
        from torch import distributed

        extremes = torch.tensor([number, -number], dtype=torch.int64, device=self._device)
        distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX, group=self._group)
        return int(extremes[0]) == -int(extremes[1])

    def check_seeds(self, seed: int | None) -> None:
        """Refuse draws that the processes share.

        Raises:
            ValueError: if all processes drew from one seed.
        """
        if seed is not None and self.size > 1 and self.agree(seed):
            raise ValueError(
                f"all processes drew from seed {seed}, so their errors are not independent; give "
                "each its own seed, or none"
            )

    def summed(self, values: Sequence[float]) -> list[float]:
        """The processes' values added up."""
        from torch import distributed

        found = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        distributed.all_reduce(found, group=self._group)
        return [float(value) for value in found.cpu()]

    def pooled(self, values: Sequence[Estimate]) -> list[Estimate]:
        """Independent estimates of all processes, weighed by their share."""
        parts = [cumulants(v, self.share) for v in values]
        sums = [self.summed(part) for part in zip(*parts, strict=True)]
        return [from_cumulants(row, v) for *row, v in zip(*sums, values, strict=True)]
