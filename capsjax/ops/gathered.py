"""Convolutions without patches: a kernel for Hopper GPUs that sums products of gathered blocks.

With the batch as rows, a convolution with C channels and O features is, at each position of the
result, a sum of matrix products ``[B, C] @ [C, O]``, one for each tap of the kernel whose position
of the images is not padding. Its two gradients are sums of the same kind. The kernel computes a
tile of the result as one long matrix product whose blocks are gathered by two tables, and so
patches are never stored.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from capsjax.ops import _hopper
from capsjax.ops._checks import alike, is_constant
from capsjax.ops.fields import ReceptiveFields

# The result of the three products: each is a sum of products of blocks of the other two.
Result = Literal["features", "images", "kernel"]

# Rows of a tile; columns that it may have, with the time of a product of two blocks.
ROWS, _COLUMNS = 128, {256: 1.0, 128: 0.57, 64: 0.35}
LINE = 128  # bytes of a block's rows
_MULTIPROCESSORS = 132
_MOST_PARTS = 8
# Time at the end of a tile, and of a part of a tile in float32, in products of two blocks; bytes of
# parts that are added up in the time of one such product.
_EPILOGUE, _PARTIAL, _ADDED = 4, 12, 2.5e6

Convolve = Callable[..., jax.Array]


def conv_by_gathering(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    otherwise: Convolve | None,
) -> jax.Array:
    r"""Convolves without storing patches, on Hopper GPUs.

    .. math::
      y_{b,p} = \sum_{(t, x) \in F_p} x_{b,x} \, k_t

    :math:`F_p` has the taps t of the receptive field at p, each with the position x that it is at.

    Args:
      images: ``[B, H, W, C]``, or with any other number of spatial axes; see
        :func:`why_not_by_gathering` for what is supported.
      kernel: ``[KH, KW, C, O]``.
      fields: receptive fields of the kernel on the images.
      otherwise: computes the same where the kernel does not run, from images, kernel, fields,
        precision and preferred element type; None for a NotImplementedError there.

    Returns:
      ``[B, P, Q, O]`` in the dtype of the images. Sums are float32; factors in float32 are rounded
      to TF32.
    """
    batch, features = images.shape[0], kernel.shape[-1]
    x = images.reshape(batch, -1, images.shape[-1])
    k = kernel.reshape(-1, *kernel.shape[-2:])
    x, k = alike(x, k)
    y: jax.Array = _product.bind(x, k, fields=fields, result="features", otherwise=otherwise)
    return y.reshape(batch, *fields.shape, features)


def why_not_by_gathering(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> str | None:
    """Why the kernel does not support these arguments, or does not run here; otherwise None."""
    if (reason := _hopper.why_not_here()) is not None:
        return reason
    channels, features = kernel.shape[-2:]
    if images.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"computes in float32, bfloat16 and float16, got {images.dtype}"
    if not is_constant(images.shape):
        return f"needs a batch of constant size, got images of shape {images.shape}"
    if channels % ROWS or features % min(_COLUMNS):
        return (
            f"needs channels in multiples of {ROWS} and features in multiples of {min(_COLUMNS)},"
            f" got a kernel of shape {kernel.shape}"
        )
    if images.dtype == jnp.float32 and not _hopper.allows_tf32(precision):
        return f"rounds float32 factors to TF32, got {precision=}"
    if preferred_element_type not in (None, images.dtype):
        return f"returns the dtype of the images, got {preferred_element_type=}"
    return None


def _result_shape(x: Any, y: Any, fields: ReceptiveFields, result: Result) -> tuple[int, ...]:
    positions, taps, grid = _numbers(fields)
    if result == "features":
        return x.shape[0], positions, y.shape[2]
    if result == "images":
        return x.shape[0], grid, y.shape[1]
    return taps, x.shape[2], y.shape[2]


def _abstract(x: Any, y: Any, *, fields: Any, result: Result, otherwise: Any) -> Any:
    del otherwise
    return x.update(shape=_result_shape(x, y, fields, result))


def _by_kernel(
    x: jax.Array,
    y: jax.Array,
    *,
    fields: ReceptiveFields,
    result: Result,
    interpret: bool = False,
) -> jax.Array:
    """The kernel's product."""
    from capsjax.ops._gathered_kernel import gathered_product

    dtype = x.dtype
    shape = _result_shape(x, y, fields, result)
    missing = -x.shape[0] % ROWS
    x = jnp.pad(x, ((0, missing), (0, 0), (0, 0)))
    if result == "kernel":
        y = jnp.pad(y, ((0, missing), (0, 0), (0, 0)))
    plan = make_plan(fields, result, x.shape, y.shape, dtype.name)
    product = gathered_product(plan, x, y, interpret=interpret)
    return product.reshape(-1, *shape[1:])[: shape[0]]


def _by_convolution(
    x: jax.Array, y: jax.Array, *, fields: ReceptiveFields, result: Result, otherwise: Convolve
) -> jax.Array:
    """The same by another implementation."""

    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        images = images.reshape(images.shape[0], *fields.grid, images.shape[-1])
        kernel = kernel.reshape(*fields.kernel, *kernel.shape[1:])
        features = otherwise(images, kernel, fields, None, None)
        return features.reshape(images.shape[0], -1, features.shape[-1])

    if result == "features":
        return convolve(x, y)
    shape = _result_shape(x, y, fields, result)
    zeros = jnp.zeros(shape, x.dtype)
    if result == "images":
        return jax.vjp(lambda images: convolve(images, y), zeros)[1](x)[0]
    return jax.vjp(lambda kernel: convolve(x, kernel), zeros)[1](y)[0]


def _choose(
    *, otherwise: Convolve | None, **options: Any
) -> tuple[_hopper.Function, _hopper.Function | None]:
    place = otherwise and partial(_by_convolution, otherwise=otherwise, **options)
    return partial(_by_kernel, **options), place


def _transpose_first(
    cotangent: jax.Array, x: Any, y: Any, *, result: Result, **options: Any
) -> Any:
    del x
    if result == "kernel":  # of images and features
        return _product.bind(y, cotangent, result="images", **options)
    other: Result = "images" if result == "features" else "features"
    return _product.bind(cotangent, y, result=other, **options)


def _transpose_second(
    cotangent: jax.Array, x: Any, y: Any, *, result: Result, **options: Any
) -> Any:
    del y
    if result == "kernel":
        return _product.bind(x, cotangent, result="features", **options)
    images, features = (x, cotangent) if result == "features" else (cotangent, x)
    return _product.bind(images, features, result="kernel", **options)


def _batch(arguments: Any, axes: Any, *, result: Result, **options: Any) -> Any:
    """One after the other; as one batch where all have the same kernel."""
    (x, y), (first, second) = arguments, axes
    bind = partial(_product.bind, result=result, **options)
    if second is None and result != "kernel":
        x = jnp.moveaxis(x, first, 0)
        out = bind(x.reshape(-1, *x.shape[2:]), y)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    if second is None:
        return lax.map(lambda x: bind(x, y), jnp.moveaxis(x, first, 0)), 0
    y = jnp.moveaxis(y, second, 0)
    if first is None:
        return lax.map(lambda y: bind(x, y), y), 0
    return lax.map(lambda both: bind(*both), (jnp.moveaxis(x, first, 0), y)), 0


_product = Primitive("capsjax_gathered_product")
_product.def_abstract_eval(_abstract)
_product.def_impl(jax.jit(_product.bind, static_argnames=("fields", "result", "otherwise")))
ad.defbilinear(_product, _transpose_first, _transpose_second)
batching.primitive_batchers[_product] = _batch
_hopper.register(_product, _choose)


class Plan(NamedTuple):
    """How a result is computed: which tiles, of which blocks.

    Blocks are of two-dimensional arrays, in which all axes but that of the batch, or all but that
    of the features, are flattened.

    Attributes:
      result: what is computed.
      columns: of a tile.
      inner: numbers that one product of blocks sums over.
      blocks: products of blocks for each pair of the tables.
      parts: partial results, which are added up.
      tasks: of each program: part, block of rows, tile of columns, number of the result's block,
        first pair and number of pairs, int32 ``[programs, 6]``.
      pairs: numbers of the factors' blocks, int32 ``[pairs, 2]``.
    """

    result: Result
    columns: int
    inner: int
    blocks: int
    parts: int
    tasks: np.ndarray
    pairs: np.ndarray


@functools.lru_cache(maxsize=64)
def make_plan(
    fields: ReceptiveFields, result: Result, x: tuple[int, ...], y: tuple[int, ...], dtype: str
) -> Plan:
    """For images or features x and kernel or features y, in a batch of whole blocks."""
    position, tap, place = _pairs(fields)
    positions, taps, grid = _numbers(fields)
    target, size, *factors = {
        "features": (position, positions, place, tap),
        "images": (place, grid, position, tap),
        "kernel": (tap, taps, place, position),
    }[result]
    order = np.argsort(target, kind="stable")
    # A tile without pairs, whose position is in no receptive field, is zero.
    counts = np.bincount(target, minlength=size)
    firsts = np.cumsum(counts) - counts
    width = y[1] if result == "images" else y[2]
    length = x[0] if result == "kernel" else x[2]
    rows = (x[2] if result == "kernel" else x[0]) // ROWS
    inner = LINE // np.dtype(dtype).itemsize
    blocks = length // inner
    columns, parts = min(
        itertools.product(
            (each for each in _COLUMNS if width % each == 0), range(1, _MOST_PARTS + 1)
        ),
        key=lambda choice: _duration(counts, rows, width, blocks, *choice),
    )
    tasks = []
    for number, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        bounds = first + count * np.arange(parts + 1) // parts
        for part, row, column in itertools.product(
            range(parts), range(rows), range(width // columns)
        ):
            pairs = bounds[part + 1] - bounds[part]
            tasks.append((part, row, column, number, bounds[part], pairs))
    # The longest first, so that all multiprocessors end at about the same time.
    tasks.sort(key=lambda task: -task[-1])
    return Plan(
        result,
        columns,
        inner,
        blocks,
        parts,
        np.array(tasks, np.int32),
        np.stack([each[order] for each in factors], axis=1).astype(np.int32),
    )


def _duration(
    counts: np.ndarray, rows: int, width: int, blocks: int, columns: int, parts: int
) -> float:
    """Until the last multiprocessor ends and parts are added up, in products of wide blocks."""
    tiles, time, share = rows * (width // columns), _COLUMNS[columns], columns / max(_COLUMNS)
    if parts == 1:
        sizes, end, adding = counts, _EPILOGUE * share, 0.0
    elif parts > counts[counts > 0].min():
        return math.inf
    else:
        sizes = np.concatenate([(counts + part) // parts for part in range(parts)])
        end, adding = _PARTIAL * share, len(sizes) * rows * ROWS * width * 4 / _ADDED
    ends = [0.0] * _MULTIPROCESSORS
    for size in sorted(np.repeat(sizes, tiles), reverse=True):
        heapq.heapreplace(ends, ends[0] + size * blocks * time + end)
    return max(ends) + adding


@functools.lru_cache(maxsize=64)
def _pairs(fields: ReceptiveFields) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position of the result, tap, and place in the images of each pair that is not padding."""
    found = (np.zeros(1, int),) * 3
    for size, kernel, stride, (low, _), count in zip(
        fields.grid, fields.kernel, fields.strides, fields.pads, fields.shape, strict=True
    ):
        position, tap = np.indices((count, kernel)).reshape(2, -1)
        place = stride * position + tap - low
        inside = (place >= 0) & (place < size)
        along = (position[inside], tap[inside], place[inside])
        found = tuple(
            (before[:, None] * length + each).ravel()
            for before, each, length in zip(found, along, (count, kernel, size), strict=True)
        )
    return found


def _numbers(fields: ReceptiveFields) -> tuple[int, int, int]:
    """Number of positions of the result, of taps, and of places in the images."""
    return math.prod(fields.shape), fields.size, math.prod(fields.grid)
