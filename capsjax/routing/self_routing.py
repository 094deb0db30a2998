"""Self-routing: every child is routed independently of the others."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax.ops.capsule import unit
from capsjax.routing._passes import as_activations, as_logits, inputs, per_mass
from capsjax.routing.record import Algorithm, Children, Parameter, Sizes, register
from capsjax.routing.routed import Routed


def self_routing(
    votes: ArrayLike,
    activations: ArrayLike,
    logits: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> Routed:
    r"""Routes each child by a classifier of its own pose, as a mixture of experts.

    .. math::
      c_{ij} = \mathrm{softmax}_j(b_{ij}), \quad
      a_j = \frac{\sum_i a_i c_{ij}}{\sum_i a_i}, \quad
      v_j = \frac{\sum_i a_i c_{ij} \hat u_{j|i}}{\sum_i a_i c_{ij}}

    with :math:`b_{ij} = (W_i u_i + \beta_i)_j`, which the caller computes from the child's pose,
    like the votes. There are no iterations. Poses are averages and are not squashed; they are zero
    for parents with less than 1e-6 of a child. Softmax and sums are float32 (or float64).

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      activations: :math:`a_i` of the children, not negative, broadcastable to ``[..., I]``.
      logits: :math:`b`, broadcastable to ``[..., I, J]``.
      where: children that take part, bool, broadcastable to ``[..., I]``.

    Returns:
      :class:`Routed`: poses ``[..., J, D]``, activations ``[..., J]`` that sum to 1 over the
      parents, coupling :math:`c` ``[..., I, J]``, in the dtype of the votes.

    Raises:
      TypeError: votes, activations or logits are not floating point, or ``where`` is not bool.
      ValueError: an argument has the wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import self_routing
      >>> routed = self_routing(jnp.ones((6, 4, 2)), jnp.ones(6), jnp.zeros((6, 4)))
      >>> print(routed.activations)
      [0.25 0.25 0.25 0.25]

    Reference:
      Hahn, Pyeon, Kim, *Self-Routing Capsule Networks*, NeurIPS 2019, equations 4 to 6.
    """
    given = inputs(votes, where=where)
    weights = as_activations(activations, given)
    coupling = given.coupled(jax.nn.softmax(as_logits("logits", logits, given)))
    shares = weights[..., None] * coupling
    mass = jnp.sum(shares, axis=-2)
    present = per_mass(mass, jnp.sum(weights, axis=-1)[..., None])
    s = given.gather(shares)
    # The second term passes on votes that are not finite to parents without mass, too.
    poses = per_mass(s, mass[..., None]) + 0 * s
    return given.routed(poses, present, coupling)


def _parameters(sizes: Sizes) -> dict[str, Parameter]:
    """A linear classifier for each child."""
    children, in_features, parents, _ = sizes
    zeros = jax.nn.initializers.zeros
    return {
        "logit_kernel": Parameter((children, in_features, parents), zeros, per_child=True),
        "logit_bias": Parameter((children, parents), zeros, per_child=True),
    }


def _arguments(children: Children, given: dict[str, Any]) -> dict[str, Any]:
    """Computes logits ``[..., I, J]`` by each child's classifier, in float32 or wider.

    The classifier sees only the direction of a pose, scaled to components of about one. Its length
    is the child's activation.
    """
    kernel, bias, poses = given.pop("logit_kernel"), given.pop("logit_bias"), children.poses
    wide = jnp.promote_types(poses.dtype, bias.dtype)
    direction = unit(poses.astype(wide)) * math.sqrt(poses.shape[-1])
    logits = jnp.einsum("...ik,ikj->...ij", direction, kernel.astype(wide))
    return {**given, "logits": logits + jnp.broadcast_to(bias, logits.shape).astype(wide)}


SELF = register(
    Algorithm(
        name="self",
        function=self_routing,
        paper="Hahn, Pyeon, Kim, NeurIPS 2019",
        parameters=_parameters,
        arguments=_arguments,
        takes_activations=True,
    )
)
