"""Every layer, an input it takes, and its function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from droplens import masks
from droplens import nn as dn
from droplens.nn import functional as DF


@dataclass(frozen=True)
class LayerCase:
    name: str
    make: Callable[..., dn.MaskedLayer]  # (p, **options)
    shape: tuple[int, ...]
    function: Callable[..., Tensor]  # (x, p, **options)
    law: Callable[[float], masks.Law]

    def __str__(self) -> str:
        return self.name


def case(
    kind: str,
    shape: tuple[int, ...],
    function: Callable[..., Tensor],
    law: Callable[[float], masks.Law],
    **settings: Any,
) -> LayerCase:
    layer = getattr(dn, kind)
    suffix = "-shared" if settings.get("shared") else ""
    return LayerCase(
        kind + suffix,
        lambda p, **options: layer(p, **settings, **options),
        shape,
        lambda x, p, **options: function(x, p, **settings, **options),
        law,
    )


CASES = [
    case("Dropout", (4, 6), DF.dropout, masks.Bernoulli),
    case("GaussianDropout", (4, 6), DF.gaussian_dropout, masks.Gaussian),
    case("DropPath", (6, 3, 2), DF.drop_path, masks.Path),
    case("GroupedDropout", (4, 6), DF.grouped_dropout, lambda p: masks.Grouped(p, 3), size=3),
    case("Dropout1d", (4, 3, 5), DF.dropout1d, masks.Channel),
    case("Dropout2d", (4, 3, 5, 2), DF.dropout2d, masks.Channel),
    case("Dropout3d", (4, 3, 2, 2, 2), DF.dropout3d, masks.Channel),
    case("DropBlock1d", (4, 3, 7), DF.drop_block1d, lambda p: masks.Block(p, 3, 1), block_size=3),
    case(
        "DropBlock2d", (4, 3, 6, 5), DF.drop_block2d, lambda p: masks.Block(p, 3, 2), block_size=3
    ),
    case(
        "DropBlock2d",
        (4, 3, 6, 5),
        DF.drop_block2d,
        lambda p: masks.Block(p, 3, 2, True),
        block_size=3,
        shared=True,
    ),
    case(
        "DropBlock3d",
        (2, 3, 4, 3, 4),
        DF.drop_block3d,
        lambda p: masks.Block(p, 2, 3),
        block_size=2,
    ),
    LayerCase(
        "Masked",
        lambda p, **options: dn.Masked(masks.Grouped(p, 2), **options),
        (4, 6),
        lambda x, p, **options: DF.apply(x, masks.Grouped(p, 2), **options),
        lambda p: masks.Grouped(p, 2),
    ),
]
