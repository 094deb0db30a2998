"""Self-attention routing of Efficient-CapsNet."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax.ops import length
from capsjax.ops.capsule import exponential_squash
from capsjax.routing._passes import as_logits, inputs
from capsjax.routing.record import Algorithm, Parameter, Sizes, register
from capsjax.routing.routed import Routed


def efficient_routing(
    votes: ArrayLike, *, prior: ArrayLike | None = None, where: ArrayLike | None = None
) -> Routed:
    r"""Weighs each vote by its agreement with all votes, without iterations.

    .. math::
      a_{ij} = \frac{1}{\sqrt D} \sum_k \hat u_{j|i} \cdot \hat u_{j|k}, \quad
      c_{ij} = \mathrm{softmax}_j(a_{ij}) + p_{ij}, \quad
      s_j = \sum_i c_{ij} \hat u_{j|i}, \quad
      v_j = \bigl(1 - e^{-\|s_j\|}\bigr) \frac{s_j}{\|s_j\|}

    The sum over k is taken before the scalar product, which avoids an I × I matrix. The prior is
    added after the softmax, and so couplings need not sum to 1. Softmax and sums are float32 (or
    float64).

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      prior: :math:`p`, learned, broadcastable to ``[..., I, J]``; zeros when None.
      where: children that take part, bool, broadcastable to ``[..., I]``.

    Returns:
      :class:`Routed`: poses :math:`v` ``[..., J, D]``, activations :math:`\|v\|` ``[..., J]``,
      coupling ``[..., I, J]``, in the dtype of the votes.

    Raises:
      TypeError: votes or prior are not floating point, or ``where`` is not bool.
      ValueError: an argument has the wrong shape.

    Example:
      >>> import jax
      >>> from capsjax import efficient_routing
      >>> votes = jax.random.normal(jax.random.key(0), (16, 10, 16))
      >>> jax.jit(efficient_routing)(votes).poses.shape
      (10, 16)

    Reference:
      Mazzia, Salvetti, Chiaberge, *Efficient-CapsNet: Capsule Network with Self-Attention Routing*,
      Scientific Reports 2021.
    """
    given = inputs(votes, where=where)
    total = jnp.sum(given.votes.astype(given.wide), axis=-3)
    logits = given.agreement(total) / math.sqrt(max(1, given.votes.shape[-1]))
    coupling = jax.nn.softmax(logits)
    if prior is not None:
        coupling = coupling + as_logits("prior", prior, given)
    coupling = given.coupled(coupling)
    poses = exponential_squash(given.gather(coupling))
    return given.routed(poses, length(poses), coupling)


def _parameters(sizes: Sizes) -> dict[str, Parameter]:
    """The prior of the couplings."""
    shape = (sizes.in_capsules, sizes.out_capsules)
    return {"prior": Parameter(shape, jax.nn.initializers.zeros, per_child=True)}


EFFICIENT = register(
    Algorithm(
        name="efficient",
        function=efficient_routing,
        paper="Mazzia, Salvetti, Chiaberge, Scientific Reports 2021",
        parameters=_parameters,
        squash=exponential_squash,
    )
)
