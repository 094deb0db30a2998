"""Efficient-CapsNet: Mazzia, Salvetti, Chiaberge, Scientific Reports 2021."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from capsjax.models.network import (
    CapsuleNetwork,
    CapsuleNetworkConfig,
    check_build,
    grid_after,
    make_decoder,
)
from capsjax.nn import DenseCapsules
from capsjax.nn._convolution import make_conv
from capsjax.ops import exponential_squash
from capsjax.ops.relu import relu
from capsjax.routing import Routed
from capsjax.routing.fused import Implementation

_he_normal = nnx.initializers.he_normal()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientCapsNetConfig(CapsuleNetworkConfig):
    """Sizes and options of an :class:`EfficientCapsNet`.

    Attributes:
      image_shape: rows, columns and channels of the images.
      num_classes: J, the number of class capsules.
      conv_features: channels of each convolution, which ReLU and batch normalisation follow.
      conv_kernels: kernel sizes of the convolutions.
      conv_strides: strides of the convolutions.
      primary_features: K, dimension of a primary capsule. The channels of the last convolution are
        split into capsules of this dimension.
      primary_kernel: kernel size of the primary capsules' convolution, which yields a grid of
        capsules, as in Sabour et al. 2017. None means the paper's depthwise convolution, which is
        as large as the feature maps and yields a single position.
      primary_strides: stride of the primary capsules' convolution.
      class_features: D, dimension of a class capsule.
      routing: name of the algorithm; see :func:`capsjax.routing.algorithms`.
      num_iterations: routing iterations, for algorithms that iterate.
      decoder_features: widths of the decoder's hidden layers; empty for no decoder. The authors
        train with (512, 1024), but do not count the decoder's parameters.
      dtype: dtype of the computation, ``"float32"`` or ``"bfloat16"``; parameters, norms and
        routing sums are float32 in both.
    """

    conv_features: tuple[int, ...] = (32, 64, 64, 128)
    conv_kernels: tuple[int, ...] = (5, 3, 3, 3)
    conv_strides: tuple[int, ...] = (1, 1, 1, 2)
    primary_features: int = 8
    primary_kernel: int | None = None
    primary_strides: int = 1
    class_features: int = 16
    routing: str = "efficient"

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        if not self.conv_features:
            raise ValueError("conv_features must have at least one entry, got ()")
        for name in ("conv_kernels", "conv_strides"):
            if len(getattr(self, name)) != len(self.conv_features):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self.conv_features)}"
                    f" conv_features, got {getattr(self, name)}"
                )
        if self.conv_features[-1] % self.primary_features:
            raise ValueError(
                f"primary_features must divide the last of conv_features {self.conv_features}, got"
                f" {self.primary_features}"
            )
        if min(self.grid) < 1:
            raise ValueError(
                f"image_shape {self.image_shape} is too small for kernels {self.conv_kernels}"
            )
        if self.primary_kernel is None:
            if self.primary_strides != 1:
                raise ValueError(
                    f"primary_strides needs a primary_kernel, got {self.primary_strides} and None"
                )
        elif self.primary_kernel > min(self.grid):
            raise ValueError(
                f"primary_kernel must fit the last feature maps of {self.grid}, got"
                f" {self.primary_kernel}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last feature maps, before the primary capsules."""
        layers = zip(self.conv_kernels, self.conv_strides, strict=True)
        return grid_after(self.image_shape[:2], layers)

    @property
    def num_primary(self) -> int:
        """I, the number of primary capsules."""
        rows, columns = 1, 1
        if self.primary_kernel is not None:
            rows, columns = grid_after(self.grid, [(self.primary_kernel, self.primary_strides)])
        return rows * columns * self.conv_features[-1] // self.primary_features


class EfficientCapsNet(CapsuleNetwork):
    """Normalised convolutions, few primary capsules, self-attention routing.

    It has 161,824 parameters on MNIST, without a decoder.

    Args:
      config: sizes and options.
      rngs: random streams; uses ``params``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import models
      >>> from flax import nnx
      >>> network = models.create("efficient_capsnet", rngs=nnx.Rngs(0))
      >>> network.eval()  # batch normalisation with its running statistics
      >>> jax.eval_shape(network, jnp.zeros((2, 28, 28, 1))).poses.shape
      (2, 10, 16)

    Reference:
      Mazzia, Salvetti, Chiaberge, *Efficient-CapsNet: Capsule Network with Self-Attention Routing*,
      Scientific Reports 2021, with sizes and initialisers of the authors' code.
    """

    config: EfficientCapsNetConfig

    def __init__(self, config: EfficientCapsNetConfig, *, rngs: nnx.Rngs):
        check_build(config, EfficientCapsNetConfig, rngs)
        self.config = config
        dtype = jnp.dtype(config.dtype)

        def conv(*args: Any, **options: Any) -> nnx.Conv:
            return make_conv(*args, dtype=dtype, kernel_init=_he_normal, rngs=rngs, **options)

        channels = (config.image_shape[-1], *config.conv_features)
        self.convs = nnx.List(
            [
                conv(channels[n], channels[n + 1], kernel, config.conv_strides[n])
                for n, kernel in enumerate(config.conv_kernels)
            ]
        )
        self.norms = nnx.List(
            [
                nnx.BatchNorm(features, momentum=0.99, epsilon=1e-3, dtype=dtype, rngs=rngs)
                for features in config.conv_features
            ]
        )
        last = channels[-1]
        if config.primary_kernel is None:
            # A depthwise kernel as large as the maps: a grid of one position.
            self.primary = conv(last, last, config.grid, feature_group_count=last)
        else:
            self.primary = conv(last, last, config.primary_kernel, config.primary_strides)
        self.classes = DenseCapsules(
            config.num_primary,
            config.primary_features,
            config.num_classes,
            config.class_features,
            routing=config.routing,
            implementation="reference",  # few votes, which are cheap to store
            dtype=dtype,
            kernel_init=nnx.initializers.he_normal(in_axis=-3, out_axis=-1),
            rngs=rngs,
            **config.routing_options,
        )
        self.decoder = make_decoder(config, config.class_features, dtype=dtype, rngs=rngs)

    def class_capsules(
        self, images: jax.Array, *, implementation: Implementation | None = None
    ) -> Routed:
        """Computes the class capsules of images whose shape has been checked."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(relu(conv(x)))
        x = self.primary(x)
        x = jax.lax.collapse(x, x.ndim - 3)
        capsules = (self.config.num_primary, self.config.primary_features)
        primary = exponential_squash(x.reshape(*x.shape[:-1], *capsules))
        routed: Routed = self.classes(primary, implementation=implementation)
        return routed
