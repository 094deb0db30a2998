"""The convolutions of the paper's network as workloads."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp

from capsjax import models
from capsjax.bench.workloads.workload import Dtype, JaxFunction, on_one_device
from capsjax.errors import ConfigError
from capsjax.ops import conv_general_dilated
from capsjax.ops.conv import ConvImplementation


def implementations() -> tuple[str, ...]:
    """Returns implementations of convolutions; ``default`` depends on platform and shape."""
    return ("default", *get_args(ConvImplementation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution of a network and its gradients, for a given gradient of its result.

    The first layer, ``conv``, has only the gradient of its kernel, as in a train step.
    """

    layer: Literal["conv", "primary"] = "primary"
    preset: Annotated[str, models.presets] = "paper"
    batch: int = 128
    implementation: Annotated[str, implementations] = "default"
    dtype: Dtype = "float32"

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Makes the function."""
        config = models.configure(self.preset)
        if not isinstance(config, models.CapsNetConfig):
            raise ConfigError(f"preset must be that of a CapsNet, got {self.preset!r}")
        size, channels = config.conv_kernel, config.image_shape[-1]
        images = jax.ShapeDtypeStruct((self.batch, *config.image_shape), jnp.float32)
        kernel = jax.ShapeDtypeStruct((size, size, channels, config.conv_features), jnp.float32)
        strides = config.conv_strides
        if self.layer == "primary":
            first = _convolution(strides, config.padding, implementation="xla")
            images = jax.eval_shape(first, images, kernel)
            size, features = config.primary_kernel, config.primary_types * config.primary_features
            kernel = jax.ShapeDtypeStruct((size, size, images.shape[-1], features), jnp.float32)
            strides = config.primary_strides
        convolve = _convolution(strides, config.padding, implementation=self.implementation)
        result = jax.eval_shape(convolve, images, kernel)

        def with_gradients(images: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Any:
            if self.layer == "conv":
                output, pull_back = jax.vjp(lambda kernel: convolve(images, kernel), kernel)
            else:
                output, pull_back = jax.vjp(convolve, images, kernel)
            return output, pull_back(gradient)

        shapes = (images.shape, kernel.shape, result.shape)
        return on_one_device(with_gradients, devices, shapes, self.dtype)


def _convolution(stride: int, padding: str, *, implementation: str) -> Any:
    name: Any = None if implementation == "default" else implementation
    return lambda images, kernel: conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        implementation=name,
    )
