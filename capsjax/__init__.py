"""capsjax: capsule networks for JAX.

Importing it gives floors 1 to 3: pure functions, routing algorithms and layers. Whole networks
(`capsjax.models`), data (`capsjax.data`) and training (`capsjax.training`) are imported by name.
"""

from typing import TYPE_CHECKING, Any

from capsjax import nn, routing
from capsjax.ops import (
    conv_general_dilated,
    dense_votes,
    exponential_squash,
    length,
    margin_loss,
    matrix_votes,
    reconstruction_loss,
    spread_loss,
    squash,
)
from capsjax.routing import (
    HeinsenParameters,
    Routed,
    RoutingTrace,
    attention_routing,
    dense_capsules,
    dynamic_routing,
    efficient_routing,
    em_routing,
    heinsen_routing,
    kmeans_routing,
    random_routing,
    routing_trace,
    self_routing,
    uniform_routing,
    variational_routing,
)
from capsjax.version import __version__

if TYPE_CHECKING:
    from capsjax.models import load_pretrained

__all__ = [
    "HeinsenParameters",
    "Routed",
    "RoutingTrace",
    "__version__",
    "attention_routing",
    "conv_general_dilated",
    "dense_capsules",
    "dense_votes",
    "dynamic_routing",
    "efficient_routing",
    "em_routing",
    "exponential_squash",
    "heinsen_routing",
    "kmeans_routing",
    "length",
    "load_pretrained",
    "margin_loss",
    "matrix_votes",
    "nn",
    "random_routing",
    "reconstruction_loss",
    "routing",
    "routing_trace",
    "self_routing",
    "spread_loss",
    "squash",
    "uniform_routing",
    "variational_routing",
]


def __getattr__(name: str) -> Any:
    """Whole networks are imported when one is asked for."""
    if name == "load_pretrained":
        from capsjax.models import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
