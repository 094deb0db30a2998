"""Strided convolution whose gradient of the images is computed phase by phase, for TPUs."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from capsjax.ops._checks import alike, is_constant
from capsjax.ops.fields import ReceptiveFields, channels_last

# A phase is divided if each further convolution saves as many products of two numbers: it costs
# about 3,000 cycles, and a TPU v5e multiplies 2**16 pairs in a cycle.
_WORTH_DIVIDING = 2**28
_OPTIONS = ("fields", "precision", "preferred_element_type")


def conv_by_xla(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    """XLA's convolution of the fields, with its own derivatives."""
    return lax.conv_general_dilated(
        images,
        kernel,
        fields.strides,
        fields.pads,
        dimension_numbers=channels_last(len(fields.grid)),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def conv_by_phases(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    r"""XLA's convolution, with a gradient of the images by convolutions with stride 1.

    .. math::
      \bar x_\varphi = \bar y * k_\varphi

    A phase :math:`\varphi` holds the positions with the same remainder modulo the stride. The
    gradient of a strided convolution is dilated with zeros, which XLA would multiply with the
    kernel; the gradient of a phase is dense. Near the border, where few fields overlap, it would be
    padded with zeros: large phases are divided there.

    Args:
      images: ``[B, H, W, C]``, or with any other number of spatial axes.
      kernel: ``[KH, KW, C, O]``.
      fields: receptive fields of the kernel on the images.
      precision: as in :func:`jax.lax.conv_general_dilated`.
      preferred_element_type: as in :func:`jax.lax.conv_general_dilated`.

    Returns:
      ``[B, P, Q, O]``.
    """
    pads = [(0, 0, 0), *((*pair, 0) for pair in fields.pads), (0, 0, 0)]
    images = lax.pad(images, jnp.zeros((), images.dtype), pads)
    fields = dataclasses.replace(fields, grid=images.shape[1:-1], pads=((0, 0),) * len(fields.grid))
    out: jax.Array = _conv.bind(
        *alike(images, kernel),
        fields=fields,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return out


def gains_by_phases(fields: ReceptiveFields) -> bool:
    """Whether XLA's gradient of the images would multiply by zeros on a TPU."""
    return math.prod(fields.strides) > 1 and fields.size > 1


class _Piece(NamedTuple):
    """A part of a phase along one axis: neighbouring positions, and what they depend on.

    Attributes:
      phase: remainder of the positions modulo the stride.
      start: first of the positions, counted within the phase.
      size: number of positions.
      taps: positions of the kernel, as a slice.
      fields: receptive fields, as a slice.
      pads: zeros before and after the fields.
    """

    phase: int
    start: int
    size: int
    taps: slice
    fields: slice
    pads: tuple[int, int]


def _pieces(phase: int, fields: int, kernel: int, stride: int, divide: bool) -> list[_Piece]:
    """Divides a phase along one axis at its borders, or returns it as one piece."""
    taps = len(range(phase, kernel, stride))
    end = fields + taps - 1
    edge = taps // 2 if divide else 0
    pieces = []
    for start, stop in itertools.pairwise([0, edge, end - edge, end] if taps else []):
        if start == stop:
            continue
        # A position depends, by each tap, on the field that begins so many positions before it.
        first, last = max(0, start - (fields - 1)), min(taps, stop) - 1
        low, high = max(0, start - last), min(fields, stop - first)
        along = slice(phase + first * stride, phase + last * stride + 1, stride)
        pads = low - (start - last), stop - first - high
        pieces.append(_Piece(phase, start, stop - start, along, slice(low, high), pads))
    return pieces


def _phases(fields: ReceptiveFields, products: int) -> Iterator[tuple[_Piece, ...]]:
    """Yields the pieces of all phases, given the products per pair of a position and a tap."""
    axes = list(zip(fields.shape, fields.kernel, fields.strides, strict=True))
    for phase in itertools.product(*map(range, fields.strides)):

        def pieces(divide: bool, phase: tuple[int, ...] = phase) -> list[tuple[_Piece, ...]]:
            along = zip(phase, axes, strict=True)
            return list(itertools.product(*(_pieces(n, *axis, divide) for n, axis in along)))

        whole, divided = pieces(False), pieces(True)
        saved = products * (_pairs(whole) - _pairs(divided))
        more = len(divided) - len(whole)
        yield from divided if saved >= more * _WORTH_DIVIDING else whole


def _pairs(pieces: list[tuple[_Piece, ...]]) -> int:
    """Number of pairs of a position and a tap, padding included."""
    return sum(
        math.prod(axis.size * len(range(*axis.taps.indices(axis.taps.stop))) for axis in piece)
        for piece in pieces
    )


def _images_gradient(
    d_out: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    """Returns the gradient of images without padding, ``[B, H, W, C]``."""
    del preferred_element_type
    dtype, (channels, features) = kernel.dtype, kernel.shape[-2:]
    batch, strides, rank = d_out.shape[0], fields.strides, len(fields.grid)
    counts = [-(-size // stride) for size, stride in zip(fields.grid, strides, strict=True)]
    # With axes for the phases, [B, M, 2, N, 2, C], the TPU compiler lets each convolution write its
    # result in place. It folds slices and reversal into a convolution in this order only.
    split = (batch, *(n for pair in zip(counts, strides, strict=True) for n in pair), channels)
    spatial = tuple(range(2 * rank))
    axes = (0, 2 * rank + 1, *(n + 1 for n in spatial))
    layout = lax.ConvDimensionNumbers(axes, (2 * rank, 2 * rank + 1, *spatial), axes)
    kernel = jnp.expand_dims(kernel.astype(d_out.dtype), spatial[1::2])
    # The sizes of an exported function may be symbolic.
    size = (batch, channels, features)
    products = math.prod(size) if is_constant(size) else 0
    # Where types say how arrays are divided among devices: on each of them.
    everywhere = NamedSharding(jax.typeof(d_out).sharding.mesh, PartitionSpec(*[None] * len(split)))
    result = lax.empty(split, dtype, out_sharding=everywhere)
    for piece in _phases(fields, products):
        factor = d_out[:, *(axis.fields for axis in piece)]
        taps = kernel[*(n for axis in piece for n in (axis.taps, slice(None)))]
        part = lax.conv_general_dilated(
            jnp.expand_dims(factor, [n + 1 for n in spatial[1::2]]),
            lax.rev(taps, spatial[::2]),
            (1,) * len(spatial),
            [pads for axis in piece for pads in (axis.pads, (0, 0))],
            dimension_numbers=layout,
            precision=precision,
        )
        start = 0, *(n for axis in piece for n in (axis.start, axis.phase)), 0
        result = lax.dynamic_update_slice(result, part.astype(dtype), start)
    for start, shape in _outside(fields, split):
        result = lax.dynamic_update_slice(result, jnp.zeros(shape, dtype), start)
    merged = (count * stride for count, stride in zip(counts, strides, strict=True))
    return result.reshape(batch, *merged, channels)[:, *map(slice, fields.grid)]


def _outside(
    fields: ReceptiveFields, split: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields start and shape of the parts of ``[B, M, 2, N, 2, C]`` that are in no field."""
    for n, (count, taps) in enumerate(zip(fields.shape, fields.kernel, strict=True)):
        size, stride = split[2 * n + 1 : 2 * n + 3]
        for phase in range(stride):
            inside = count + len(range(phase, taps, stride)) - 1 if phase < taps else 0
            if inside < size:
                before, after = 2 * n + 1, len(split) - 2 * n - 3
                yield (
                    (0,) * before + (inside, phase) + (0,) * after,
                    (*split[:before], size - inside, 1, *split[before + 2 :]),
                )


def _conv_shape(images: Any, kernel: Any, *, fields: ReceptiveFields, **options: Any) -> Any:
    dtype = options["preferred_element_type"] or images.dtype
    return images.update(
        shape=(images.shape[0], *fields.shape, kernel.shape[-1]), dtype=jnp.dtype(dtype)
    )


def _images_shape(d_out: Any, kernel: Any, *, fields: ReceptiveFields, **_: Any) -> Any:
    return d_out.update(shape=(d_out.shape[0], *fields.grid, kernel.shape[-2]), dtype=kernel.dtype)


def _kernel_gradient(images: jax.Array, d_out: jax.Array, kernel: Any, options: Any) -> jax.Array:
    conv = functools.partial(conv_by_xla, images, **options)
    d_kernel: jax.Array = jax.linear_transpose(conv, kernel.aval)(d_out)[0]
    return d_kernel


def _batch(primitive: Primitive, arguments: Any, axes: Any, **options: Any) -> Any:
    """As one batch where all have the same kernel."""
    (x, kernel), (first, second) = arguments, axes
    if second is not None:
        function = functools.partial(_FUNCTIONS[primitive], **options)
        return jax.vmap(function, axes)(x, kernel), 0
    x = jnp.moveaxis(x, first, 0)
    out = primitive.bind(x.reshape(-1, *x.shape[2:]), kernel, **options)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


_conv, _gradient = Primitive("capsjax_conv"), Primitive("capsjax_conv_images_gradient")
_FUNCTIONS: dict[Primitive, Callable[..., jax.Array]]
_FUNCTIONS = {_conv: conv_by_xla, _gradient: _images_gradient}
_conv.def_abstract_eval(_conv_shape)
_gradient.def_abstract_eval(_images_shape)
for _each, _function in _FUNCTIONS.items():
    _each.def_impl(jax.jit(_function, static_argnames=_OPTIONS))
    mlir.register_lowering(_each, mlir.lower_fun(_function, multiple_results=False))
    batching.primitive_batchers[_each] = functools.partial(_batch, _each)
ad.defbilinear(
    _conv,
    lambda d_out, images, kernel, **options: _gradient.bind(d_out, kernel, **options),
    lambda d_out, images, kernel, **options: _kernel_gradient(images, d_out, kernel, options),
)
ad.defbilinear(
    _gradient,
    lambda images, d_out, kernel, **options: _conv.bind(images, kernel, **options),
    lambda images, d_out, kernel, **options: _kernel_gradient(images, d_out, kernel, options),
)
