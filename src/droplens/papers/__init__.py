"""The papers' claims: what each says and where, measured against what it predicts."""

from droplens.papers._claim import (
    SCALES,
    Cell,
    Claim,
    Criterion,
    Judgement,
    Measure,
    Numbers,
    Scale,
    Setting,
    describe,
    labels,
    shared,
)
from droplens.papers._registry import PAPERS, claims, find, select
from droplens.papers._theory import BREAKS, Theory

__all__ = [
    "BREAKS",
    "PAPERS",
    "SCALES",
    "Cell",
    "Claim",
    "Criterion",
    "Judgement",
    "Measure",
    "Numbers",
    "Scale",
    "Setting",
    "Theory",
    "claims",
    "describe",
    "find",
    "labels",
    "select",
    "shared",
]
