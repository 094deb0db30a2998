"""EM routing: parents are Gaussian clusters of votes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax.ops._checks import as_number, check_callable
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.routing._passes import Passes, as_activations, as_parameter, inputs, per_mass
from capsjax.routing.record import Algorithm, Parameter, Sizes, register
from capsjax.routing.routed import Routed

Normalize = Callable[[jax.Array], jax.Array]


@compiled_outside_jit
def em_routing(
    votes: ArrayLike,
    activations: ArrayLike,
    *,
    beta_a: ArrayLike,
    beta_u: ArrayLike,
    num_iterations: int = 3,
    inverse_temperature: float = 0.01,
    epsilon: float = 1e-4,
    where: ArrayLike | None = None,
    normalize: Normalize | None = None,
) -> Routed:
    r"""Fits a Gaussian to the votes for each parent, and activates parents with a good fit.

    M-step, with the responsibilities :math:`R_{ij}` (at first equal) and
    :math:`r_{ij} = R_{ij} a_i`:

    .. math::
      \mu_{jh} = \frac{\sum_i r_{ij} \hat u_{ijh}}{\sum_i r_{ij}}, \quad
      \sigma_{jh}^2 = \frac{\sum_i r_{ij} (\hat u_{ijh} - \mu_{jh})^2}{\sum_i r_{ij}} + \epsilon,
      \quad
      a_j = \sigma\Bigl(\lambda_t \bigl(\beta_{a,j} -
        \sum_h (\beta_{u,j} + \ln \sigma_{jh}) \textstyle\sum_i r_{ij}\bigr)\Bigr)

    E-step, between two M-steps:

    .. math::
      R_{ij} = \frac{a_j p_{ij}}{\sum_j a_j p_{ij}}, \qquad
      \ln p_{ij} = -\sum_h \frac{(\hat u_{ijh} - \mu_{jh})^2}{2 \sigma_{jh}^2}
        - \sum_h \ln \sigma_{jh} - \tfrac{D}{2} \ln 2 \pi

    The inverse temperature rises with the iterations t = 0, 1, …:
    :math:`\lambda_t = \lambda (1 - 0.95^{t+1})`. r iterations take r M-steps and r − 1 E-steps,
    which are computed in logarithms. Sums are float32 (or float64). Gradients flow through all
    iterations.

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      activations: :math:`a_i` of the children in [0, 1], broadcastable to ``[..., I]``.
      beta_a: :math:`\beta_a`, ``[J]``, learned: cost of not activating a parent, in nats.
      beta_u: :math:`\beta_u`, ``[J]``, learned: cost per dimension and child, in nats.
      num_iterations: r, a Python integer of at least 1.
      inverse_temperature: :math:`\lambda`.
      epsilon: added to the variance, so that the cluster of a single child does not collapse; in
        squared units of the votes.
      where: children that take part, bool, broadcastable to ``[..., I]``. The others have zero
        coupling, no influence and no gradient.
      normalize: maps :math:`\ln a_j p_{ij}`, ``[..., I, J]``, to responsibilities; a softmax over
        the parents when None. With overlapping receptive fields, the parents of a child compete
        across leading axes here: see :class:`capsjax.nn.ConvCapsules`.

    Returns:
      :class:`Routed`: poses :math:`\mu` ``[..., J, D]``, activations :math:`a_j` ``[..., J]``, and
      the responsibilities R of the last M-step ``[..., I, J]``, in the dtype of the votes. The pose
      of a parent with less than 1e-6 of a child is zero.

    Raises:
      TypeError: an array is not floating point, ``where`` is not bool, ``num_iterations`` is not an
        integer, another option is not a number, or ``normalize`` is not a function.
      ValueError: an argument has the wrong shape, ``num_iterations`` is below 1, ``epsilon`` is
        negative, or it or the inverse temperature is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import em_routing
      >>> votes = jax.random.normal(jax.random.key(0), (288, 10, 16))
      >>> betas = {"beta_a": jnp.zeros(10), "beta_u": jnp.zeros(10)}
      >>> routed = jax.jit(em_routing)(votes, jnp.ones(288), **betas)
      >>> routed.poses.shape, routed.activations.shape, routed.coupling.shape
      ((10, 16), (10,), (288, 10))

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, procedure 1. The
      schedule of the inverse temperature comes from the authors' answers in the paper's public
      review. The variance's :math:`\epsilon` and the logarithms are not in the paper.
    """
    passes = em_passes(
        votes,
        activations,
        beta_a=beta_a,
        beta_u=beta_u,
        inverse_temperature=inverse_temperature,
        epsilon=epsilon,
        where=where,
        normalize=normalize,
    )
    return passes.run(num_iterations)


def em_passes(
    votes: ArrayLike,
    activations: ArrayLike,
    *,
    beta_a: ArrayLike,
    beta_u: ArrayLike,
    inverse_temperature: float = 0.01,
    epsilon: float = 1e-4,
    where: ArrayLike | None = None,
    normalize: Normalize | None = None,
) -> Passes:
    """The passes of :func:`em_routing`, whose carry is the logarithm of :math:`a_j p_{ij}`."""
    inverse_temperature = as_number("inverse_temperature", inverse_temperature)
    epsilon = as_number("epsilon", epsilon, least=0)
    given = inputs(votes, where=where)
    if normalize is not None:
        check_callable(normalize=normalize)
    present = as_activations(activations, given)
    parents, features = given.votes.shape[-2:]
    use = as_parameter("beta_a", beta_a, "[J]", (parents,), given)
    cost = as_parameter("beta_u", beta_u, "[J]", (parents,), given)
    wide_votes = given.votes.astype(given.wide)

    def m_step(
        number: ArrayLike, logits: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Means, variances, logits of the parents' activations, responsibilities."""
        responsibility = given.coupled((normalize or jax.nn.softmax)(logits))
        r = responsibility * present[..., None]
        mass = jnp.sum(r, axis=-2)
        shares = per_mass(r, mass[..., None, :])
        mean = given.gather(shares)
        deviation = wide_votes - mean[..., None, :, :]
        variance = jnp.sum(shares[..., None] * deviation * deviation, axis=-3) + epsilon
        nats = features * jnp.broadcast_to(cost, mass.shape) + _log_sigma(variance)
        schedule = 1 - 0.95 ** (jnp.asarray(number, given.wide) + 1)
        activation = (inverse_temperature * schedule) * (
            jnp.broadcast_to(use, mass.shape) - nats * mass
        )
        return mean, variance, activation, responsibility

    def update(number: jax.Array, logits: jax.Array) -> jax.Array:
        mean, variance, activation, _ = m_step(number, logits)
        deviation = wide_votes - mean[..., None, :, :]
        distance = jnp.sum(deviation * deviation / (2 * variance[..., None, :, :]), axis=-1)
        normalizer = _log_sigma(variance) + features / 2 * jnp.log(2 * jnp.pi)
        return (jax.nn.log_sigmoid(activation) - normalizer)[..., None, :] - distance

    def finish(number: ArrayLike, logits: jax.Array) -> tuple[Routed, jax.Array]:
        mean, _, activation, responsibility = m_step(number, logits)
        return given.routed(mean, jax.nn.sigmoid(activation), responsibility), logits

    first = given.zeros() + jnp.zeros_like(present)[..., None]
    return Passes(given.votes, first, update, finish)


def _log_sigma(variance: jax.Array) -> jax.Array:
    """Sum of the logarithms of the standard deviations over the dimensions."""
    return jnp.sum(jnp.log(variance), axis=-1) / 2


def beta_parameters(sizes: Sizes) -> dict[str, Parameter]:
    """The costs of not activating and of activating a parent."""
    beta = Parameter((sizes.out_capsules,), jax.nn.initializers.zeros)
    return {"beta_a": beta, "beta_u": beta}


EM = register(
    Algorithm(
        name="em",
        function=em_routing,
        paper="Hinton, Sabour, Frosst, ICLR 2018",
        passes=em_passes,
        parameters=beta_parameters,
        options=("num_iterations", "inverse_temperature", "epsilon"),
        takes_activations=True,
        takes_normalize=True,
        # With a hundred children or more and votes of a few hundredths, activations then start at
        # about one half, where they have gradients, and can reach 0 and 1.
        class_capsules={
            "inverse_temperature": 0.5,
            "beta_u_init": jax.nn.initializers.constant(3.5),
        },
    )
)
