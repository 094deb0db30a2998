"""Adding a bias to feature maps, with a fast gradient on every platform."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from capsjax.ops._checks import is_sharded
from capsjax.ops.fields import channels_last


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    r"""Adds a bias ``[C]`` to feature maps ``[B, H, W, C]``, with any number of spatial axes.

    .. math::
      \bar b_c = \sum_{b,h,w} \bar y_{b,h,w,c}

    On TPUs this sum is a product with ones: matrix units add faster than the other units.
    """
    bias = bias.astype(x.dtype)
    if x.ndim < 3 or is_sharded(x, bias):
        return x + jnp.broadcast_to(bias, x.shape)
    return x + _broadcast(bias, x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _broadcast(bias: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(bias, shape)


@_broadcast.defjvp
def _broadcast_jvp(
    shape: tuple[int, ...], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    tangent = lax.platform_dependent(
        *tangents,
        tpu=lambda tangent: _convolve_ones(tangent, shape),
        default=lambda tangent: jnp.broadcast_to(tangent, shape),
    )
    return _broadcast(*primals, shape), tangent


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
