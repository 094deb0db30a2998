"""Routing algorithms by name."""

import inspect
from collections.abc import Callable

from capsjax.routing.attention import attention_routing
from capsjax.routing.dynamic import dynamic_routing
from capsjax.routing.efficient import efficient_routing
from capsjax.routing.em import em_routing
from capsjax.routing.heinsen import heinsen_routing
from capsjax.routing.kmeans import kmeans_routing
from capsjax.routing.random import random_routing
from capsjax.routing.routed import Routed
from capsjax.routing.self_routing import self_routing
from capsjax.routing.uniform import uniform_routing
from capsjax.routing.variational import variational_routing

_ALGORITHMS: dict[str, Callable[..., Routed]] = {
    "dynamic": dynamic_routing,
    "em": em_routing,
    "self": self_routing,
    "attention": attention_routing,
    "variational": variational_routing,
    "heinsen": heinsen_routing,
    "efficient": efficient_routing,
    "kmeans": kmeans_routing,
    "uniform": uniform_routing,
    "random": random_routing,
}


def algorithms() -> tuple[str, ...]:
    """Names of the routing algorithms.

    Example:
      >>> from capsjax import routing
      >>> "em" in routing.algorithms()
      True
    """
    return tuple(_ALGORITHMS)


def algorithm(name: str) -> Callable[..., Routed]:
    """Returns the routing function of this name.

    Raises:
      ValueError: there is no such algorithm.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import routing
      >>> route = routing.algorithm("kmeans")
      >>> route(jnp.ones((6, 4, 2)), num_iterations=2).poses.shape
      (4, 2)
    """
    if name not in _ALGORITHMS:
        raise ValueError(f"routing must be one of {', '.join(_ALGORITHMS)}, got {name!r}")
    return _ALGORITHMS[name]


def squashes(name: str) -> bool:
    """Whether the activations of the algorithm of this name are the lengths of its poses.

    Raises:
      ValueError: there is no such algorithm.

    Example:
      >>> from capsjax import routing
      >>> routing.squashes("dynamic"), routing.squashes("em")
      (True, False)
    """
    algorithm(name)
    return name in ("dynamic", "kmeans", "efficient", "uniform", "random")


def iterates(name: str) -> bool:
    """Whether the algorithm of this name has a number of iterations.

    Raises:
      ValueError: there is no such algorithm.

    Example:
      >>> from capsjax import routing
      >>> routing.iterates("em"), routing.iterates("uniform")
      (True, False)
    """
    return "num_iterations" in inspect.signature(algorithm(name)).parameters
