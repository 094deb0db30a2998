"""capsjax: capsule networks for JAX.

Importing it gives floors 1 to 3: pure functions, routing algorithms and layers. Whole networks
(`capsjax.models`), data (`capsjax.data`) and training (`capsjax.training`) are imported by name.
"""

from capsjax import nn
from capsjax.ops import (
    conv_general_dilated,
    dense_votes,
    length,
    margin_loss,
    reconstruction_loss,
    squash,
)
from capsjax.routing import Routed, dynamic_routing
from capsjax.version import __version__

__all__ = [
    "Routed",
    "__version__",
    "conv_general_dilated",
    "dense_votes",
    "dynamic_routing",
    "length",
    "margin_loss",
    "nn",
    "reconstruction_loss",
    "squash",
]
