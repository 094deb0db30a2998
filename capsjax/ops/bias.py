"""Adding a bias to feature maps, with a fast gradient on every platform."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from capsjax.ops._checks import accumulator, is_sharded
from capsjax.ops.fields import channels_last


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    r"""Adds a bias ``[C]`` to feature maps ``[B, H, W, C]``, with any number of spatial axes.

    .. math::
      \bar b_c = \sum_{b,h,w} \bar y_{b,h,w,c}

    The bias is not rounded to the dtype of the feature maps before it is added. On TPUs this sum is
    a product with ones in that dtype: matrix units add faster than the other units.
    """
    wide = max(accumulator(x.dtype), accumulator(bias.dtype), key=lambda dtype: dtype.itemsize)
    bias = bias.astype(wide)
    if x.ndim < 3 or is_sharded(x, bias):
        spread = jnp.broadcast_to(bias, x.shape)
    else:
        spread = _broadcast(bias, x.shape, x.dtype)
    return (x.astype(wide) + spread).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _broadcast(bias: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    del dtype
    return jnp.broadcast_to(bias, shape)


@_broadcast.defjvp
def _broadcast_jvp(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    tangent = lax.platform_dependent(
        *tangents,
        tpu=lambda tangent: _convolve_ones(tangent.astype(dtype), shape).astype(tangent.dtype),
        default=lambda tangent: jnp.broadcast_to(tangent, shape),
    )
    return _broadcast(*primals, shape, dtype), tangent


def _convolve_ones(bias: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts by a convolution, of which the TPU compiler turns the transpose into a product."""
    *batch, rows, columns, channels = shape if len(shape) > 3 else (1, *shape)
    result = lax.conv_general_dilated(
        jnp.ones((math.prod(batch), rows, columns, 1), bias.dtype),
        bias.reshape(1, 1, 1, channels),
        (1, 1),
        "VALID",
        dimension_numbers=channels_last(2),
        precision=lax.Precision.HIGHEST,
    )
    return result.reshape(shape)
