"""Measures on request of a network's geometry: orientations, curvature, ranks."""

from collections.abc import Mapping
from typing import Final

from droplens.inspection._extra import Extra

GEOMETRY: Final[Mapping[str, Extra]] = {}
