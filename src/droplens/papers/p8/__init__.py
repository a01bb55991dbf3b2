"""P8."""

from droplens.papers._claim import Claim

CLAIMS: tuple[Claim, ...] = ()
