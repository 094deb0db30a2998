"""Dynamic routing that need not store its votes."""

from capsjax.routing.fused.api import Implementation, check_implementation, dense_capsules

__all__ = ["Implementation", "check_implementation", "dense_capsules"]
