"""What iterative routing does, pass by pass."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.typing import ArrayLike

from capsjax.ops._checks import as_integer
from capsjax.routing.record import algorithm, algorithms


class RoutingTrace(NamedTuple):
    """What every iteration of a routing algorithm finds; the first axis is the iteration.

    Attributes:
      poses: of the parents after it, ``[r, ..., J, D]``.
      activations: of the parents after it, ``[r, ..., J]``.
      coupling: with which it weighs the votes, ``[r, ..., I, J]``.
      logits: whose softmax over the parents (or over more, see the algorithm) the coupling is,
        ``[r, ..., I, J]``, float32 or wider.
      agreement: scalar products of the votes with the poses after it, ``[r, ..., I, J]``, float32
        or wider.
    """

    poses: jax.Array
    activations: jax.Array
    coupling: jax.Array
    logits: jax.Array
    agreement: jax.Array


# As for Routed: so that an exported function that returns one can be stored.
export.register_namedtuple_serialization(RoutingTrace, serialized_name="capsjax.RoutingTrace")


def traced() -> tuple[str, ...]:
    """Names of the algorithms that can be traced.

    Example:
      >>> from capsjax.routing.trace import traced
      >>> "em" in traced(), "uniform" in traced()
      (True, False)
    """
    return tuple(name for name in algorithms() if algorithm(name).passes)


def routing_trace(
    votes: ArrayLike,
    *args: Any,
    routing: str = "dynamic",
    num_iterations: int = 3,
    **options: Any,
) -> RoutingTrace:
    r"""Routes as the algorithm does, and keeps what every iteration finds.

    The t-th entry is what the algorithm returns with t iterations, and

    .. math::
      a^{(t)}_{ij} = \hat u_{j|i} \cdot v_j^{(t)}

    is the agreement after it. For those who study or draw routing; memory grows with the number of
    iterations.

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      *args: further positional arguments of the algorithm, such as the children's activations.
      routing: ``"dynamic"``, ``"kmeans"``, ``"attention"``, ``"em"``, ``"variational"``, or
        another algorithm whose record has passes; the others make one pass, or have no votes.
      num_iterations: r, a Python integer of at least 1.
      **options: keyword arguments of the algorithm.

    Returns:
      :class:`RoutingTrace`.

    Raises:
      TypeError, ValueError: as the algorithm does; or ``routing`` is none of the names above.

    Example:
      >>> import jax
      >>> from capsjax import routing_trace
      >>> votes = jax.random.normal(jax.random.key(0), (1152, 10, 16))
      >>> trace = routing_trace(votes, num_iterations=3)
      >>> trace.coupling.shape, trace.poses.shape
      ((3, 1152, 10), (3, 10, 16))

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, procedure 1.
    """
    iterations = as_integer("num_iterations", num_iterations)
    make_passes = algorithm(routing).passes if routing in algorithms() else None
    if make_passes is None:
        raise ValueError(f"routing must be one of {', '.join(traced())}, got {routing!r}")
    passes = make_passes(votes, *args, **options)

    def one_pass(carry: jax.Array, number: jax.Array) -> tuple[jax.Array, Any]:
        routed, logits = passes.finish(number, carry)
        return passes.update(number, carry), (*routed, logits)

    _, (poses, activations, coupling, logits) = lax.scan(
        one_pass, passes.first, jnp.arange(iterations)
    )
    agreement = jnp.einsum(
        "...ijd,t...jd->t...ij", passes.votes.astype(logits.dtype), poses.astype(logits.dtype)
    )
    return RoutingTrace(poses, activations, coupling, logits, agreement)
