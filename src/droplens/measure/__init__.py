"""What dropout did to a network, one quantity a file (theory §4).

Every sampled number is an Estimate; exact numbers are plain.
"""

from droplens.measure._condensation import Condensation, condensation
from droplens.measure._curvature import Curvature, curvature
from droplens.measure._equalization import Equalization, equalization
from droplens.measure._fisher import Fisher, fisher
from droplens.measure._flatness import Flatness, flatness
from droplens.measure._hessian import Hessian, hessian
from droplens.measure._interpolation import Interpolation, interpolation
from droplens.measure._manifold import ManifoldCurvature, manifold_curvature
from droplens.measure._spectrum import Spectrum, spectrum

__all__ = [
    "Condensation",
    "Curvature",
    "Equalization",
    "Fisher",
    "Flatness",
    "Hessian",
    "Interpolation",
    "ManifoldCurvature",
    "Spectrum",
    "condensation",
    "curvature",
    "equalization",
    "fisher",
    "flatness",
    "hessian",
    "interpolation",
    "manifold_curvature",
    "spectrum",
]
