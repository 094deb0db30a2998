"""Routing by agreement (floor 2): Sabour, Frosst, Hinton, NIPS 2017."""

import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax.ops import length, squash
from capsjax.ops._checks import accumulator, as_floating, as_mask, broadcast, zeros
from capsjax.routing.routed import Routed

_Inputs = tuple[jax.Array, jax.Array, jax.Array | None]  # votes, prior logits, bias


def dynamic_routing(
    votes: ArrayLike,
    *,
    num_iterations: int = 3,
    logits: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    leaky: bool = False,
    stop_gradient: bool = False,
) -> Routed:
    r"""Routes child capsules to the parents whose output their votes agree with.

    Starting from the prior logits :math:`b_{ij}`, each iteration computes

    .. math::
      c_{ij} = \mathrm{softmax}_j(b_{ij}), \quad
      s_j = \sum_i c_{ij} \hat u_{j|i} + \beta_j, \quad
      v_j = \mathrm{squash}(s_j), \quad
      b_{ij} \leftarrow b_{ij} + \hat u_{j|i} \cdot v_j

    The softmax runs over the **parents** and every example has logits of its own. With r iterations
    there are r − 1 updates of the logits (a ``lax.fori_loop``) and one last pass, so that one
    iteration is uniform coupling. Logits, softmax and sums are float32 (or float64); the results
    are cast back to the dtype of the votes. Differentiable through all iterations.

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      num_iterations: r, a Python integer of at least 1.
      logits: prior logits, broadcastable to ``[..., I, J]``; zeros when None.
      bias: :math:`\beta`, ``[J, D]``, added to :math:`s` in every iteration; none in the paper, a
        parameter in the authors' code.
      where: children that take part, bool, broadcastable to ``[..., I]``. The others have zero
        coupling, no influence and no gradient, whatever their votes hold.
      leaky: each child may also go to no parent: a zero logit takes part in the softmax and is
        dropped, so that couplings sum to less than 1.
      stop_gradient: no gradient through the logit updates, only through the last pass.

    Returns:
      :class:`Routed`: poses :math:`v` ``[..., J, D]``, activations :math:`\|v\|` ``[..., J]``, and
      the coupling of the last pass ``[..., I, J]``.

    Raises:
      TypeError: votes, logits or bias are not floating point, ``where`` is not bool, or
        ``num_iterations`` is not an integer.
      ValueError: an argument has the wrong shape, or ``num_iterations`` is below 1.

    Example:
      >>> import jax
      >>> from capsjax import dynamic_routing
      >>> votes = jax.random.normal(jax.random.key(0), (1152, 10, 16))
      >>> routed = dynamic_routing(votes, num_iterations=3)
      >>> routed.poses.shape, routed.activations.shape, routed.coupling.shape
      ((10, 16), (10,), (1152, 10))

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, procedure 1.
    """
    votes = as_floating("votes", votes)
    if votes.ndim < 3:
        raise ValueError(f"votes must have shape [..., I, J, D], got shape {votes.shape}")
    try:
        iterations = operator.index(num_iterations)
    except TypeError:
        raise TypeError(
            f"num_iterations must be a Python integer, got {num_iterations!r}"
        ) from None
    if iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    wide = accumulator(votes.dtype)
    if where is not None:
        where = as_mask("where", where, votes.shape[:-2])[..., None]
        # Selected before anything else reads them, so that not even a NaN gets through.
        votes = jnp.where(where[..., None], votes, 0)
    if bias is not None:
        bias = as_floating("bias", bias).astype(wide)
        if bias.shape != votes.shape[-2:]:
            raise ValueError(f"bias must have shape [J, D] = {votes.shape[-2:]}, got {bias.shape}")
        bias = jnp.broadcast_to(bias, (*votes.shape[:-3], *bias.shape))
    prior = jnp.zeros(votes.shape[:-1], wide)
    if logits is not None:
        prior = broadcast("logits", as_floating("logits", logits).astype(wide), prior.shape)

    def route(agreement: jax.Array, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
        """One pass: parents and coupling, from the agreement that has been found so far."""
        votes, prior, bias = inputs
        softmax = _leaky_softmax if leaky else jax.nn.softmax
        coupling = softmax(prior + agreement)
        if where is not None:
            coupling = jnp.where(where, coupling, 0)
        s = jnp.einsum("...ij,...ijd->...jd", coupling, votes.astype(wide))
        return squash(s if bias is None else s + bias), coupling

    inputs = (votes, prior, bias)
    seen = lax.stop_gradient(inputs) if stop_gradient else inputs

    def update(_: jax.Array, agreement: jax.Array) -> jax.Array:
        v, _ = route(agreement, seen)
        return agreement + jnp.einsum("...ijd,...jd->...ij", seen[0].astype(wide), v)

    agreement = lax.fori_loop(0, iterations - 1, update, zeros(prior.shape, wide, *inputs, where))
    poses, coupling = route(agreement, inputs)
    return Routed(
        poses.astype(votes.dtype), length(poses).astype(votes.dtype), coupling.astype(votes.dtype)
    )


def _leaky_softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis with one more logit of zero, whose share is dropped."""
    highest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=0))
    exponentials = jnp.exp(logits - highest)
    return exponentials / (jnp.exp(-highest) + jnp.sum(exponentials, axis=-1, keepdims=True))
