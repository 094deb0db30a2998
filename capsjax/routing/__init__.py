"""Routing algorithms (floor 2): one file each, one contract, :class:`Routed`."""

from capsjax.routing.dynamic import dynamic_routing
from capsjax.routing.routed import Routed

__all__ = ["Routed", "dynamic_routing"]
