"""What capsules compute, drawn. Needs ``pip install "capsjax[viz]"``."""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'capsjax.viz draws with matplotlib: pip install "capsjax[viz]"', name=error.name
    ) from None

from capsjax.viz.anatomy import Anatomy, dissect
from capsjax.viz.diagram import Selection, routing_diagram, select
from capsjax.viz.figures import (
    agreement,
    agreement_and_entropy,
    confusion,
    confusion_matrix,
    coupling_maps,
    dimensions,
    lengths,
    overlaps,
    reconstructions,
    training_curves,
    worst_errors,
)
from capsjax.viz.perturb import reconstruct, vary_dimensions

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
