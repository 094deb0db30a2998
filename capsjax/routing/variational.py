"""Variational Bayes routing: EM routing with priors on every cluster."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma
from jax.typing import ArrayLike

from capsjax.ops._checks import as_number, check_callable, is_traced
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.routing._passes import Passes, as_activations, as_parameter, inputs
from capsjax.routing.em import Normalize, beta_parameters
from capsjax.routing.record import Algorithm, register
from capsjax.routing.routed import Routed


@compiled_outside_jit
def variational_routing(
    votes: ArrayLike,
    activations: ArrayLike,
    *,
    beta_a: ArrayLike,
    beta_u: ArrayLike,
    num_iterations: int = 3,
    alpha: float = 1.0,
    kappa: float = 1.0,
    nu: float | None = None,
    psi: float = 1.0,
    where: ArrayLike | None = None,
    normalize: Normalize | None = None,
) -> Routed:
    r"""Fits a Bayesian mixture of Gaussians to the votes; low entropy activates a parent.

    The mixing proportions have a Dirichlet prior, and every parent's mean and diagonal precision
    have a Gaussian-Wishart prior around zero. M-step, with :math:`r_{ij} = R_{ij} a_i` and
    :math:`N_j = \sum_i r_{ij}`:

    .. math::
      \alpha_j = \alpha + N_j, \quad \kappa_j = \kappa + N_j, \quad \nu_j = \nu + N_j, \quad
      m_j = \frac{\sum_i r_{ij} \hat u_{ij}}{\kappa_j}, \quad
      \psi_{jh} = \psi + \sum_i r_{ij} (\hat u_{ijh} - m_{jh})^2 + \kappa m_{jh}^2

    E-step, between two M-steps:

    .. math::
      R_{ij} \propto \exp\Bigl(\mathbb E \ln \pi_j + \tfrac12 \mathbb E \ln |\Lambda_j|
        - \tfrac12 \Bigl(\frac{D}{\kappa_j}
        + \nu_j \sum_h \frac{(\hat u_{ijh} - m_{jh})^2}{\psi_{jh}}\Bigr)\Bigr)

    with :math:`\mathbb E \ln \pi_j = \digamma(\alpha_j) - \digamma(\sum_j \alpha_j)` and
    :math:`\mathbb E \ln |\Lambda_j| = \sum_{d=0}^{D-1} \digamma(\tfrac{\nu_j - d}{2}) + D \ln 2
    - \sum_h \ln \psi_{jh}`. Activations fall with the entropy of the parent's Gaussian:

    .. math::
      a_j = \sigma\Bigl(\beta_{a,j} - \beta_{u,j} - e^{\mathbb E \ln \pi_j}
        \bigl(\tfrac D2 \ln 2 \pi e - \tfrac12 \mathbb E \ln |\Lambda_j|\bigr)\Bigr)

    Sums are float32 (or float64). Gradients flow through all iterations.

    Args:
      votes: :math:`\hat u`, ``[..., I, J, D]``, any floating dtype.
      activations: :math:`a_i` of the children in [0, 1], broadcastable to ``[..., I]``.
      beta_a: :math:`\beta_a`, ``[J]``, learned.
      beta_u: :math:`\beta_u`, ``[J]``, learned.
      num_iterations: r, a Python integer of at least 1: r M-steps, r − 1 E-steps.
      alpha: concentration of the Dirichlet prior, positive.
      kappa: weight of the prior mean of zero, in votes, positive.
      nu: degrees of freedom of the Wishart prior, above D − 1; D + 1 when None.
      psi: diagonal of the Wishart prior's inverse scale matrix, positive; in squared units of the
        votes.
      where: children that take part, bool, broadcastable to ``[..., I]``.
      normalize: replaces the softmax over the parents, as in :func:`capsjax.em_routing`.

    Returns:
      :class:`Routed`: poses :math:`m` ``[..., J, D]``, activations ``[..., J]``, and the
      responsibilities R of the last M-step ``[..., I, J]``, in the dtype of the votes.

    Raises:
      TypeError: an array is not floating point, ``where`` is not bool, ``num_iterations`` is not an
        integer, another option is not a number, or ``normalize`` is not a function.
      ValueError: an argument has the wrong shape, ``num_iterations`` is below 1, or a prior is out
        of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import variational_routing
      >>> votes = jax.random.normal(jax.random.key(0), (288, 10, 16))
      >>> routed = jax.jit(variational_routing)(
      ...     votes, jnp.ones(288), beta_a=jnp.zeros(10), beta_u=jnp.zeros(10))
      >>> routed.poses.shape, routed.activations.shape
      ((10, 16), (10,))

    Reference:
      Ribeiro, Leontidis, Kollias, *Capsule Routing via Variational Bayes*, AAAI 2020, algorithm 1,
      with the activation of the authors' code, but without its normalisation over the batch. That
      code omits :math:`\mathbb E \ln \pi_j` from the numerator of R, whose sum over the parents is
      then not 1; the paper and this function include it.
    """
    passes = variational_passes(
        votes,
        activations,
        beta_a=beta_a,
        beta_u=beta_u,
        alpha=alpha,
        kappa=kappa,
        nu=nu,
        psi=psi,
        where=where,
        normalize=normalize,
    )
    return passes.run(num_iterations)


def _above(least: int, name: str, value: Any) -> Any:
    """Returns an option as a number, or raises unless it is above `least`."""
    number = as_number(name, value)
    if not is_traced(number) and not number > least:
        raise ValueError(f"{name} must be above {least}, got {number}")
    return number


def variational_passes(
    votes: ArrayLike,
    activations: ArrayLike,
    *,
    beta_a: ArrayLike,
    beta_u: ArrayLike,
    alpha: float = 1.0,
    kappa: float = 1.0,
    nu: float | None = None,
    psi: float = 1.0,
    where: ArrayLike | None = None,
    normalize: Normalize | None = None,
) -> Passes:
    """The passes of :func:`variational_routing`, whose carry is ln R, not normalised."""
    given = inputs(votes, where=where)
    if normalize is not None:
        check_callable(normalize=normalize)
    present = as_activations(activations, given)
    parents, features = given.votes.shape[-2:]
    nu = features + 1.0 if nu is None else nu
    alpha, kappa = _above(0, "alpha", alpha), _above(0, "kappa", kappa)
    nu, psi = _above(features - 1, "nu", nu), _above(0, "psi", psi)
    use = as_parameter("beta_a", beta_a, "[J]", (parents,), given)
    cost = as_parameter("beta_u", beta_u, "[J]", (parents,), given)
    wide_votes = given.votes.astype(given.wide)

    def m_step(logits: jax.Array) -> tuple[jax.Array, ...]:
        """Number of votes N, means m, scales ψ, E ln π, E ln |Λ|, responsibilities."""
        responsibility = given.coupled((normalize or jax.nn.softmax)(logits))
        r = responsibility * present[..., None]
        count = jnp.sum(r, axis=-2)
        mean = given.gather(r) / (kappa + count)[..., None]
        deviation = wide_votes - mean[..., None, :, :]
        # Equivalent to deviations from the votes' own mean, but safe for nearly empty parents.
        spread = jnp.sum(r[..., None] * deviation * deviation, axis=-3)
        scales = psi + spread + kappa * mean * mean
        log_proportion = digamma(alpha + count) - digamma(
            jnp.sum(alpha + count, axis=-1, keepdims=True)
        )
        freedom = (nu + count)[..., None]
        degrees = jnp.arange(features, dtype=freedom.dtype)
        degrees = jnp.broadcast_to(degrees, (*freedom.shape[:-1], features))
        log_precision = jnp.sum(
            digamma((freedom - degrees) / 2) - jnp.log(scales), axis=-1
        ) + features * math.log(2)
        return count, mean, scales, log_proportion, log_precision, responsibility

    def update(_: jax.Array, logits: jax.Array) -> jax.Array:
        count, mean, scales, log_proportion, log_precision, _ = m_step(logits)
        deviation = wide_votes - mean[..., None, :, :]
        distance = jnp.sum(deviation * deviation / scales[..., None, :, :], axis=-1)
        constant = log_proportion + log_precision / 2 - features / (2 * (kappa + count))
        return constant[..., None, :] - (nu + count)[..., None, :] / 2 * distance

    def finish(_: ArrayLike, logits: jax.Array) -> tuple[Routed, jax.Array]:
        _, mean, _, log_proportion, log_precision, responsibility = m_step(logits)
        entropy = features / 2 * math.log(2 * math.pi * math.e) - log_precision / 2
        activation = jnp.broadcast_to(use - cost, entropy.shape) - (
            jnp.exp(log_proportion) * entropy
        )
        return given.routed(mean, jax.nn.sigmoid(activation), responsibility), logits

    first = given.zeros() + jnp.zeros_like(present)[..., None]
    return Passes(given.votes, first, update, finish)


VARIATIONAL = register(
    Algorithm(
        name="variational",
        function=variational_routing,
        paper="Ribeiro, Leontidis, Kollias, AAAI 2020",
        passes=variational_passes,
        parameters=beta_parameters,
        options=("num_iterations", "alpha", "kappa", "nu", "psi"),
        takes_activations=True,
        takes_normalize=True,
        # The priors suit votes of about one.
        class_capsules={"kernel_init": jax.nn.initializers.normal(1.0)},
    )
)
