"""Convolution as a product of patches, the values of all receptive fields, with the kernel."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from capsjax.ops._checks import accumulator
from capsjax.ops.bias import add_bias
from capsjax.ops.fields import ReceptiveFields

# Tensor cores multiply tiles: a row of 81 numbers takes longer than one of 96.
_TILE = 32
# Twice this with the gradient of the images; 719 images of the paper's primary capsules.
_MOST_BYTES = 2**30
# The tables are constants of the program.
_MOST_POSITIONS = 2**20


def conv_by_patches(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    """Concatenates shifted copies of the images and multiplies them with the kernel."""
    grid, features = (images.shape[0], *fields.shape), kernel.shape[-1]
    size = fields.size * images.shape[-1]
    product = jnp.matmul(
        fields.gather(images).reshape(math.prod(grid), size),
        kernel.reshape(size, features),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return product.reshape(*grid, features)


def conv_by_lookup(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
    bias: jax.Array | None = None,
) -> jax.Array:
    """As :func:`conv_by_patches`, with patches that are read by a table of positions.

    The gradient of the images reads as well: a second table lists, for each position of the grid,
    where the patches contain it.

    Args:
      images: ``[B, H, W, C]``, or with any other number of spatial axes.
      kernel: ``[KH, KW, C, O]``.
      fields: receptive fields of the kernel on the images.
      precision: precision of the matrix product; the platform's default when None.
      preferred_element_type: dtype of the result; that of the images when None.
      bias: ``[O]``, or None. Where rows are filled up anyway, it is a row of the kernel, multiplied
        by a column of ones: its gradient is part of the kernel's, and an activation can be computed
        at the end of the product. In float16, such a gradient would overflow too early.

    Returns:
      ``[B, P, Q, O]``.
    """
    grid, features = (images.shape[0], *fields.shape), kernel.shape[-1]
    size = fields.size * images.shape[-1]
    padding = -size % _TILE
    patches = _look_up(images, fields).reshape(math.prod(grid), size)
    weights = kernel.reshape(size, features)
    filling = 0
    if bias is not None and padding and weights.dtype != jnp.float16:
        weights = jnp.concatenate([weights, bias[None].astype(weights.dtype)])
        # Zeros multiply all columns of ones but the first.
        filling, bias = 1, None
    product = jnp.matmul(
        jnp.pad(patches, ((0, 0), (0, padding)), constant_values=filling),
        jnp.pad(weights, ((0, size + padding - len(weights)), (0, 0))),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    result = product.reshape(*grid, features)
    return result if bias is None else add_bias(result, bias)


def gains_by_lookup(images: jax.Array, fields: ReceptiveFields, by_fourier: bool) -> bool:
    """Whether patches from a table take less time than cuDNN, or Fourier transforms, on a GPU.

    Both cases were measured on an H200 with the convolutions of the paper. Fourier transforms are
    computed in float32: products of patches take 0.6 of their time in bfloat16, but more in
    float32. cuDNN is taken to fill channels with zeros up to 16 bytes. Where it multiplies three
    times as many numbers as a row of patches has, or more, it takes twice as long.
    """
    # An exported function may have a symbolic batch size: assume a common one.
    batch = images.shape[0] if isinstance(images.shape[0], int) else 128
    positions, channels = math.prod(fields.shape) * fields.size, images.shape[-1]
    itemsize = images.dtype.itemsize
    if positions > _MOST_POSITIONS or batch * positions * channels * itemsize > _MOST_BYTES:
        return False
    if by_fourier:
        return itemsize < 4
    row = math.ceil(fields.size * channels / _TILE) * _TILE
    return 3 * row * itemsize <= 16 * fields.size


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _look_up(images: jax.Array, fields: ReceptiveFields) -> jax.Array:
    """Reads ``[B, H, W, C]`` into ``[B, P * Q * KH * KW, C]``, zeros outside of the grid."""
    batch, *grid, channels = images.shape
    flat = images.reshape(batch, math.prod(grid), channels)
    return _read(flat, _positions(fields))


@_look_up.defjvp
def _look_up_jvp(
    fields: ReceptiveFields, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    patches = _look_up(*primals, fields)
    # As the transpose of a sum, it has a transpose that reads. That of a table adds in memory.
    (tangent,) = jax.linear_transpose(functools.partial(_sum, fields=fields), patches)(*tangents)
    return patches, tangent


def _sum(patches: jax.Array, fields: ReceptiveFields) -> jax.Array:
    """Sums the values of the patches at each position, ``[B, H, W, C]``."""
    batch, _, channels = patches.shape
    table = _places(_positions(fields), math.prod(fields.grid))
    sums = jnp.sum(_read(patches, table), axis=2, dtype=accumulator(patches.dtype))
    return sums.reshape(batch, *fields.grid, channels).astype(patches.dtype)


def _read(x: jax.Array, table: np.ndarray) -> jax.Array:
    return x.at[:, table].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _positions(fields: ReceptiveFields) -> np.ndarray:
    """Position in the flattened grid of each number of the patches; H * W outside of the grid."""
    rank = len(fields.grid)
    position, inside = np.zeros([1] * 2 * rank, np.int32), np.ones([1] * 2 * rank, bool)
    for n, (size, kernel, stride, (low, _), number) in enumerate(
        zip(fields.grid, fields.kernel, fields.strides, fields.pads, fields.shape, strict=True)
    ):
        at = np.add.outer(np.arange(number, dtype=np.int32) * stride - low, np.arange(kernel))
        at = np.expand_dims(at, [axis for axis in range(2 * rank) if axis % rank != n])
        position, inside = position * size + at, inside & (at >= 0) & (at < size)
    return np.where(inside, position, math.prod(fields.grid)).astype(np.int32).reshape(-1)


def _places(positions: np.ndarray, size: int) -> np.ndarray:
    """Lists the places of each position, ``[H * W, most]``, filled up with `len(positions)`."""
    counts = np.bincount(positions, minlength=size)[:size]
    place = np.argsort(positions, kind="stable")[: counts.sum()]
    number = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.full((size, counts.max(initial=1)), len(positions), np.int32)
    places[positions[place], number] = place
    return places
