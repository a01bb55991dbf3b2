"""Where randomness comes from: one generator, one seed, never the global stream by accident."""

import secrets
from typing import Final

import torch

# Seeds are kept below 2**53 so that a JSON reader in any language reads them back exactly.
_SEED_BITS: Final = 53


def fresh_seed() -> int:
    """A seed from the operating system, independent of every random stream in the process."""
    return secrets.randbits(_SEED_BITS)


def check_seed(seed: int) -> int:
    """Return `seed`, refusing what a torch.Generator would not take.

    Raises:
        TypeError: if `seed` is not an int.
        ValueError: if `seed` is negative or needs more than 63 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed has to be an int, but got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed has to be between 0 and 2**63 - 1, but got {seed}")
    return seed


def private_generator(
    generator: torch.Generator | None = None,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Generator, int]:
    """The generator a measuring function draws from, and the seed that repeats it.

    Given a `generator`, a seed is drawn from it (so that two calls with one generator differ,
    as they should) and a private generator on `device` starts there. Given a `seed`, that seed.
    Given neither, a seed from the operating system. torch's global streams are never touched.

    Raises:
        TypeError: if `generator` is not a torch.Generator or `seed` not an int.
        ValueError: if both are given, or the seed is out of range.
    """
    if generator is not None and seed is not None:
        raise ValueError("give generator= or seed=, not both")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator has to be a torch.Generator, but got {type(generator).__name__}"
            )
        drawn = torch.randint(
            2**_SEED_BITS, (), generator=generator, device=generator.device, dtype=torch.int64
        )
        seed = int(drawn)
    chosen = fresh_seed() if seed is None else check_seed(seed)
    return torch.Generator(device=device).manual_seed(chosen), chosen
