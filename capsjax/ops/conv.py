"""Convolution that every platform can differentiate at speed (floor 1).

XLA's CPU backend computes the gradients of a strided 9 × 9 convolution many times more slowly than
the matrix products that they amount to. Patches × GEMM there, XLA's own convolution elsewhere.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

ConvImplementation = Literal["patches", "xla"]
_NHWC = ("NHWC", "HWIO", "NHWC")
Padding = str | Sequence[tuple[int, int]]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    implementation: ConvImplementation | None = None,
) -> jax.Array:
    r"""Drop-in for :func:`jax.lax.conv_general_dilated` that is fast to differentiate on CPU too.

    .. math::
      y_{b,p,q,o} = \sum_{h,w,c} x_{b,\, sp+h,\, sq+w,\, c} \; k_{h,w,c,o}

    The signature is that of the ``lax`` function, so that it can be handed to ``nnx.Conv`` and
    ``linen.Conv`` as ``conv_general_dilated=``.

    Args:
      lhs: images; ``[B, H, W, C]`` for the patches.
      rhs: kernel of the same dtype; ``[KH, KW, C, O]`` for the patches.
      window_strides: stride per spatial axis.
      padding: ``"SAME"``, ``"VALID"``, or (low, high) per spatial axis.
      lhs_dilation: as in ``lax``; patches know 1 only.
      rhs_dilation: as in ``lax``; patches know 1 only.
      dimension_numbers: as in ``lax``, whose default is NCHW; patches know
        ``("NHWC", "HWIO", "NHWC")`` only.
      feature_group_count: as in ``lax``; patches know 1 only.
      batch_group_count: as in ``lax``; patches know 1 only.
      precision: as in ``lax``.
      preferred_element_type: as in ``lax``.
      out_sharding: as in ``lax``; patches know None only.
      implementation: ``"patches"``: shifted copies of the image, concatenated, times the kernel as
        one matrix product; needs memory for KH·KW/stride² images. ``"xla"``:
        :func:`jax.lax.conv_general_dilated`. None: patches where the program is compiled for CPU
        and the arguments allow it, else XLA.

    Returns:
      ``[B, P, Q, O]``.

    Raises:
      ValueError: the implementation's name is unknown.
      NotImplementedError: ``"patches"`` was asked for where it cannot run, with the reason.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import conv_general_dilated
      >>> images, kernel = jnp.ones((2, 20, 20, 3)), jnp.ones((9, 9, 3, 4))
      >>> conv_general_dilated(images, kernel, (2, 2), "VALID",
      ...                      dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
      (2, 6, 6, 4)
    """
    if implementation is not None and implementation not in get_args(ConvImplementation):
        raise ValueError(
            f"implementation must be None or one of {get_args(ConvImplementation)}, got"
            f" {implementation!r}"
        )

    def xla(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
            **sharding,
        )

    def patches(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _conv_by_patches(
            lhs, rhs, window_strides, padding, precision, preferred_element_type
        )

    if implementation == "xla":
        return xla(lhs, rhs)
    reason = _why_no_patches(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        preferred_element_type,
        out_sharding,
    )
    if implementation == "patches":
        if reason:
            raise NotImplementedError(f"implementation='patches' {reason}")
        return patches(lhs, rhs)
    if reason:
        return xla(lhs, rhs)
    return lax.platform_dependent(lhs, rhs, cpu=patches, default=xla)


def _why_no_patches(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    preferred_element_type: Any,
    out_sharding: Any,
) -> str | None:
    """Why patches cannot, in words; XLA then computes, or says what is wrong."""
    if lhs.ndim != 4 or rhs.ndim != 4:
        return f"needs two spatial axes, got shapes {lhs.shape} and {rhs.shape}"
    if lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, dimension_numbers
    ) != lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC):
        return f"needs dimension_numbers={_NHWC}, got {dimension_numbers}"
    if any(d not in (None, (1, 1), [1, 1]) for d in (lhs_dilation, rhs_dilation)):
        return f"knows no dilation, got lhs_dilation={lhs_dilation} and rhs_dilation={rhs_dilation}"
    if feature_group_count != 1 or batch_group_count != 1:
        return (
            f"knows no groups, got feature_group_count={feature_group_count} and"
            f" batch_group_count={batch_group_count}"
        )
    if out_sharding is not None:
        return f"knows no explicit sharding, got out_sharding={out_sharding}"
    if lhs.shape[-1] != rhs.shape[2] or lhs.dtype != rhs.dtype:
        return (
            f"needs images and kernel of the same channels and dtype, got"
            f" {lhs.dtype}{lhs.shape} and {rhs.dtype}{rhs.shape}"
        )
    if len(strides) != 2 or min(strides) < 1:
        return f"needs two positive strides, got window_strides={strides}"
    if not isinstance(padding, str) and [len(pair) for pair in padding] != [2, 2]:
        return f"needs a name or two pairs, got padding={padding}"
    if min(_grid(lhs, rhs, strides, _pads(lhs, rhs, strides, padding))) < 1:
        return f"needs images as large as the kernel, got shapes {lhs.shape} and {rhs.shape}"
    if preferred_element_type is not None and jnp.dtype(preferred_element_type) not in (
        lhs.dtype,
        jnp.promote_types(lhs.dtype, jnp.float32),
    ):
        return f"sums in {lhs.dtype} or float32, got preferred_element_type"
    return None


def _pads(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding
) -> Sequence[tuple[int, int]]:
    if isinstance(padding, str):
        return lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    return padding


def _grid(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Rows and columns of the result."""
    rows, columns = (
        (images.shape[1 + n] + sum(pads[n]) - kernel.shape[n]) // strides[n] + 1 for n in (0, 1)
    )
    return rows, columns


def _conv_by_patches(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    (kh, kw, channels, features), (sh, sw) = kernel.shape, strides
    pads = _pads(images, kernel, strides, padding)
    rows, columns = _grid(images, kernel, strides, pads)
    if any(p for pair in pads for p in pair):
        images = lax.pad(
            images,
            jnp.zeros((), images.dtype),
            [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)],
        )
    shifted = [
        images[:, h : h + sh * (rows - 1) + 1 : sh, w : w + sw * (columns - 1) + 1 : sw]
        for h in range(kh)
        for w in range(kw)
    ]
    size, batch = kh * kw * channels, images.shape[0]
    product = jnp.matmul(
        jnp.concatenate(shifted, axis=-1).reshape(batch * rows * columns, size),
        kernel.reshape(size, features),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return product.reshape(batch, rows, columns, features)
