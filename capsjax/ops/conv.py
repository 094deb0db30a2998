"""Convolution that every platform can differentiate at speed.

XLA's CPU backend computes the gradients of a strided 9 × 9 convolution many times more slowly than
the matrix products that they amount to, and its TPU backend multiplies by zeros in the gradient of
the images; cuDNN takes longer than products of Fourier transforms. There are products of
patches or of transforms for CPUs and NVIDIA's GPUs, a gradient phase by phase for TPUs, and XLA's
own convolution elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from capsjax.ops.fields import Padding, ReceptiveFields
from capsjax.ops.fourier import conv_by_fourier, gains_by_fourier
from capsjax.ops.phases import conv_by_phases, gains_by_phases

ConvImplementation = Literal["patches", "fourier", "phases", "xla"]
_NHWC = ("NHWC", "HWIO", "NHWC")


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
      lhs: images, ``[B, H, W, C]`` unless XLA convolves.
      rhs: kernel of the same dtype, ``[KH, KW, C, O]`` unless XLA convolves.
      window_strides: stride per spatial axis.
      padding: ``"SAME"``, ``"VALID"``, or (low, high) per spatial axis.
      lhs_dilation: as in ``lax``; only XLA knows others than 1.
      rhs_dilation: as in ``lax``; only XLA knows others than 1.
      dimension_numbers: as in ``lax``, whose default is NCHW; only XLA knows others than
        ``("NHWC", "HWIO", "NHWC")``.
      feature_group_count: as in ``lax``; only XLA knows others than 1.
      batch_group_count: as in ``lax``; only XLA knows others than 1.
      precision: as in ``lax``.
      preferred_element_type: as in ``lax``.
      out_sharding: as in ``lax``; only XLA knows others than None.
      implementation: ``"patches"``: shifted copies of the image, concatenated, times the kernel as
        one matrix product; needs memory for KH·KW/stride² images. ``"fourier"``: products of
        Fourier transforms, a third of the operations for large kernels on small images; needs
        memory for the transforms, four to five kernels with the paper's sizes. ``"phases"``: XLA's
        convolution with a gradient of the images that multiplies by no zeros between numbers.
        ``"xla"``: :func:`jax.lax.conv_general_dilated`. None: what is best on the platform that the
        program is compiled for, if the arguments allow it: on CPU the one of the first two that
        takes less; on NVIDIA's GPUs Fourier transforms where they take less, else XLA; on TPU
        phases if there is a stride; elsewhere XLA.

    Returns:
      ``[B, P, Q, O]``.

    Raises:
      ValueError: the implementation's name is unknown.
      NotImplementedError: the implementation was named where it cannot run, with the reason.

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

    if implementation == "xla":
        return xla(lhs, rhs)
    reason = _why_only_xla(
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
    if reason and implementation:
        raise NotImplementedError(f"implementation={implementation!r} {reason}")
    if reason:
        return xla(lhs, rhs)
    fields = _fields(lhs, rhs, window_strides, padding)
    by_name: dict[str, Callable[..., jax.Array]]
    by_name = {"patches": _conv_by_patches, "fourier": conv_by_fourier, "phases": conv_by_phases}

    def products(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda lhs, rhs: by_name[name](lhs, rhs, fields, precision, preferred_element_type)

    if implementation:
        return products(implementation)(lhs, rhs)
    by_fourier = gains_by_fourier(lhs, rhs, fields)
    on_cpu = products("fourier" if by_fourier else "patches")
    on_gpu = products("fourier") if by_fourier else xla
    on_tpu = products("phases") if gains_by_phases(fields) else xla
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, cuda=on_gpu, tpu=on_tpu, default=xla)


def _why_only_xla(
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
    """Why nothing else can, in words; XLA then computes, or says what is wrong."""
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
    if min(_fields(lhs, rhs, strides, padding).shape) < 1:
        return f"needs images as large as the kernel, got shapes {lhs.shape} and {rhs.shape}"
    if preferred_element_type is not None and jnp.dtype(preferred_element_type) not in (
        lhs.dtype,
        jnp.promote_types(lhs.dtype, jnp.float32),
    ):
        return f"sums in {lhs.dtype} or float32, got preferred_element_type"
    return None


def _fields(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding
) -> ReceptiveFields:
    return ReceptiveFields.of(images.shape[1:3], kernel.shape[:2], strides, padding)


def _conv_by_patches(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    """Copies what the kernel sees at each place, and multiplies once."""
    grid, features = (images.shape[0], *fields.shape), kernel.shape[-1]
    size = fields.size * images.shape[-1]
    product = jnp.matmul(
        fields.gather(images).reshape(math.prod(grid), size),
        kernel.reshape(size, features),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return product.reshape(*grid, features)
