"""What the masks do while a network is measured: nothing, held still, or averaged over."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from droplens.calling import check_weights, dense_gradients
from droplens.gates import HeldMasks, masks_held, masks_off

Masks = Literal["off", "fixed", "expected"]


@dataclass(frozen=True)
class Masking:
    """One of the three modes.

    Args:
        mode: "off", dropout is the identity; "fixed", one draw of masks is held wherever the
            network is evaluated; "expected", the mean over `draws` such draws, the same ones
            everywhere (common random numbers).
        draws: for "expected".
        seed: of the masks.

    Raises:
        ValueError: if `mode` is none of the three, or "expected" has fewer than two draws.
    """

    mode: Masks
    draws: int
    seed: int

    def __post_init__(self) -> None:
        if self.mode not in get_args(Masks):
            raise ValueError(f"masks has to be 'off', 'fixed' or 'expected', but got {self.mode!r}")
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 2:
            raise ValueError(f"draws has to be at least 2, but got {self.draws!r}")

    @property
    def rows(self) -> int:
        """How many draws there are at most."""
        return self.draws if self.mode == "expected" else 1

    @property
    def seed_used(self) -> int | None:
        """The seed, where masks were drawn from it."""
        return None if self.mode == "off" else self.seed

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator["Applied"]:
        """While open, the model's dropout behaves so, and norm layers are in eval.

        Yields:
            What chooses among the draws.
        """
        check_weights(model)
        with dense_gradients(model):
            if self.mode == "off":
                with masks_off(model):
                    yield Applied(1, None)
                return
            with masks_held(model, self.seed) as held:
                yield Applied(self.rows, held)


class Applied:
    """The draws of a mode that is in force."""

    def __init__(self, count: int, held: HeldMasks | None) -> None:
        self.count, self._held = count, held

    @property
    def drops(self) -> bool:
        """Whether units may be dropped."""
        return self._held is not None

    def hold(self, draw: int, batch: int) -> None:
        """Say whose masks the next forward pass has."""
        if self._held is not None:
            self._held.hold(draw, batch)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """While open, nothing is dropped; no masks are used up.

        Yields:
            Nothing.
        """
        if self._held is None:
            yield
            return
        self._held.idle = True
        try:
            yield
        finally:
            self._held.idle = False

    def settle(self) -> None:
        """After a forward pass: a network that dropped nothing needs no second draw."""
        if self._held is not None and not self._held.drew:
            self.count = 1
