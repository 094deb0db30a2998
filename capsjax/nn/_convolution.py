"""Convolutions of feature maps, whose gradients are fast on every platform."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from flax.typing import PaddingLike

from capsjax.ops import conv_general_dilated
from capsjax.ops._checks import as_array, spatial_axes, spatial_padding, spatial_sizes


class Convolution(nnx.Conv):
    """``nnx.Conv`` with fast gradients of images, kernel and bias on every platform.

    ``use_bias`` is False, because ``nnx.Conv`` does not add the bias; without one, ``bias`` is
    None.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.use_bias = False
        # Otherwise it hides the method, which knows the bias.
        del self.conv_general_dilated

    def conv_general_dilated(self, *args: Any, **options: Any) -> jax.Array:
        """Convolves and adds the bias. ``nnx.Conv`` calls it."""
        bias = None if self.bias is None else self.bias[...]
        return conv_general_dilated(*args, bias=bias, **options)


def make_conv(
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: PaddingLike = "VALID",
    **options: Any,
) -> Convolution:
    """Makes a convolution along the axes of its kernel."""
    size = spatial_sizes("kernel_size", kernel_size)
    names = ["VALID", "SAME", "SAME_LOWER", "CIRCULAR", "REFLECT", *["CAUSAL"] * (len(size) == 1)]
    return Convolution(
        in_features,
        out_features,
        size,
        spatial_sizes("strides", strides, size),
        padding=spatial_padding(padding, size, names),
        **options,
    )


def convolve(conv: Convolution, inputs: jax.Array) -> jax.Array:
    """Convolves ``[..., H, W, C]``, or raises a ValueError."""
    inputs = as_array("inputs", inputs)
    rank, channels = len(conv.kernel_size), conv.in_features
    if inputs.ndim <= rank or inputs.shape[-1] != channels:
        axes = spatial_axes(rank)
        raise ValueError(
            f"inputs must have shape [..., {axes}, C] = [..., {axes}, {channels}], got shape"
            f" {inputs.shape}"
        )
    outputs = conv(inputs)
    if 0 in outputs.shape[-1 - rank : -1]:
        raise ValueError(
            f"inputs must be at least as large as the kernel {conv.kernel_size}, got"
            f" {inputs.shape[-1 - rank : -1]}"
        )
    return outputs
