"""Which labels a loss counts: all but its ignore_index."""

from torch import Tensor

# torch's default ignore_index.
IGNORED = -100

NO_LABEL = "targets holds no label but ignore_index, so there is no loss"


def ignored_label(loss: object) -> int | None:
    """The label that a loss leaves out; None if it counts all.

    >>> from torch import nn
    >>> ignored_label(nn.CrossEntropyLoss(ignore_index=0)), ignored_label(nn.MSELoss())
    (0, None)
    """
    return getattr(loss, "ignore_index", None)


def holds_label(targets: Tensor | None, ignored: int | None) -> bool:
    """Whether any of these targets counts."""
    if targets is None or ignored is None or targets.is_floating_point():
        return True
    return bool((targets != ignored).any())
