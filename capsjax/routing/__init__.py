"""Routing algorithms: pure functions from votes to parent capsules, one file each."""

from capsjax.routing.algorithm import (
    Algorithm,
    Children,
    Parameter,
    Sizes,
    algorithm,
    algorithms,
    register,
    unregister,
)
from capsjax.routing.attention import attention_routing
from capsjax.routing.dynamic import dynamic_routing
from capsjax.routing.efficient import efficient_routing
from capsjax.routing.em import em_routing
from capsjax.routing.fused import dense_capsules
from capsjax.routing.heinsen import HeinsenParameters, heinsen_routing
from capsjax.routing.kmeans import kmeans_routing
from capsjax.routing.random import random_routing
from capsjax.routing.routed import Routed
from capsjax.routing.self_routing import self_routing
from capsjax.routing.trace import RoutingTrace, routing_trace
from capsjax.routing.uniform import uniform_routing
from capsjax.routing.variational import variational_routing

__all__ = [
    "Algorithm",
    "Children",
    "HeinsenParameters",
    "Parameter",
    "Routed",
    "RoutingTrace",
    "Sizes",
    "algorithm",
    "algorithms",
    "attention_routing",
    "dense_capsules",
    "dynamic_routing",
    "efficient_routing",
    "em_routing",
    "heinsen_routing",
    "kmeans_routing",
    "random_routing",
    "register",
    "routing_trace",
    "self_routing",
    "uniform_routing",
    "unregister",
    "variational_routing",
]
