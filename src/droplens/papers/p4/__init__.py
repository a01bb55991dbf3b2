"""P4."""

from droplens.papers._claim import Claim

CLAIMS: tuple[Claim, ...] = ()
