"""Routing algorithms: pure functions from votes to parent capsules, one file each.

Each file ends with the algorithm's record. The names in ``__all__`` can also be imported from
:mod:`capsjax`.
"""

from capsjax.routing._passes import Passes as Passes
from capsjax.routing.attention import attention_routing
from capsjax.routing.dynamic import dynamic_routing
from capsjax.routing.efficient import efficient_routing
from capsjax.routing.em import em_routing
from capsjax.routing.fused import dense_capsules
from capsjax.routing.heinsen import HeinsenParameters, heinsen_routing
from capsjax.routing.kmeans import kmeans_routing
from capsjax.routing.random import random_routing
from capsjax.routing.record import Algorithm as Algorithm
from capsjax.routing.record import Children as Children
from capsjax.routing.record import Parameter as Parameter
from capsjax.routing.record import Sizes as Sizes
from capsjax.routing.record import algorithm as algorithm
from capsjax.routing.record import algorithms as algorithms
from capsjax.routing.record import register as register
from capsjax.routing.record import unregister as unregister
from capsjax.routing.routed import Routed
from capsjax.routing.self_routing import self_routing
from capsjax.routing.trace import RoutingTrace, routing_trace
from capsjax.routing.uniform import uniform_routing
from capsjax.routing.variational import variational_routing

__all__ = [
    "HeinsenParameters",
    "Routed",
    "RoutingTrace",
    "attention_routing",
    "dense_capsules",
    "dynamic_routing",
    "efficient_routing",
    "em_routing",
    "heinsen_routing",
    "kmeans_routing",
    "random_routing",
    "routing_trace",
    "self_routing",
    "uniform_routing",
    "variational_routing",
]
