"""Votes: every child's prediction of every parent."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax.ops._checks import as_floating


def dense_votes(
    poses: ArrayLike, weights: ArrayLike, *, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    r"""Predicts the pose of every parent capsule from every child capsule.

    .. math::
      \hat u_{j|i} = W_{ij} u_i

    Args:
      poses: child poses :math:`u`, ``[..., I, K]``, any floating dtype.
      weights: one matrix per pair of child and parent, ``[I, K, J, D]``, any floating dtype.
      precision: precision of the matrix product, as in :func:`jax.numpy.einsum`.

    Returns:
      Votes ``[..., I, J, D]`` in the dtype to which the arguments promote.

    Raises:
      TypeError: an argument is not floating point.
      ValueError: a rank is wrong, or I or K differ between the arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import dense_votes
      >>> dense_votes(jnp.ones((32, 1152, 8)), jnp.ones((1152, 8, 10, 16))).shape
      (32, 1152, 10, 16)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, equation 2.
    """
    poses, weights = check_dense(poses, weights)
    return jnp.einsum("...ik,ikjd->...ijd", poses, weights, precision=precision)


def matrix_votes(
    poses: ArrayLike, weights: ArrayLike, *, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    r"""Computes the votes of children whose poses are square matrices.

    .. math::
      V_{ij} = M_i W_{ij}

    Args:
      poses: child poses :math:`M`, n × n matrices flattened by rows, ``[..., I, n * n]``, any
        floating dtype.
      weights: one matrix per pair of child and parent, ``[I, n, J, n]``, any floating dtype. A pair
        has n² weights, compared with n⁴ in :func:`dense_votes`.
      precision: precision of the matrix product, as in :func:`jax.numpy.einsum`.

    Returns:
      Votes, matrices flattened by rows, ``[..., I, J, n * n]``, in the dtype to which the arguments
      promote.

    Raises:
      TypeError: an argument is not floating point.
      ValueError: a rank is wrong, or the sizes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import matrix_votes
      >>> matrix_votes(jnp.ones((2, 288, 16)), jnp.ones((288, 4, 32, 4))).shape
      (2, 288, 32, 16)

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, section 2.
    """
    poses = as_floating("poses", poses)
    weights = as_floating("weights", weights)
    if weights.ndim != 4 or weights.shape[1] != weights.shape[3]:
        raise ValueError(f"weights must have shape [I, n, J, n], got shape {weights.shape}")
    children, side, parents, _ = weights.shape
    if poses.ndim < 2 or poses.shape[-2:] != (children, side * side):
        raise ValueError(
            f"poses must have shape [..., I, n * n] = [..., {children}, {side * side}] to match"
            f" weights of shape {weights.shape}, got shape {poses.shape}"
        )
    matrices = poses.reshape(*poses.shape[:-1], side, side)
    votes = jnp.einsum("...ipq,iqjr->...ijpr", matrices, weights, precision=precision)
    return votes.reshape(*poses.shape[:-1], parents, side * side)


def check_dense(poses: ArrayLike, weights: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Checks poses ``[..., I, K]`` and weights ``[I, K, J, D]``."""
    poses = as_floating("poses", poses)
    weights = as_floating("weights", weights)
    if weights.ndim != 4:
        raise ValueError(f"weights must have shape [I, K, J, D], got shape {weights.shape}")
    if poses.ndim < 2 or poses.shape[-2:] != weights.shape[:2]:
        raise ValueError(
            f"poses must have shape [..., I, K] = [..., {weights.shape[0]}, {weights.shape[1]}] to"
            f" match weights of shape {weights.shape}, got shape {poses.shape}"
        )
    return poses, weights
