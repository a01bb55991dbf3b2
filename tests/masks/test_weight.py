from functools import partial
from typing import ClassVar

from droplens.masks import Law, Weight
from tests import reference_masks as reference
from tests.masks.conformance import Case, LawConformance


class TestWeight(LawConformance):
    cases: ClassVar[list[Case]] = [
        Case(f"p={p}", Weight(p), (2, 2), partial(reference.bernoulli, p, (2, 2)))
        for p in (0.5, 0.05, 0.9)
    ]

    @staticmethod
    def make(p: float) -> Law:
        return Weight(p)
