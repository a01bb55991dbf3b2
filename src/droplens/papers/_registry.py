"""All claims, by paper: a paper joins by its package and a line here."""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Final

from droplens.papers._claim import Claim

PAPERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "P1": "Mianjy, Arora, Vidal: On the Implicit Bias of Dropout (ICML 2018)",
        "P4": "Pal, Lane, Vidal, Haeffele: On the Regularization Properties of Structured Dropout "
        "(CVPR 2020)",
        "P8": "Cavazza et al.: Dropout as a Low-Rank Regularizer for Matrix Factorization "
        "(AISTATS 2018)",
    }
)
"""Paper -> authors, title, year. The package `droplens.papers.<id>` holds its `CLAIMS`."""


@cache
def claims() -> tuple[Claim, ...]:
    """Every claim, in the order of the papers.

    Raises:
        ValueError: if two claims bear one id.
    """
    found: list[Claim] = []
    for paper in PAPERS:
        found += importlib.import_module(f"droplens.papers.{paper.lower()}").CLAIMS
    ids = [claim.id for claim in found]
    twice = {one for one in ids if ids.count(one) > 1}
    if twice:
        raise ValueError(f"these claims have to have ids of their own: {', '.join(twice)}")
    return tuple(found)


def select(names: Sequence[str] = ()) -> tuple[Claim, ...]:
    """The claims that papers and claims are named of; all without a name.

    Raises:
        ValueError: if a name is neither a paper nor a claim.
    """
    if not names:
        return claims()
    wanted: set[str] = set()
    for name in names:
        matching = {
            claim.id
            for claim in claims()
            if name.lower() in {claim.id.lower(), claim.paper.lower()}
        }
        if not matching:
            raise ValueError(_unknown(name))
        wanted |= matching
    return tuple(claim for claim in claims() if claim.id in wanted)


def find(identity: str) -> Claim:
    """The claim of this id.

    Raises:
        ValueError: if there is none.
    """
    for claim in claims():
        if claim.id == identity:
            return claim
    raise ValueError(_unknown(identity))


def _unknown(name: str) -> str:
    known = [*PAPERS, *(claim.id for claim in claims())]
    by_lower = {one.lower(): one for one in known}
    near = [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else "see droplens reproduce --list"
    return f"no paper or claim is called {name!r}; {hint}"
