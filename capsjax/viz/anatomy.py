"""The intermediate results of a capsule network for one image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from capsjax.models import CapsNet
from capsjax.models.network import check_images
from capsjax.ops import dense_votes
from capsjax.routing import Children, RoutingTrace, algorithm, routing_trace
from capsjax.routing.trace import traced


class Anatomy(NamedTuple):
    """Intermediate results of a :class:`capsjax.models.CapsNet` for one image.

    Attributes:
      image: pixels in [0, 1], ``[H, W, C]``.
      children: primary capsules u, ``[I, K]``, ordered by row, column and type.
      votes: votes of the children, ``[I, J, D]``.
      trace: trace of routing the votes; see :func:`capsjax.routing_trace`.
      bias: bias inside routing, ``[J, D]``, or None.
    """

    image: jax.Array
    children: jax.Array
    votes: jax.Array
    trace: RoutingTrace
    bias: jax.Array | None

    @property
    def poses(self) -> jax.Array:
        """Class capsules after the last iteration, ``[J, D]``."""
        return self.trace.poses[-1]

    @property
    def lengths(self) -> jax.Array:
        """Activations of the class capsules after the last iteration, ``[J]``."""
        return self.trace.activations[-1]


def check_traced(network: nnx.Module) -> CapsNet:
    """Returns the network, or raises a ValueError if its routing cannot be traced."""
    if not isinstance(network, CapsNet):
        raise ValueError(
            f"network must be a CapsNet to trace its routing, got {type(network).__name__}"
        )
    if network.config.routing not in traced():
        raise ValueError(
            f"network must have a routing that can be traced, one of {', '.join(traced())}, got"
            f" {network.config.routing!r}"
        )
    return network


def dissect(network: CapsNet, image: jax.Array, *, num_iterations: int | None = None) -> Anatomy:
    """Runs a network on one image and returns its children, votes and routing trace.

    Args:
      network: a capsule network whose routing can be traced; see :func:`capsjax.routing_trace`.
      image: pixels in [0, 1], ``[H, W, C]``, floating point.
      num_iterations: number of routing iterations; the network's own when None.

    Returns:
      :class:`Anatomy`.

    Raises:
      TypeError, ValueError: the routing cannot be traced, or the image has the wrong shape or
        dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import models
      >>> from capsjax.viz import dissect
      >>> from flax import nnx
      >>> network = models.create("small", rngs=nnx.Rngs(0))
      >>> anatomy = dissect(network, jnp.ones((28, 28, 1)))
      >>> anatomy.children.shape, anatomy.votes.shape, anatomy.trace.coupling.shape
      ((144, 16), (144, 10, 16), (3, 144, 10))
    """
    check_traced(network)
    image = jnp.asarray(image)
    check_images(image, network.config.image_shape)
    if image.ndim != 3:
        raise ValueError(f"image must be one image [H, W, C], got shape {image.shape}")
    return _dissect(network, image, num_iterations=num_iterations or network.config.num_iterations)


# Compiled, so that a call from Python is one program and not dozens of small ones.
@nnx.jit(static_argnames="num_iterations")
def _dissect(network: CapsNet, image: jax.Array, *, num_iterations: int) -> Anatomy:
    config, layer = network.config, network.classes
    children = network.primary_capsules(image)
    assert layer.kernel is not None  # None only with an algorithm that computes its own votes
    dtype = jnp.dtype(config.dtype)
    votes = dense_votes(children.astype(dtype), layer.kernel[...].astype(dtype))
    given = layer.router.arguments()
    arguments = algorithm(config.routing).keyword_arguments(Children(children), given)
    arguments["num_iterations"] = num_iterations
    trace = routing_trace(votes, routing=config.routing, **arguments)
    return Anatomy(image, children, votes, trace, given.get("bias"))
