"""Matrix capsules with EM routing: Hinton, Sabour, Frosst, ICLR 2018."""

import dataclasses
import math

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
from capsjax.nn import MatrixConvCapsules, MatrixGridCapsules, MatrixPrimaryCapsules
from capsjax.nn._convolution import make_conv
from capsjax.nn.shared import check_shares_weights
from capsjax.ops.relu import relu
from capsjax.routing import Routed
from capsjax.routing.fused import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixCapsNetConfig(CapsuleNetworkConfig):
    """Sizes and options of a :class:`MatrixCapsNet`.

    Attributes:
      image_shape: rows, columns and channels of the images.
      num_classes: J, the number of class capsules.
      conv_features: A, channels of the first convolution.
      conv_kernel: kernel size of the first convolution.
      conv_strides: stride of the first convolution.
      primary_types: B, primary capsule types.
      capsule_types: C, D, …: types of each convolutional capsule layer.
      capsule_kernel: size of the receptive fields of the convolutional capsule layers.
      capsule_strides: stride of each convolutional capsule layer.
      pose_features: dimension of a pose, a square number.
      routing: name of the algorithm of all capsule layers; see :func:`capsjax.routing.algorithms`.
      num_iterations: routing iterations, for algorithms that iterate.
      decoder_features: widths of the decoder's hidden layers; empty for no decoder, as in the
        paper.
      dtype: dtype of the computation, ``"float32"`` or ``"bfloat16"``; parameters, norms and
        routing sums are float32 in both.
    """

    conv_features: int = 32
    conv_kernel: int = 5
    conv_strides: int = 2
    primary_types: int = 32
    capsule_types: tuple[int, ...] = (32, 32)
    capsule_kernel: int = 3
    capsule_strides: tuple[int, ...] = (2, 1)
    pose_features: int = 16
    routing: str = "em"

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        if math.isqrt(self.pose_features) ** 2 != self.pose_features:
            raise ValueError(f"pose_features must be a square number, got {self.pose_features}")
        if len(self.capsule_strides) != len(self.capsule_types):
            raise ValueError(
                f"capsule_strides must have one entry for each of the {len(self.capsule_types)}"
                f" capsule_types, got {self.capsule_strides}"
            )
        check_shares_weights(self.routing)
        if min(self.grid) < 1:
            raise ValueError(
                f"image_shape {self.image_shape} is too small for {len(self.capsule_types)} layers"
                f" of capsules with kernel {self.capsule_kernel}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last grid of capsules."""
        layers = [(self.conv_kernel, self.conv_strides)]
        layers += [(self.capsule_kernel, stride) for stride in self.capsule_strides]
        return grid_after(self.image_shape[:2], layers)


class MatrixCapsNet(CapsuleNetwork):
    """The network of the EM routing paper, with 4 × 4 matrices as poses.

    A convolution is followed by primary capsules, convolutional capsules and class capsules. All
    positions of the last grid share the weights of the class capsules, and their coordinates are
    added to the votes.

    Args:
      config: sizes and options.
      rngs: random streams; uses ``params``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import models
      >>> from flax import nnx
      >>> network = models.create("matrix_capsnet_small", rngs=nnx.Rngs(0))
      >>> prediction = jax.eval_shape(network, jnp.zeros((2, 28, 28, 1)))
      >>> prediction.scores.shape, prediction.poses.shape
      ((2, 10), (2, 10, 16))

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, section 4.
    """

    config: MatrixCapsNetConfig

    def __init__(self, config: MatrixCapsNetConfig, *, rngs: nnx.Rngs):
        check_build(config, MatrixCapsNetConfig, rngs)
        self.config = config
        dtype = jnp.dtype(config.dtype)
        options = config.routing_options
        self.conv = make_conv(
            config.image_shape[-1],
            config.conv_features,
            config.conv_kernel,
            config.conv_strides,
            dtype=dtype,
            rngs=rngs,
        )
        self.primary = MatrixPrimaryCapsules(
            config.conv_features, config.primary_types, config.pose_features, dtype=dtype, rngs=rngs
        )
        types = (config.primary_types, *config.capsule_types)
        self.capsules = nnx.List(
            [
                MatrixConvCapsules(
                    types[n],
                    types[n + 1],
                    config.pose_features,
                    kernel_size=config.capsule_kernel,
                    strides=stride,
                    routing=config.routing,
                    dtype=dtype,
                    rngs=rngs,
                    **options,
                )
                for n, stride in enumerate(config.capsule_strides)
            ]
        )
        self.classes = MatrixGridCapsules(
            types[-1],
            config.num_classes,
            config.pose_features,
            routing=config.routing,
            dtype=dtype,
            rngs=rngs,
            **options,
        )
        self.decoder = make_decoder(config, config.pose_features, dtype=dtype, rngs=rngs)

    def class_capsules(
        self, images: jax.Array, *, implementation: Implementation | None = None
    ) -> Routed:
        """Computes the class capsules of images whose shape has been checked."""
        del implementation
        poses, activations = self.primary(relu(self.conv(images)))
        for layer in self.capsules:
            poses, activations, _ = layer(poses, activations=activations)
        routed: Routed = self.classes(poses, activations=activations)
        return routed
