"""Losses of capsule networks, one value per example; the caller takes the mean."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax.ops._checks import (
    accumulator,
    as_array,
    as_axis,
    as_floating,
    as_mask,
    as_number,
    as_one_hot,
    broadcast,
    is_real,
    is_sharded,
)


def margin_loss(
    lengths: ArrayLike,
    labels: ArrayLike,
    *,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    lambda_: float = 0.5,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Margin loss on the lengths of class capsules, summed over the classes.

    .. math::
      L = \sum_k T_k \max(0, m^+ - \|v_k\|)^2 + \lambda (1 - T_k) \max(0, \|v_k\| - m^-)^2

    Several classes may be present at once. The sum is computed in float32 (or float64), and is NaN
    or infinite if a length or a label is.

    Args:
      lengths: lengths of the class capsules, ``[..., J]``, any floating dtype; without a softmax.
      labels: :math:`T`, one-hot or multi-hot, ``[..., J]``, any real dtype or bool.
      m_plus: length that a present class should reach.
      m_minus: length that an absent class should stay below.
      lambda_: weight of the absent classes.
      axis: the class axis.
      where: classes to count, bool, broadcastable to ``[..., J]``; None counts all.

    Returns:
      Loss per example, ``[...]``, in the dtype of ``lengths``.

    Raises:
      TypeError: ``lengths`` is not floating point, ``labels`` are not real, or a margin or the
        weight is not a number.
      ValueError: ``labels`` does not have the shape of ``lengths``, or a margin or the weight is
        not finite, or an array with axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import margin_loss
      >>> lengths = jnp.array([[-0.3, 0.3, 0.9], [1.2, 0.5, -0.5]])
      >>> print(margin_loss(lengths, jnp.array([[0, 0, 1], [1, 1, 1]])))
      [0.02 2.12]

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, equation 4.
    """
    lengths = as_floating("lengths", lengths)
    labels = as_one_hot("labels", labels, "lengths", lengths.shape)
    for name, value in {"m_plus": m_plus, "m_minus": m_minus, "lambda_": lambda_}.items():
        as_number(name, value)
    wide = lengths.astype(accumulator(lengths.dtype))
    present = labels.astype(wide.dtype)

    def terms(lengths: jax.Array) -> jax.Array:
        return (
            present * _above_zero(m_plus - lengths) ** 2
            + lambda_ * (1 - present) * _above_zero(lengths - m_minus) ** 2
        )

    return _sum_of(terms, wide, as_axis(axis), where).astype(lengths.dtype)


def spread_loss(
    activations: ArrayLike,
    labels: ArrayLike,
    *,
    margin: ArrayLike = 0.9,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Spread loss: penalises wrong classes whose activation is within a margin of the correct one.

    .. math::
      L = \sum_{i \ne t} \max\bigl(0, m - (a_t - a_i)\bigr)^2

    With several correct classes, the sum runs over all pairs of a wrong and a correct class. It is
    computed in float32 (or float64), and is NaN if an activation or a label is NaN or infinite.

    Args:
      activations: activations of the class capsules, ``[..., J]``, any floating dtype.
      labels: one-hot or multi-hot, ``[..., J]``, any real dtype or bool; nonzero for the correct
        classes.
      margin: m, broadcastable to the loss; the paper raises it from 0.2 to 0.9 during training.
      axis: the class axis.
      where: classes to count, bool, broadcastable to ``[..., J]``; None counts all.

    Returns:
      Loss per example, ``[...]``, in the dtype of ``activations``.

    Raises:
      TypeError: the activations are not floating point, ``labels`` or ``margin`` are not real, or
        ``where`` is not bool.
      ValueError: ``labels`` does not have the shape of ``activations``, or another shape does not
        match.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import spread_loss
      >>> loss = spread_loss(jnp.array([0.75, 0.25, 0.0]), jnp.array([1, 0, 0]), margin=1.0)
      >>> print(loss)
      0.3125

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, equation 3.
    """
    activations = as_floating("activations", activations)
    labels = as_one_hot("labels", labels, "activations", activations.shape)
    counted = jnp.ones(activations.shape, bool)
    if where is not None:
        counted = as_mask("where", where, activations.shape)
    labels, counted = (jnp.moveaxis(x, as_axis(axis), -1) for x in (labels, counted))
    right = labels != 0
    a = jnp.where(counted, jnp.moveaxis(activations, axis, -1), 0)
    a = a.astype(accumulator(activations.dtype))
    # NaN and infinity must not be hidden by the maximum, or by being in no pair.
    finite = jnp.isfinite(a) & jnp.isfinite(jnp.where(counted, labels, 0).astype(a.dtype))
    finite = jnp.all(finite, axis=-1)[..., None, None]
    pairs = (right & counted)[..., :, None] & (~right & counted)[..., None, :]
    margin = as_array("margin", margin)
    if not is_real(margin.dtype):
        raise TypeError(f"margin must be real numbers, got dtype {margin.dtype}")
    m = broadcast("margin", margin.astype(a.dtype), a.shape[:-1])
    m = jnp.where(finite, m[..., None, None], jnp.nan)
    shortfall = jnp.maximum(0, m - (a[..., :, None] - a[..., None, :]))
    total = jnp.sum(jnp.where(pairs | ~finite, shortfall * shortfall, 0), axis=(-2, -1))
    return total.astype(activations.dtype)


def reconstruction_loss(
    reconstruction: ArrayLike,
    target: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Sum of squared differences between a reconstruction and its target.

    .. math::
      L = \sum_p (\hat x_p - x_p)^2

    The loss is a **sum** over the pixels, as in the paper, which weights it by 0.0005. A mean would
    be 784 times smaller for 28 × 28 pixels. The sum is computed in float32 (or float64), and is NaN
    or infinite if a pixel is.

    Args:
      reconstruction: pixels, ``[..., P]`` or ``[..., H, W, C]``, any floating dtype, in [0, 1].
      target: pixels of the same shape, floating dtype, in [0, 1].
      axis: the axis or axes of the pixels: ``-1`` for flat pixels, ``(-3, -2, -1)`` for images.
      where: pixels to count, bool, broadcastable to the pixels' shape; None counts all.

    Returns:
      Loss per example, ``[...]``, in the dtype of ``reconstruction``.

    Raises:
      TypeError: one of the arrays is not floating point (uint8 images must be scaled first).
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import reconstruction_loss
      >>> print(reconstruction_loss(jnp.full((2, 784), 0.5), jnp.zeros((2, 784))))
      [196. 196.]

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 4.1.
    """
    reconstruction = as_floating("reconstruction", reconstruction)
    target = as_floating("target", target)
    if target.shape != reconstruction.shape:
        raise ValueError(
            f"target must have the shape of reconstruction, {reconstruction.shape}, got"
            f" shape {target.shape}"
        )
    axes = tuple(map(as_axis, axis)) if isinstance(axis, Sequence) else as_axis(axis)
    images = axes == (-3, -2, -1) and reconstruction.ndim > 2
    if images and where is None and not is_sharded(reconstruction, target):
        # TPUs would fill rows and columns of 28 pixels up to 32 and 128.
        reconstruction, target = (jax.lax.collapse(x, -3) for x in (reconstruction, target))
        axes = -1
    wide = accumulator(reconstruction.dtype)
    difference = reconstruction.astype(wide) - target.astype(wide)
    return _sum_of(jnp.square, difference, axes, where).astype(reconstruction.dtype)


def _above_zero(x: jax.Array) -> jax.Array:
    """As :func:`jax.nn.relu`, but the gradient at NaN is NaN instead of zero."""
    return jnp.where(x <= 0, 0, x)


def _sum_of(
    term: Callable[[jax.Array], jax.Array],
    values: jax.Array,
    axis: int | tuple[int, ...],
    where: ArrayLike | None,
) -> jax.Array:
    """Sums the terms of the values that `where` selects."""
    if where is None:
        return jnp.sum(term(values), axis=axis)
    mask = as_mask("where", where, values.shape)
    # Masked before `term` as well: otherwise the gradient of a masked infinity is 0 · ∞.
    terms = term(jnp.where(mask, values, 0))
    return jnp.sum(jnp.where(mask, terms, 0), axis=axis)
