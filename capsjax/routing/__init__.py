"""Routing algorithms: pure functions from votes to parent capsules, one file each."""

from capsjax.routing.attention import attention_routing
from capsjax.routing.dynamic import dynamic_routing
from capsjax.routing.efficient import efficient_routing
from capsjax.routing.em import em_routing
from capsjax.routing.fused import dense_capsules
from capsjax.routing.heinsen import HeinsenParameters, heinsen_routing
from capsjax.routing.kmeans import kmeans_routing
from capsjax.routing.random import random_routing
from capsjax.routing.registry import algorithm, algorithms, iterates, squashes
from capsjax.routing.routed import Routed
from capsjax.routing.self_routing import self_routing
from capsjax.routing.trace import RoutingTrace, routing_trace
from capsjax.routing.uniform import uniform_routing
from capsjax.routing.variational import variational_routing

__all__ = [
    "HeinsenParameters",
    "Routed",
    "RoutingTrace",
    "algorithm",
    "algorithms",
    "attention_routing",
    "dense_capsules",
    "dynamic_routing",
    "efficient_routing",
    "em_routing",
    "heinsen_routing",
    "iterates",
    "kmeans_routing",
    "random_routing",
    "routing_trace",
    "self_routing",
    "squashes",
    "uniform_routing",
    "variational_routing",
]
