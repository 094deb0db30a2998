"""Squashing functions and the length of capsules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from capsjax.ops._checks import (
    accumulator,
    as_axis,
    as_floating,
    as_number,
    is_sharded,
    is_traced,
    safe_sqrt,
    selection_precision,
)

# In numbers; the matrix is a constant of the program.
_LARGEST_MATRIX = 2**18


def squash(s: ArrayLike, axis: int = -1, *, epsilon: float = 0.0) -> jax.Array:
    r"""Shrinks vectors to a length below one and keeps their direction.

    .. math::
      v = \frac{\|s\|^2}{1 + \|s\|^2} \frac{s}{\|s\|}

    A zero vector gives a zero vector and a zero gradient. The norm is computed in float32 (or
    float64 for float64 input): vectors shorter than about 1e-19 count as zero, and vectors that
    are longer than 1e19 or have an infinite or NaN component give NaN.

    Args:
      s: vectors, ``[..., D]``, any floating dtype.
      axis: the axis of the vector components.
      epsilon: added to :math:`\|s\|^2` under the square root in the denominator, as in several
        public implementations; the paper uses none.

    Returns:
      Array of the shape and dtype of ``s``.

    Raises:
      TypeError: ``s`` is not floating point, ``axis`` is not an integer, or ``epsilon`` is not a
        number.
      ValueError: ``axis`` is out of range, or ``epsilon`` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import squash
      >>> print(squash(jnp.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])).round(4))
      [[0.5769 0.7692]
       [0.5    0.    ]
       [0.     0.    ]]

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, equation 1.
    """
    s, axis = as_floating("s", s), as_axis(axis)
    epsilon = as_number("epsilon", epsilon, least=0)
    wide = s.astype(accumulator(s.dtype))
    squared = jnp.sum(wide * wide, axis=axis, keepdims=True)
    return (wide * _scale(squared, epsilon)).astype(s.dtype)


def squash_channels(
    channels: jax.Array, features: int, arrange: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Squashes capsules of `features` neighbouring channels each, ``[..., T * K]``.

    On TPUs, sums over K and their repetition are products with a matrix of zeros and ones, and the
    channels keep their layout; a NaN or an overflow spreads to all capsules at its position.

    Args:
      channels: ``[..., T * K]``.
      features: K.
      arrange: reshapes channels to capsules, ``[..., K]``.

    Returns:
      The capsules.
    """
    types = channels.shape[-1] // features

    def by_sums(channels: jax.Array) -> jax.Array:
        return squash(arrange(channels))

    def by_products(channels: jax.Array) -> jax.Array:
        wide = channels.astype(accumulator(channels.dtype))
        belongs = jnp.asarray(np.repeat(np.eye(types), features, axis=0), wide.dtype)
        precision = selection_precision(channels.dtype)
        squared = jnp.matmul(wide * wide, belongs, precision=precision)
        scale = jnp.matmul(_scale(squared), belongs.T, precision=precision)
        return arrange((wide * scale).astype(channels.dtype))

    if features == 1 or types * types * features > _LARGEST_MATRIX or is_sharded(channels):
        return by_sums(channels)
    capsules: jax.Array = jax.lax.platform_dependent(channels, tpu=by_products, default=by_sums)
    return capsules


def _scale(squared: jax.Array, epsilon: float = 0.0) -> jax.Array:
    """The factor of a vector, given its squared length."""
    if is_traced(epsilon):  # it may be zero, as may be the length
        total = squared + epsilon
        zero = total < jnp.finfo(total.dtype).tiny
        return jnp.where(zero, 0, squared / (1 + squared) / jnp.sqrt(jnp.where(zero, 1, total)))
    if epsilon:
        return squared / (1 + squared) / jnp.sqrt(squared + epsilon)
    return safe_sqrt(squared) / (1 + squared)


def length(v: ArrayLike, axis: int = -1) -> jax.Array:
    r"""Euclidean length of vectors; after :func:`squash`, the probability that an entity exists.

    .. math::
      \|v\| = \sqrt{\textstyle\sum_d v_d^2}

    A zero vector has a zero gradient. The length is NaN if a component is, and infinite if a
    component is or if it exceeds the range of the dtype. The sum is computed in float32 (or
    float64 for float64 input).

    Args:
      v: vectors, ``[..., D]``, any floating dtype.
      axis: the axis of the vector components.

    Returns:
      Array ``[...]``: the shape of ``v`` without ``axis``, in its dtype.

    Raises:
      TypeError: ``v`` is not floating point, or ``axis`` is not an integer.
      ValueError: ``axis`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import length
      >>> print(length(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      [5. 0.]

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 3.
    """
    v, axis = as_floating("v", v), as_axis(axis)
    wide = v.astype(accumulator(v.dtype))
    return safe_sqrt(jnp.sum(wide * wide, axis=axis)).astype(v.dtype)


def exponential_squash(s: ArrayLike, axis: int = -1) -> jax.Array:
    r"""Shrinks vectors to a length below one, linearly for short ones.

    .. math::
      v = \bigl(1 - e^{-\|s\|}\bigr) \frac{s}{\|s\|}

    Short vectors nearly keep their length, which :func:`squash` squares, and so the gradients of
    nearly silent capsules do not vanish. A zero vector gives a zero vector and a zero gradient.
    The norm is computed in float32 (or float64 for float64 input). A vector that is longer than
    about 1e19 or has an infinite or NaN component gives NaN.

    Args:
      s: vectors, ``[..., D]``, any floating dtype.
      axis: the axis of the vector components.

    Returns:
      Array of the shape and dtype of ``s``.

    Raises:
      TypeError: ``s`` is not floating point, or ``axis`` is not an integer.
      ValueError: ``axis`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import exponential_squash
      >>> print(exponential_squash(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      [[0.5960 0.7946]
       [0.     0.    ]]

    Reference:
      Mazzia, Salvetti, Chiaberge, *Efficient-CapsNet: Capsule Network with Self-Attention Routing*,
      Scientific Reports 2021, equation 3.
    """
    s, axis = as_floating("s", s), as_axis(axis)
    wide = s.astype(accumulator(s.dtype))
    norm = safe_sqrt(jnp.sum(wide * wide, axis=axis, keepdims=True))
    return (unit(wide, axis) * -jnp.expm1(-norm)).astype(s.dtype)


def unit(s: jax.Array, axis: int = -1) -> jax.Array:
    """Normalises vectors to length one; zero stays zero with a zero gradient, infinity is NaN."""
    norm = safe_sqrt(jnp.sum(s * s, axis=axis, keepdims=True))
    norm = jnp.where(norm < jnp.inf, norm, jnp.nan)
    return s / jnp.where(norm == 0, jnp.inf, norm)
