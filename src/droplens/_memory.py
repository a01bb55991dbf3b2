"""The C allocator's habits, where they cost more than the arithmetic."""

from functools import cache

import torch

# The largest block after which glibc still raises its limits (mallopt(3), M_MMAP_THRESHOLD).
_LARGEST_BLOCK = 31 << 20


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory at hand, once a process.

    Rows of a Jacobian live together for a moment and are freed together, and so do the gradients of
    a Hessian product. By default glibc then hands their pages back to the system and has every one
    cleared again at the next call: a tenth to a quarter of a penalty's or a product's time. Its
    limits rise by themselves when a large block has been freed, so an untouched one is allocated
    and dropped; other allocators lose nothing by it.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8, device="cpu")
