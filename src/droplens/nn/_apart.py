"""What a captured graph leaves to eager mode.

Imported while one is captured, never before: the decorator alone pulls in a second and a half of
compiler.
"""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="no graph can hold a generator; give the layer seed= instead"
)
def apart(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, run outside the graph."""
    return function(x)
