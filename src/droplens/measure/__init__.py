"""What dropout did to a network, one quantity a file (theory §4).

Every sampled number is an Estimate; exact numbers are plain.
"""

from droplens.measure._by_layer import (
    LayerCondensation,
    Neurons,
    Picture,
    Scan,
    condensation_by_layer,
    condensation_scan,
    neurons,
    orientation_picture,
)
from droplens.measure._by_site import EqualizationBySite, equalization_by_site
from droplens.measure._condensation import Condensation, condensation
from droplens.measure._curvature import Curvature, curvature
from droplens.measure._density import SpectralDensity, spectral_density
from droplens.measure._directions import between
from droplens.measure._equalization import Equalization, equalization
from droplens.measure._fisher import Fisher, fisher
from droplens.measure._fisher_spectrum import FisherSpectrum, fisher_spectrum
from droplens.measure._flatness import Flatness, flatness
from droplens.measure._hessian import Hessian, hessian
from droplens.measure._interpolation import Interpolation, interpolation
from droplens.measure._manifold import ManifoldCurvature, manifold_curvature
from droplens.measure._plane import Plane, plane
from droplens.measure._ranks import PredictedSpectrum, Ranks, prediction_spectrum, ranks
from droplens.measure._sharpness import Sharpness, sharpness
from droplens.measure._spectrum import Spectrum, spectrum
from droplens.measure._trajectory import VarianceFlatness, variance_flatness

__all__ = [
    "Condensation",
    "Curvature",
    "Equalization",
    "EqualizationBySite",
    "Fisher",
    "FisherSpectrum",
    "Flatness",
    "Hessian",
    "Interpolation",
    "LayerCondensation",
    "ManifoldCurvature",
    "Neurons",
    "Picture",
    "Plane",
    "PredictedSpectrum",
    "Ranks",
    "Scan",
    "Sharpness",
    "SpectralDensity",
    "Spectrum",
    "VarianceFlatness",
    "between",
    "condensation",
    "condensation_by_layer",
    "condensation_scan",
    "curvature",
    "equalization",
    "equalization_by_site",
    "fisher",
    "fisher_spectrum",
    "flatness",
    "hessian",
    "interpolation",
    "manifold_curvature",
    "neurons",
    "orientation_picture",
    "plane",
    "prediction_spectrum",
    "ranks",
    "sharpness",
    "spectral_density",
    "spectrum",
    "variance_flatness",
]
