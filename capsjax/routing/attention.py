"""Inverted dot-product attention routing."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax.ops import length, squash
from capsjax.ops._checks import as_number
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.routing._passes import Passes, as_parameter, inputs, layer_norm, not_folded
from capsjax.routing.record import Algorithm, Parameter, Sizes, register
from capsjax.routing.routed import Routed


@compiled_outside_jit
def attention_routing(
    votes: ArrayLike,
    *,
    num_iterations: int = 2,
    scale: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
) -> Routed:
    r"""Routes by attention, with parents as queries and a softmax over the parents.

    .. math::
      p_j = \mathrm{LayerNorm}\Bigl(\sum_i c_{ij} \hat u_{j|i}\Bigr), \qquad
      c_{ij} \leftarrow \mathrm{softmax}_j\Bigl(\frac{\hat u_{j|i} \cdot p_j}{\sqrt D}\Bigr)

    starting from :math:`c_{ij} = 1 / J`. r iterations update the coupling r − 1 times: with one,
    it is uniform. From the second iteration on, the paper updates all layers of a network
    concurrently; this function computes a single layer. Softmax, sums and normalisation are
    float32 (or float64).

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      num_iterations: r, a Python integer of at least 1.
      scale: scale of the layer normalisation, ``[D]``, learned; ones when None.
      offset: offset of the layer normalisation, ``[D]``, learned; zeros when None.
      epsilon: added to the variance in the layer normalisation.
      where: children that take part, bool, broadcastable to ``[..., I]``.

    Returns:
      :class:`Routed`: poses :math:`p` ``[..., J, D]``, activations ``[..., J]``, and the coupling
      of the last pass ``[..., I, J]``, in the dtype of the votes. The paper has no activations and
      computes class logits as a linear function of the poses. Here activations are the lengths of
      the squashed sums before normalisation, as in dynamic routing:
      :math:`\|\mathrm{squash}(\sum_i c_{ij} \hat u_{j|i})\|`.

    Raises:
      TypeError: votes, scale or offset are not floating point, ``where`` is not bool,
        ``num_iterations`` is not an integer, or ``epsilon`` is not a number.
      ValueError: an argument has the wrong shape, ``num_iterations`` is below 1, or ``epsilon`` is
        negative or not finite.

    Example:
      >>> import jax
      >>> from capsjax import attention_routing
      >>> votes = jax.random.normal(jax.random.key(0), (1152, 10, 16))
      >>> jax.jit(attention_routing)(votes).poses.shape
      (10, 16)

    Reference:
      Tsai, Srivastava, Goh, Salakhutdinov, *Capsules with Inverted Dot-Product Attention Routing*,
      ICLR 2020, algorithm 1.
    """
    passes = attention_passes(votes, scale=scale, offset=offset, epsilon=epsilon, where=where)
    return passes.run(num_iterations)


def attention_passes(
    votes: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
) -> Passes:
    """The passes of :func:`attention_routing`, whose carry is the logits."""
    epsilon = as_number("epsilon", epsilon, least=0)
    given = inputs(votes, where=where)
    features = given.votes.shape[-1]
    factor = None if scale is None else as_parameter("scale", scale, "[D]", (features,), given)
    summand = None if offset is None else as_parameter("offset", offset, "[D]", (features,), given)

    def normalise(s: jax.Array) -> jax.Array:
        poses = layer_norm(s, epsilon)
        if factor is not None:
            poses = poses * jnp.broadcast_to(factor, poses.shape)
        if summand is not None:
            poses = poses + jnp.broadcast_to(summand, poses.shape)
        return poses

    def gather(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        coupling = given.coupled(jax.nn.softmax(logits))
        return given.gather(coupling), coupling

    def update(_: jax.Array, logits: jax.Array) -> jax.Array:
        s, _ = gather(logits)
        return given.agreement(normalise(s)) / math.sqrt(max(1, features))

    def finish(_: ArrayLike, logits: jax.Array) -> tuple[Routed, jax.Array]:
        s, coupling = gather(logits)
        return given.routed(normalise(s), length(squash(s)), coupling), logits

    return Passes(given.votes, not_folded(given.zeros()), update, finish)


def _parameters(sizes: Sizes) -> dict[str, Parameter]:
    """Scale and offset of the layer normalisation."""
    return {
        "scale": Parameter((sizes.out_features,), jax.nn.initializers.ones),
        "offset": Parameter((sizes.out_features,), jax.nn.initializers.zeros),
    }


ATTENTION = register(
    Algorithm(
        name="attention",
        function=attention_routing,
        paper="Tsai, Srivastava, Goh, Salakhutdinov, ICLR 2020",
        passes=attention_passes,
        parameters=_parameters,
        options=("num_iterations", "epsilon"),
    )
)
