"""Routing by agreement: Sabour, Frosst, Hinton, NIPS 2017."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax.ops import length, squash
from capsjax.ops._checks import check_flags
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.routing._passes import Inputs, Passes, as_logits, inputs, not_folded
from capsjax.routing.fused import dense_capsules
from capsjax.routing.record import Algorithm, register
from capsjax.routing.routed import Routed


@compiled_outside_jit
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
    r"""Routes child capsules to the parents with whose poses their votes agree.

    Starting from the prior logits :math:`b_{ij}`, each iteration computes

    .. math::
      c_{ij} = \mathrm{softmax}_j(b_{ij}), \quad
      s_j = \sum_i c_{ij} \hat u_{j|i} + \beta_j, \quad
      v_j = \mathrm{squash}(s_j), \quad
      b_{ij} \leftarrow b_{ij} + \hat u_{j|i} \cdot v_j

    The softmax runs over the **parents**, and every example has its own logits. r iterations update
    the logits r − 1 times in a ``lax.fori_loop``: with one, the coupling is uniform. Logits,
    softmax and sums are float32 (or float64); results are cast to the dtype of the votes. Gradients
    flow through all iterations.

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      num_iterations: r, a Python integer of at least 1.
      logits: prior logits, broadcastable to ``[..., I, J]``; zeros when None.
      bias: :math:`\beta`, ``[J, D]``, added to :math:`s` in every iteration. The authors' code has
        it, the paper does not.
      where: children that take part, bool, broadcastable to ``[..., I]``. The others have zero
        coupling, no influence and no gradient, whatever their votes are.
      leaky: lets a child go to no parent: the softmax includes a logit of zero, whose share is
        dropped, and so couplings sum to less than 1.
      stop_gradient: stops gradients through the logit updates; they flow through the last pass
        only.

    Returns:
      :class:`Routed`: poses :math:`v` ``[..., J, D]``, activations :math:`\|v\|` ``[..., J]``, and
      the coupling of the last pass ``[..., I, J]``.

    Raises:
      TypeError: votes, logits or bias are not floating point, ``where`` is not bool,
        ``num_iterations`` is not an integer, or ``leaky`` or ``stop_gradient`` is not a bool.
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
    passes = dynamic_passes(
        votes, logits=logits, bias=bias, where=where, leaky=leaky, stop_gradient=stop_gradient
    )
    return passes.run(num_iterations)


def dynamic_passes(
    votes: ArrayLike,
    *,
    logits: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    leaky: bool = False,
    stop_gradient: bool = False,
) -> Passes:
    """The passes of :func:`dynamic_routing`, whose carry is the sum of agreements."""
    check_flags(leaky=leaky, stop_gradient=stop_gradient)
    given = inputs(votes, bias=bias, where=where)
    prior = given.zeros()
    if logits is not None:
        prior = prior + as_logits("logits", logits, given)
    softmax = _leaky_softmax if leaky else jax.nn.softmax

    def route(agreement: jax.Array, given: Inputs, prior: jax.Array) -> tuple[jax.Array, jax.Array]:
        coupling = given.coupled(softmax(prior + agreement))
        return squash(given.gather(coupling)), coupling

    seen = lax.stop_gradient((given, prior)) if stop_gradient else (given, prior)

    def update(_: jax.Array, agreement: jax.Array) -> jax.Array:
        v, _ = route(agreement, *seen)
        return agreement + seen[0].agreement(v)

    def finish(_: ArrayLike, agreement: jax.Array) -> tuple[Routed, jax.Array]:
        poses, coupling = route(agreement, given, prior)
        return given.routed(poses, length(poses), coupling), prior + agreement

    return Passes(given.votes, not_folded(jnp.zeros_like(prior)), update, finish)


def _leaky_softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis and an additional logit of zero, whose share is dropped."""
    highest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=0))
    exponentials = jnp.exp(logits - highest)
    return exponentials / (jnp.exp(-highest) + jnp.sum(exponentials, axis=-1, keepdims=True))


DYNAMIC = register(
    Algorithm(
        name="dynamic",
        function=dynamic_routing,
        paper="Sabour, Frosst, Hinton, NIPS 2017",
        passes=dynamic_passes,
        options=("num_iterations", "leaky", "stop_gradient"),
        has_bias=True,
        takes_logits=True,
        squash=squash,
        fused=dense_capsules,
    )
)
