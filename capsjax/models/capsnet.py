"""The capsule network of Sabour, Frosst and Hinton: Conv1, PrimaryCaps, DigitCaps, decoder."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from capsjax.models.network import (
    CapsuleNetwork,
    CapsuleNetworkConfig,
    check_build,
    make_decoder,
)
from capsjax.nn import DenseCapsules, PrimaryCapsules
from capsjax.nn._convolution import make_conv
from capsjax.ops.relu import relu
from capsjax.routing import Routed, algorithm
from capsjax.routing.fused import Implementation

Initialisation = Literal["lecun", "official"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapsNetConfig(CapsuleNetworkConfig):
    """Sizes and options of a :class:`CapsNet`.

    Attributes:
      image_shape: rows, columns and channels of the images.
      num_classes: J, the number of class capsules.
      conv_features: channels of the first convolution.
      conv_kernel: kernel size of the first convolution.
      conv_strides: stride of the first convolution.
      primary_types: primary capsule types per position.
      primary_features: K, dimension of a primary capsule.
      primary_kernel: kernel size of the primary capsules.
      primary_strides: stride of the primary capsules.
      primary_coupling: constant coupling of the primary capsules; see
        :class:`capsjax.nn.PrimaryCapsules`.
      padding: padding of both convolutions, ``"VALID"`` or ``"SAME"``.
      class_features: D, dimension of a class capsule.
      routing: name of the algorithm; see :func:`capsjax.routing.algorithms`.
      num_iterations: routing iterations, for algorithms that iterate.
      routing_bias: whether the class capsules have a bias inside routing.
      leaky: whether primary capsules may go to no class; dynamic routing only.
      stop_gradient: whether to stop gradients through the logit updates; dynamic routing only.
      implementation: of the class capsules' votes and dynamic routing; see
        :func:`capsjax.dense_capsules`.
      decoder_features: widths of the decoder's hidden layers; empty for no decoder.
      initialisation: ``"lecun"``: LeCun normal for convolutions and decoder, normal with σ 0.1 for
        the capsules. ``"official"``, as in the authors' code: truncated normal with σ 0.05 for the
        first convolution and σ 0.1 elsewhere, biases 0.1.
      dtype: dtype of the computation, ``"float32"`` or ``"bfloat16"``; parameters, norms and
        routing sums are float32 in both.
    """

    conv_features: int = 256
    conv_kernel: int = 9
    conv_strides: int = 1
    primary_types: int = 32
    primary_features: int = 8
    primary_kernel: int = 9
    primary_strides: int = 2
    primary_coupling: float = 1.0
    padding: str = "VALID"
    class_features: int = 16
    routing_bias: bool = False
    leaky: bool = False
    stop_gradient: bool = False
    implementation: Implementation | None = None
    decoder_features: tuple[int, ...] = (512, 1024)
    initialisation: Initialisation = "lecun"

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        if self.initialisation not in get_args(Initialisation):
            raise ValueError(
                f"initialisation must be one of {get_args(Initialisation)}, got"
                f" {self.initialisation!r}"
            )
        if self.padding not in ("VALID", "SAME"):
            raise ValueError(f"padding must be 'VALID' or 'SAME', got {self.padding!r}")
        if min(self.grid) < 1:
            raise ValueError(
                f"image_shape {self.image_shape} is too small for kernels {self.conv_kernel} and"
                f" {self.primary_kernel} with {self.padding} padding"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of primary capsules."""

        def out(size: int, kernel: int, stride: int) -> int:
            return -(-(size - (kernel - 1 if self.padding == "VALID" else 0)) // stride)

        rows, columns = (
            out(
                out(size, self.conv_kernel, self.conv_strides),
                self.primary_kernel,
                self.primary_strides,
            )
            for size in self.image_shape[:2]
        )
        return rows, columns

    @property
    def num_primary(self) -> int:
        """I, the number of primary capsules."""
        rows, columns = self.grid
        return rows * columns * self.primary_types


class CapsNet(CapsuleNetwork):
    """The paper's network: a convolution, primary capsules, class capsules and a decoder.

    Args:
      config: sizes and options.
      rngs: random streams; uses ``params``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import models
      >>> from flax import nnx
      >>> network = models.create("small", rngs=nnx.Rngs(0))
      >>> prediction = jax.eval_shape(network, jnp.zeros((2, 28, 28, 1)))
      >>> prediction.scores.shape, prediction.poses.shape, prediction.reconstruction.shape
      ((2, 10), (2, 10, 16), (2, 28, 28, 1))

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 4.
    """

    config: CapsNetConfig

    def __init__(self, config: CapsNetConfig, *, rngs: nnx.Rngs):
        check_build(config, CapsNetConfig, rngs)
        self.config = config
        dtype = jnp.dtype(config.dtype)
        official = config.initialisation == "official"
        conv_init = _truncated(0.05) if official else nnx.initializers.lecun_normal()
        wide_init = _truncated(0.1) if official else nnx.initializers.lecun_normal()
        capsule_init = _truncated(0.1) if official else nnx.initializers.normal(0.1)
        options = {"kernel_init": capsule_init, **config.routing_options}
        options |= algorithm(config.routing).class_capsules
        bias_init = nnx.initializers.constant(0.1 if official else 0.0)
        self.conv = make_conv(
            config.image_shape[-1],
            config.conv_features,
            config.conv_kernel,
            config.conv_strides,
            padding=config.padding,
            dtype=dtype,
            kernel_init=conv_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.primary = PrimaryCapsules(
            config.conv_features,
            config.primary_types,
            config.primary_features,
            kernel_size=config.primary_kernel,
            strides=config.primary_strides,
            padding=config.padding,
            coupling=config.primary_coupling,
            dtype=dtype,
            kernel_init=wide_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.classes = DenseCapsules(
            config.num_primary,
            config.primary_features,
            config.num_classes,
            config.class_features,
            routing=config.routing,
            use_bias=config.routing_bias,
            implementation=config.implementation,
            dtype=dtype,
            bias_init=bias_init,
            rngs=rngs,
            **options,
        )
        self.decoder = make_decoder(
            config,
            config.class_features,
            dtype=dtype,
            rngs=rngs,
            kernel_init=wide_init,
            bias_init=bias_init,
        )

    def primary_capsules(self, images: jax.Array) -> jax.Array:
        """Computes the primary capsules ``[..., I, K]`` of images ``[..., H, W, C]``."""
        capsules: jax.Array = self.primary(relu(self.conv(images)))
        return capsules

    def class_capsules(
        self, images: jax.Array, *, implementation: Implementation | None = None
    ) -> Routed:
        """Computes the class capsules of images whose shape has been checked."""
        primary = self.primary_capsules(images)
        routed: Routed = self.classes(primary, implementation=implementation)
        return routed


def _truncated(stddev: float) -> nnx.Initializer:
    return nnx.initializers.truncated_normal(stddev)
