"""Routing with equal couplings, a baseline."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax.ops import length, squash
from capsjax.routing._passes import inputs
from capsjax.routing.record import Algorithm, register
from capsjax.routing.routed import Routed


def uniform_routing(
    votes: ArrayLike, *, bias: ArrayLike | None = None, where: ArrayLike | None = None
) -> Routed:
    r"""Sums the votes with equal couplings; the baseline that routing has to beat.

    .. math::
      c_{ij} = \tfrac{1}{J}, \qquad
      v_j = \mathrm{squash}\Bigl(\sum_i c_{ij} \hat u_{j|i} + \beta_j\Bigr)

    The same as :func:`capsjax.dynamic_routing` with one iteration. Sums are float32 (or float64).

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      bias: :math:`\beta`, ``[J, D]``.
      where: children that take part, bool, broadcastable to ``[..., I]``.

    Returns:
      :class:`Routed`: poses ``[..., J, D]``, activations :math:`\|v\|` ``[..., J]``, coupling
      ``[..., I, J]``, in the dtype of the votes.

    Raises:
      TypeError: votes or bias are not floating point, or ``where`` is not bool.
      ValueError: an argument has the wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import uniform_routing
      >>> print(uniform_routing(jnp.ones((6, 4, 2))).coupling[0])
      [0.25 0.25 0.25 0.25]

    Reference:
      Paik, Kwak, Kim, *Capsule Networks Need an Improved Routing Algorithm*, ACML 2019.
    """
    given = inputs(votes, bias=bias, where=where)
    coupling = given.coupled(jnp.full_like(given.zeros(), 1 / max(1, given.votes.shape[-2])))
    poses = squash(given.gather(coupling))
    return given.routed(poses, length(poses), coupling)


UNIFORM = register(
    Algorithm(
        name="uniform",
        function=uniform_routing,
        paper="baseline: equal couplings",
        has_bias=True,
        squash=squash,
    )
)
