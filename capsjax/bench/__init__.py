"""Benchmarks (floor 5): one way to time, and what is timed."""

from capsjax.bench.routing import Direction, RoutingRow, RoutingSizes, benchmark_routing
from capsjax.bench.timing import Times, alternate

__all__ = [
    "Direction",
    "RoutingRow",
    "RoutingSizes",
    "Times",
    "alternate",
    "benchmark_routing",
]
