"""What dropout did to a network, one quantity a file (theory §4).

Every sampled number is an Estimate; exact numbers are plain.
"""

from droplens.measure._condensation import Condensation, condensation
from droplens.measure._directions import between
from droplens.measure._equalization import Equalization, equalization
from droplens.measure._fisher import Fisher, fisher
from droplens.measure._flatness import Flatness, flatness
from droplens.measure._hessian import Hessian, hessian
from droplens.measure._interpolation import Interpolation, interpolation
from droplens.measure._plane import Plane, plane
from droplens.measure._spectrum import Spectrum, spectrum

__all__ = [
    "Condensation",
    "Equalization",
    "Fisher",
    "Flatness",
    "Hessian",
    "Interpolation",
    "Plane",
    "Spectrum",
    "between",
    "condensation",
    "equalization",
    "fisher",
    "flatness",
    "hessian",
    "interpolation",
    "plane",
    "spectrum",
]
