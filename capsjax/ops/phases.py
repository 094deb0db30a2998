"""Strided convolution whose gradient of the images is computed phase by phase."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from capsjax.ops.fields import ReceptiveFields, channels_last


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def conv_by_phases(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    r"""XLA's convolution, differentiated as a sum of convolutions with stride 1.

    .. math::
      y = \sum_{\varphi} x_\varphi * k_\varphi

    A phase :math:`\varphi` holds the positions with the same remainder modulo the stride. The
    gradient of a strided convolution is dilated with zeros, which XLA would multiply with the
    kernel; the gradient of a phase is dense.

    Args:
      images: ``[B, H, W, C]``, or with any other number of spatial axes.
      kernel: ``[KH, KW, C, O]``.
      fields: receptive fields of the kernel on the images.
      precision: as in :func:`jax.lax.conv_general_dilated`.
      preferred_element_type: as in :func:`jax.lax.conv_general_dilated`.

    Returns:
      ``[B, P, Q, O]``.
    """
    return conv_by_xla(images, kernel, fields, precision, preferred_element_type)


@functools.partial(conv_by_phases.defjvp, symbolic_zeros=True)
def _conv_by_phases_jvp(
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero],
) -> tuple[jax.Array, jax.Array]:
    (images, kernel), (d_images, d_kernel) = primals, tangents
    options = (fields, precision, preferred_element_type)
    out = conv_by_phases(images, kernel, *options)
    parts = []
    if not isinstance(d_images, SymbolicZero):
        parts.append(_sum_of_phases(d_images, kernel, *options))
    if not isinstance(d_kernel, SymbolicZero):
        parts.append(conv_by_phases(images, d_kernel, *options))
    return out, functools.reduce(jnp.add, parts)


def _sum_of_phases(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    zero = jnp.zeros((), images.dtype)
    images = lax.pad(images, zero, [(0, 0, 0), *((*pair, 0) for pair in fields.pads), (0, 0, 0)])
    strides = fields.strides

    def phase(first: tuple[int, ...]) -> jax.Array:
        taps = kernel[tuple(slice(n, None, s) for n, s in zip(first, strides, strict=True))]
        # To the end of the last receptive field of this phase.
        sizes = zip(first, strides, fields.shape, taps.shape[:-2], strict=True)
        places = (slice(n, n + s * (size + tap - 2) + 1, s) for n, s, size, tap in sizes)
        return lax.conv_general_dilated(
            images[:, *places],
            taps,
            (1,) * len(strides),
            "VALID",
            dimension_numbers=channels_last(len(fields.grid)),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    # If the stride is larger than the kernel, some phases lie in no receptive field.
    used = (range(min(s, k)) for s, k in zip(strides, fields.kernel, strict=True))
    return functools.reduce(jnp.add, map(phase, itertools.product(*used)))


def gains_by_phases(fields: ReceptiveFields) -> bool:
    """Whether XLA's gradient of the images would multiply by zeros on a TPU."""
    return math.prod(fields.strides) > 1 and fields.size > 1
