"""Routing by soft k-means clustering of the votes' directions."""

import jax
from jax.typing import ArrayLike

from capsjax.ops import length, squash
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.ops.capsule import unit
from capsjax.routing._passes import Passes, inputs, not_folded
from capsjax.routing.record import Algorithm, register
from capsjax.routing.routed import Routed


@compiled_outside_jit
def kmeans_routing(
    votes: ArrayLike,
    *,
    num_iterations: int = 3,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Routed:
    r"""Clusters the votes around the parents by direction.

    Starting from uniform coupling, each iteration computes

    .. math::
      s_j = \sum_i c_{ij} \hat u_{j|i} + \beta_j, \qquad
      c_{ij} \leftarrow \mathrm{softmax}_j\Bigl(\hat u_{j|i} \cdot \frac{s_j}{\|s_j\|}\Bigr),
      \qquad v_j = \mathrm{squash}(s_j)

    Unlike in dynamic routing, logits are replaced instead of accumulated and do not depend on a
    parent's length, so that more iterations do not sharpen the coupling indefinitely. r iterations
    update the coupling r − 1 times: with one, it is uniform. Softmax and sums are float32 (or
    float64). Gradients flow through all iterations; a zero sum has direction zero.

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      num_iterations: r, a Python integer of at least 1.
      bias: :math:`\beta`, ``[J, D]``, added in every iteration.
      where: children that take part, bool, broadcastable to ``[..., I]``.

    Returns:
      :class:`Routed`: poses :math:`v` ``[..., J, D]``, activations :math:`\|v\|` ``[..., J]``, and
      the coupling of the last pass ``[..., I, J]``, in the dtype of the votes.

    Raises:
      TypeError: votes or bias are not floating point, ``where`` is not bool, or
        ``num_iterations`` is not an integer.
      ValueError: an argument has the wrong shape, or ``num_iterations`` is below 1.

    Example:
      >>> import jax
      >>> from capsjax import kmeans_routing
      >>> votes = jax.random.normal(jax.random.key(0), (1152, 10, 16))
      >>> jax.jit(kmeans_routing)(votes).poses.shape
      (10, 16)

    Reference:
      Ren, Lu, *Compositional Coding Capsule Network with K-Means Routing for Text Classification*,
      2018 (arXiv 1810.09177).
    """
    return kmeans_passes(votes, bias=bias, where=where).run(num_iterations)


def kmeans_passes(
    votes: ArrayLike, *, bias: ArrayLike | None = None, where: ArrayLike | None = None
) -> Passes:
    """The passes of :func:`kmeans_routing`, whose carry is the logits."""
    given = inputs(votes, bias=bias, where=where)

    def gather(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        coupling = given.coupled(jax.nn.softmax(logits))
        return given.gather(coupling), coupling

    def update(_: jax.Array, logits: jax.Array) -> jax.Array:
        s, _ = gather(logits)
        return given.agreement(unit(s))

    def finish(_: ArrayLike, logits: jax.Array) -> tuple[Routed, jax.Array]:
        s, coupling = gather(logits)
        poses = squash(s)
        return given.routed(poses, length(poses), coupling), logits

    return Passes(given.votes, not_folded(given.zeros()), update, finish)


KMEANS = register(
    Algorithm(
        name="kmeans",
        function=kmeans_routing,
        paper="Ren, Lu, 2018",
        passes=kmeans_passes,
        options=("num_iterations",),
        has_bias=True,
        squash=squash,
    )
)
