"""Convolutions of feature maps, whose gradients are fast on every platform."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from flax.typing import PaddingLike

from capsjax.ops import conv_general_dilated
from capsjax.ops._checks import as_array, spatial_axes, spatial_padding, spatial_sizes
from capsjax.ops.bias import add_bias


class Convolution(nnx.Conv):
    """``nnx.Conv`` with fast gradients of images, kernel and bias on every platform.

    ``use_bias`` is False, because ``nnx.Conv`` does not add the bias; without one, ``bias`` is
    None.
    """

    # On the class, for layers that earlier versions have pickled.
    _function: Callable[..., jax.Array] = staticmethod(conv_general_dilated)

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, conv_general_dilated=conv_general_dilated, **options)
        self.use_bias = False

    @property
    def conv_general_dilated(self) -> Callable[..., jax.Array]:
        """What ``nnx.Conv`` calls: the function that was set, and the bias."""
        return self._convolve

    @conv_general_dilated.setter
    def conv_general_dilated(self, function: Callable[..., jax.Array]) -> None:
        # What the property of this layer or another one returned adds a bias itself.
        if getattr(function, "__func__", None) is Convolution._convolve:
            function = function.__self__._function  # type: ignore[attr-defined]
        self._function = function

    @conv_general_dilated.deleter
    def conv_general_dilated(self) -> None:
        self._function = conv_general_dilated

    def _convolve(self, *args: Any, **options: Any) -> jax.Array:
        if self.bias is None:
            return self._function(*args, **options)
        if self._function is conv_general_dilated:
            return conv_general_dilated(*args, bias=self.bias[...], **options)
        return add_bias(self._function(*args, **options), self.bias[...])


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
