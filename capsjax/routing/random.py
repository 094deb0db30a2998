"""Routing with fixed random couplings, a baseline."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax.ops import length, squash
from capsjax.ops._checks import as_integer
from capsjax.routing._passes import inputs
from capsjax.routing.record import Algorithm, Children, register
from capsjax.routing.routed import Routed


def random_routing(
    votes: ArrayLike,
    *,
    key: jax.Array,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Routed:
    r"""Sums the votes with random couplings, the same for every example; a baseline.

    .. math::
      c_{ij} = \mathrm{softmax}_j(g_{ij}), \quad g_{ij} \sim \mathcal N(0, 1), \qquad
      v_j = \mathrm{squash}\Bigl(\sum_i c_{ij} \hat u_{j|i} + \beta_j\Bigr)

    Use the same key throughout the lifetime of a layer: its couplings are then fixed, and only the
    weights are learned. Sums are float32 (or float64).

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      key: random key of the couplings ``[I, J]``.
      bias: :math:`\beta`, ``[J, D]``.
      where: children that take part, bool, broadcastable to ``[..., I]``.

    Returns:
      :class:`Routed`: poses ``[..., J, D]``, activations :math:`\|v\|` ``[..., J]``, coupling
      ``[..., I, J]``, in the dtype of the votes.

    Raises:
      TypeError: votes or bias are not floating point, or ``where`` is not bool.
      ValueError: an argument has the wrong shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import random_routing
      >>> jax.jit(random_routing)(jnp.ones((6, 4, 2)), key=jax.random.key(0)).poses.shape
      (4, 2)

    Reference:
      Paik, Kwak, Kim, *Capsule Networks Need an Improved Routing Algorithm*, ACML 2019.
    """
    given = inputs(votes, bias=bias, where=where)
    try:
        logits = jax.random.normal(key, given.votes.shape[-3:-1], given.wide)
    except (TypeError, ValueError):
        what = getattr(key, "dtype", type(key).__name__)
        raise TypeError(f"key must be a single jax.random.key, got {what}") from None
    coupling = given.coupled(jax.nn.softmax(jnp.broadcast_to(logits, given.votes.shape[:-1])))
    poses = squash(given.gather(coupling))
    return given.routed(poses, length(poses), coupling)


def _arguments(children: Children, given: dict[str, Any]) -> dict[str, Any]:
    """Converts the option ``seed`` to the key of the couplings."""
    del children
    seed = as_integer("seed", given.pop("seed", 0), least=-(2**63), most=2**63 - 1)
    return {**given, "key": jax.random.key(seed)}


RANDOM = register(
    Algorithm(
        name="random",
        function=random_routing,
        paper="baseline: fixed random couplings (Paik, Kwak, Kim, ACML 2019)",
        options=("seed",),
        arguments=_arguments,
        has_bias=True,
        squash=squash,
    )
)
