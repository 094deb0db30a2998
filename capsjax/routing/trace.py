"""Traces of iterative routing."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.typing import ArrayLike

from capsjax.ops._checks import as_integer
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.routing._passes import Passes
from capsjax.routing.record import algorithm, algorithms


class RoutingTrace(NamedTuple):
    """The results of every iteration of a routing algorithm; the first axis is the iteration.

    Attributes:
      poses: parent poses, ``[r, ..., J, D]``.
      activations: parent activations, ``[r, ..., J]``.
      coupling: weights of the votes, ``[r, ..., I, J]``.
      logits: logits of the coupling, normalised over the parents or as the algorithm describes,
        ``[r, ..., I, J]``, float32 or wider.
      agreement: scalar products of votes and parent poses, ``[r, ..., I, J]``, float32 or wider.
    """

    poses: jax.Array
    activations: jax.Array
    coupling: jax.Array
    logits: jax.Array
    agreement: jax.Array


# Without this, an exported function that returns one could not be stored.
export.register_namedtuple_serialization(RoutingTrace, serialized_name="capsjax.RoutingTrace")


def traced() -> tuple[str, ...]:
    """Returns the names of the algorithms that can be traced.

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
    r"""Runs an iterative algorithm and returns the results of every iteration.

    The t-th entry is what the algorithm returns with t iterations, together with the agreement

    .. math::
      a^{(t)}_{ij} = \hat u_{j|i} \cdot v_j^{(t)}

    Memory grows with the number of iterations.

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      *args: further positional arguments of the algorithm, such as the children's activations.
      routing: ``"dynamic"``, ``"kmeans"``, ``"attention"``, ``"em"``, ``"variational"``, or any
        registered algorithm whose record has passes.
      num_iterations: r, a Python integer of at least 1.
      **options: keyword arguments of the algorithm.

    Returns:
      :class:`RoutingTrace`.

    Raises:
      TypeError: as the algorithm.
      ValueError: as the algorithm, or ``routing`` cannot be traced.

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
    return _traced(make_passes, iterations)(votes, *args, **options)


@functools.lru_cache(maxsize=64)
def _traced(make_passes: Callable[..., Passes], iterations: int) -> Callable[..., RoutingTrace]:
    """Returns the trace of an algorithm as a function of its arguments."""

    @compiled_outside_jit
    def trace(*args: Any, **options: Any) -> RoutingTrace:
        passes = make_passes(*args, **options)

        def one_pass(carry: jax.Array, number: jax.Array) -> tuple[jax.Array, Any]:
            routed, logits = passes.finish(number, carry)
            return passes.update(number, carry), (*routed, logits)

        _, (poses, activations, coupling, logits) = lax.scan(
            one_pass, passes.first, jnp.arange(iterations)
        )
        votes = passes.votes.astype(logits.dtype)
        agreement = jnp.einsum("...ijd,t...jd->t...ij", votes, poses.astype(logits.dtype))
        return RoutingTrace(poses, activations, coupling, logits, agreement)

    return trace
