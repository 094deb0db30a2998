"""A convolution with fast gradients on every platform.

XLA's gradients of a strided 9 × 9 convolution are slow. Its CPU backend takes many times as long
as the equivalent matrix products, its TPU backend multiplies by zeros in the gradient of the
images, and cuDNN takes longer than products of Fourier transforms or patches. This module
multiplies patches or Fourier transforms on CPUs and, where that takes less time, on NVIDIA GPUs,
and computes the gradient phase by phase on TPUs. Elsewhere it uses XLA's convolution.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax.ops._checks import as_array, as_floating, is_constant, is_sharded
from capsjax.ops.bias import add_bias
from capsjax.ops.fields import Padding, ReceptiveFields, channels_last
from capsjax.ops.fourier import conv_by_fourier, gains_by_fourier
from capsjax.ops.gathered import conv_by_gathering, why_not_by_gathering
from capsjax.ops.patches import conv_by_lookup, conv_by_patches, gains_by_lookup
from capsjax.ops.phases import conv_by_phases, conv_by_xla, gains_by_phases

ConvImplementation = Literal["patches", "lookup", "fourier", "phases", "mosaic_gpu", "xla"]


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
    bias: ArrayLike | None = None,
    implementation: ConvImplementation | None = None,
) -> jax.Array:
    r"""Drop-in for :func:`jax.lax.conv_general_dilated` with fast gradients on every platform.

    .. math::
      y_{b,p,q,o} = \sum_{h,w,c} x_{b,\, sp+h,\, sq+w,\, c} \; k_{h,w,c,o} + b_o

    The signature is that of the ``lax`` function: ``nnx.Conv`` and ``linen.Conv`` accept it as
    ``conv_general_dilated=``. Arguments that "need XLA" are passed to the ``lax`` function.

    Args:
      lhs: images ``[B, H, W, C]``, series ``[B, L, C]`` or volumes ``[B, Z, H, W, C]``; any number
        of spatial axes. Other layouts need XLA.
      rhs: kernel of the same dtype and number of spatial axes, ``[KH, KW, C, O]``; other layouts
        need XLA.
      window_strides: stride per spatial axis.
      padding: ``"SAME"``, ``"VALID"``, or (low, high) per spatial axis.
      lhs_dilation: as in ``lax``; values other than 1 need XLA.
      rhs_dilation: as in ``lax``; values other than 1 need XLA.
      dimension_numbers: as in ``lax``, whose default is NCHW; values other than
        ``("NHWC", "HWIO", "NHWC")``, or the same layout with other spatial axes, need XLA.
      feature_group_count: as in ``lax``; values other than 1 need XLA.
      batch_group_count: as in ``lax``; values other than 1 need XLA.
      precision: as in ``lax``.
      preferred_element_type: as in ``lax``.
      out_sharding: as in ``lax``; values other than None, and explicitly sharded arguments, need
        XLA.
      bias: ``[O]``, added to each feature; or None. Only ``"lookup"`` rounds it and its gradient to
        the dtype of the images, except in float16, whose range is small.
      implementation: one of the following, or None for the fastest that supports the arguments on
        the platform that the program is compiled for.

        * ``"patches"``: concatenates shifted copies of the images and multiplies them with the
          kernel in one matrix product. Needs memory for KH·KW/stride² images. The default on CPUs
          unless Fourier transforms take fewer operations.
        * ``"lookup"``: as ``"patches"``, but reads the patches, and the terms of the gradient of
          the images, by tables of positions. The default on NVIDIA GPUs for large kernels on one
          channel, or few in 16-bit dtypes, and in 16-bit dtypes where Fourier transforms take fewer
          operations than patches; unless the patches take more than 1 GiB. The second derivatives
          and the forward-mode derivative with respect to the images add to memory out of order,
          which is slower.
        * ``"fourier"``: multiplies Fourier transforms, which takes a third of the operations for
          large kernels on small images. Needs memory for the transforms, four to five kernels with
          the paper's sizes. The default on CPUs and NVIDIA GPUs where it takes fewer
          operations, except where ``"lookup"`` is.
        * ``"phases"``: XLA's convolution, with a gradient of the images that multiplies by few
          zeros. The default on TPUs for strided convolutions.
        * ``"mosaic_gpu"``: a kernel for Hopper GPUs, such as H100, which gathers blocks of images
          and features while it multiplies them, and stores no patches. Rounds float32 factors to
          TF32. With jax 0.11 or later, the default there where Fourier transforms take fewer
          operations than patches, for channels in multiples of 128 and features in multiples of 64;
          but not in programs that are exported, or that XLA divides among devices.
        * ``"xla"``: :func:`jax.lax.conv_general_dilated`. The default elsewhere.

    Returns:
      ``[B, P, Q, O]``.

    Raises:
      TypeError: ``lhs``, ``rhs`` or ``bias`` is not an array; or there is a bias, and it or ``lhs``
        is not floating point.
      ValueError: ``implementation`` is unknown, or ``bias`` does not have one number per feature.
      NotImplementedError: the named implementation does not support the arguments, or not the
        platform.

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

    def xla(lhs: jax.Array, rhs: jax.Array, bias: jax.Array | None) -> jax.Array:
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        result = lax.conv_general_dilated(
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
        if bias is None:
            return result
        axis = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers).out_spec[1]
        return jnp.moveaxis(add_bias(jnp.moveaxis(result, axis, -1), bias), -1, axis)

    lhs, rhs = as_array("lhs", lhs), as_array("rhs", rhs)
    added = None if bias is None else _as_bias(bias, lhs, rhs, dimension_numbers)
    if implementation == "xla":
        return xla(lhs, rhs, added)
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
        added,
    )
    if reason and implementation:
        raise NotImplementedError(f"implementation={implementation!r} {reason}")
    if reason:
        return xla(lhs, rhs, added)
    fields = _fields(lhs, rhs, window_strides, padding)
    by_name: dict[str, Callable[..., jax.Array]]
    by_name = {
        "patches": conv_by_patches,
        "lookup": conv_by_lookup,
        "fourier": conv_by_fourier,
        "phases": conv_by_phases,
        "xla": conv_by_xla,
    }
    by_fourier = gains_by_fourier(lhs, rhs, fields)
    on_gpu = "fourier" if by_fourier else "xla"
    if gains_by_lookup(lhs, fields, by_fourier):
        on_gpu = "lookup"
    why_not = why_not_by_gathering(lhs, rhs, fields, precision, preferred_element_type)

    def products(name: str) -> Callable[..., jax.Array]:
        def convolve(lhs: jax.Array, rhs: jax.Array, bias: jax.Array | None) -> jax.Array:
            options = fields, precision, preferred_element_type
            if name == "lookup":
                return conv_by_lookup(lhs, rhs, *options, bias)
            if name == "mosaic_gpu":
                otherwise = None if implementation else by_name[on_gpu]
                result = conv_by_gathering(lhs, rhs, fields, otherwise)
            else:
                result = by_name[name](lhs, rhs, *options)
            return result if bias is None else add_bias(result, bias)

        return convolve

    if implementation == "mosaic_gpu" and why_not:
        raise NotImplementedError(f"implementation={implementation!r} {why_not}")
    if implementation:
        return products(implementation)(lhs, rhs, added)
    return lax.platform_dependent(
        lhs,
        rhs,
        added,
        cpu=products("fourier" if by_fourier else "patches"),
        cuda=products("mosaic_gpu" if by_fourier and why_not is None else on_gpu),
        tpu=products("phases" if gains_by_phases(fields) else "xla"),
        default=products("xla"),
    )


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
    bias: jax.Array | None,
) -> str | None:
    """Returns why the arguments need XLA, or None. XLA itself reports invalid arguments."""
    rank = lhs.ndim - 2
    if rank < 1 or rhs.ndim != lhs.ndim:
        return f"needs the same number of spatial axes, got shapes {lhs.shape} and {rhs.shape}"
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if layout != channels_last(rank):
        return f"needs dimension_numbers with channels last, got {dimension_numbers}"
    if any(d not in (None, (1,) * rank, [1] * rank) for d in (lhs_dilation, rhs_dilation)):
        return (
            f"supports no dilation, got lhs_dilation={lhs_dilation} and rhs_dilation={rhs_dilation}"
        )
    if feature_group_count != 1 or batch_group_count != 1:
        return (
            f"supports no groups, got feature_group_count={feature_group_count} and"
            f" batch_group_count={batch_group_count}"
        )
    if out_sharding is not None:
        return f"supports no explicit sharding, got out_sharding={out_sharding}"
    given = [lhs, rhs] if bias is None else [lhs, rhs, bias]
    if is_sharded(*given):
        types = " and ".join(str(jax.typeof(each)) for each in given)
        return f"supports no explicit sharding, got {types}"
    if not is_constant((*lhs.shape[1:], *rhs.shape[:-1])):
        return (
            "needs constant sizes, except for the batch and the features, got shapes"
            f" {lhs.shape} and {rhs.shape}"
        )
    if lhs.shape[-1] != rhs.shape[-2] or lhs.dtype != rhs.dtype:
        return (
            f"needs images and kernel of the same channels and dtype, got"
            f" {lhs.dtype}{lhs.shape} and {rhs.dtype}{rhs.shape}"
        )
    if len(strides) != rank or min(strides) < 1:
        return f"needs {rank} positive strides, got window_strides={strides}"
    if not isinstance(padding, str) and [len(pair) for pair in padding] != [2] * rank:
        return f"needs a name or {rank} pairs, got padding={padding}"
    if min(_fields(lhs, rhs, strides, padding).shape) < 1:
        return f"needs images as large as the kernel, got shapes {lhs.shape} and {rhs.shape}"
    if preferred_element_type is not None and jnp.dtype(preferred_element_type) not in (
        lhs.dtype,
        jnp.promote_types(lhs.dtype, jnp.float32),
    ):
        return (
            f"sums in {lhs.dtype} or float32, got preferred_element_type={preferred_element_type}"
        )
    return None


def _as_bias(bias: ArrayLike, lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> jax.Array:
    bias = as_floating("bias", bias)
    if not jnp.issubdtype(lhs.dtype, jnp.floating):
        raise TypeError(f"lhs must be floating point for a bias, got dtype {lhs.dtype}")
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    features = rhs.shape[layout.rhs_spec[0]]
    if bias.shape != (features,):
        raise ValueError(f"bias must have shape [O] = [{features}], got shape {bias.shape}")
    return bias


def _fields(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding
) -> ReceptiveFields:
    return ReceptiveFields.of(images.shape[1:-1], kernel.shape[:-2], strides, padding)
