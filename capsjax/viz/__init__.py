"""Figures of capsule networks. Needs the extra ``viz``."""

from capsjax.errors import how_to_install

try:
    import matplotlib as _matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"capsjax.viz needs matplotlib: {how_to_install('viz')}", name=error.name
    ) from None

from capsjax.viz.anatomy import Anatomy, dissect
from capsjax.viz.capsules import (
    agreement,
    agreement_and_entropy,
    coupling_maps,
    dimensions,
    lengths,
    overlaps,
    reconstructions,
)
from capsjax.viz.diagram import routing_diagram
from capsjax.viz.evaluation import (
    confusion,
    confusion_matrix,
    training_curves,
    worst_errors,
)
from capsjax.viz.perturb import reconstruct, vary_dimensions
from capsjax.viz.selection import Selection, select

__all__ = [
    "Anatomy",
    "Selection",
    "agreement",
    "agreement_and_entropy",
    "confusion",
    "confusion_matrix",
    "coupling_maps",
    "dimensions",
    "dissect",
    "lengths",
    "overlaps",
    "reconstruct",
    "reconstructions",
    "routing_diagram",
    "select",
    "training_curves",
    "vary_dimensions",
    "worst_errors",
]
