"""Presets: named configurations of networks."""

import dataclasses
from typing import Any

from flax import nnx

from capsjax.models.baseline import BaselineCNN, BaselineConfig
from capsjax.models.capsnet import CapsNet, CapsNetConfig
from capsjax.models.efficient import EfficientCapsNet, EfficientCapsNetConfig
from capsjax.models.matrix import MatrixCapsNet, MatrixCapsNetConfig
from capsjax.ops._checks import check_choice

ModelConfig = CapsNetConfig | MatrixCapsNetConfig | EfficientCapsNetConfig | BaselineConfig
Network = CapsNet | MatrixCapsNet | EfficientCapsNet | BaselineCNN

_PAPER = CapsNetConfig()

# The authors' code routes primary capsules once from a single child: the coupling is 1 over the
# number of types, to which leaky routing adds one.
_OFFICIAL = dataclasses.replace(
    _PAPER, primary_coupling=1 / 32, routing_bias=True, initialisation="official"
)
_CIFAR10 = dataclasses.replace(
    _OFFICIAL,
    image_shape=(24, 24, 3),
    primary_types=64,
    primary_coupling=1 / 65,
    padding="SAME",
    leaky=True,
    decoder_features=(),
)

_PRESETS: dict[str, ModelConfig] = {
    # The equations of the paper: 8,215,568 parameters on MNIST.
    "paper": _PAPER,
    # The authors' code, with its biases, coupling of 1/32 and initialisers: 8,215,728 parameters on
    # MNIST.
    "official": _OFFICIAL,
    # The authors' code on CIFAR-10: 64 primary types, routing to "none of the above", no decoder.
    "cifar10": _CIFAR10,
    # The same network for the stereo pairs of smallNORB.
    "smallnorb": dataclasses.replace(_CIFAR10, image_shape=(32, 32, 2), num_classes=5),
    # The small network that the paper trains on SVHN.
    "svhn": dataclasses.replace(
        _OFFICIAL,
        image_shape=(32, 32, 3),
        conv_features=64,
        primary_types=16,
        primary_features=6,
        primary_coupling=1 / 16,
        class_features=8,
        decoder_features=(),
    ),
    # The layers of the paper, small enough to train in minutes on two CPU cores: 1,051,344
    # parameters.
    "small": dataclasses.replace(
        _PAPER,
        conv_features=64,
        conv_strides=2,
        primary_types=4,
        primary_features=16,
        primary_kernel=5,
        primary_strides=1,
        decoder_features=(256, 512),
    ),
    # The paper's convolutional baseline: 35,445,522 parameters on MNIST.
    "baseline": BaselineConfig(),
    # A small baseline, about as large as the small capsule network: 1,059,146 parameters.
    "baseline_small": BaselineConfig(conv_features=(32, 64), pooling=2, dense_features=(320,)),
    # The paper's baseline for overlapping digits: 24.5 million parameters on 36 x 36 pixels.
    "baseline_pairs": BaselineConfig(conv_features=(512, 256), pooling=2, dense_features=(1024,)),
    # Matrix capsules with EM routing; all layers have 32 types, as in the paper.
    "matrix_capsnet": MatrixCapsNetConfig(),
    # The small network of the same paper: A = 64, B = 8, C = D = 16.
    "matrix_capsnet_small": MatrixCapsNetConfig(
        conv_features=64, primary_types=8, capsule_types=(16, 16)
    ),
    # Self-attention routing: 161,824 parameters on MNIST.
    "efficient_capsnet": EfficientCapsNetConfig(),
    # The same for images of 64 to 224 pixels: strides of 2 lead to maps of 2 to 12 pixels, and the
    # depthwise convolution to 32 capsules at any size. 469,312 parameters at 224 x 224 x 3.
    "large_images": EfficientCapsNetConfig(
        image_shape=(224, 224, 3),
        conv_features=(32, 64, 128, 256),
        conv_strides=(2, 2, 2, 2),
    ),
}


def presets() -> tuple[str, ...]:
    """Returns the names of the presets.

    Example:
      >>> from capsjax import models
      >>> models.presets()[:3]
      ('paper', 'official', 'cifar10')
    """
    return tuple(_PRESETS)


def configure(preset: str, **overrides: Any) -> ModelConfig:
    """Returns the configuration of a preset, with overrides.

    Args:
      preset: one of :func:`presets`.
      **overrides: fields of the configuration to replace.

    Returns:
      A configuration, such as :class:`CapsNetConfig`.

    Raises:
      ValueError: the preset or a field is unknown, or a value is invalid.

    Example:
      >>> from capsjax import models
      >>> models.configure("paper", image_shape=(36, 36, 1)).num_primary
      3200
    """
    check_choice("preset", preset, _PRESETS)
    config = _PRESETS[preset]
    known = [field.name for field in dataclasses.fields(config)]
    for name in overrides:
        if name not in known:
            raise ValueError(f"preset {preset!r} has no field {name!r}, only {', '.join(known)}")
    return dataclasses.replace(config, **overrides)


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> Network:
    """Builds a network from its configuration.

    Raises:
      TypeError: ``config`` is not a configuration, or ``rngs`` is not an ``nnx.Rngs``.
    """
    match config:
        case CapsNetConfig():
            return CapsNet(config, rngs=rngs)
        case MatrixCapsNetConfig():
            return MatrixCapsNet(config, rngs=rngs)
        case EfficientCapsNetConfig():
            return EfficientCapsNet(config, rngs=rngs)
        case BaselineConfig():
            return BaselineCNN(config, rngs=rngs)
    raise TypeError(f"config must be a configuration of a network, got {config!r}")


def create(preset: str, *, rngs: nnx.Rngs, **overrides: Any) -> Network:
    """Builds a network from a preset.

    Args:
      preset: one of :func:`presets`.
      rngs: random streams; uses ``params``.
      **overrides: fields of the configuration to replace, as in :func:`configure`.

    Returns:
      A Flax NNX module, such as :class:`CapsNet`.

    Raises:
      TypeError: ``rngs`` is not an ``nnx.Rngs``.
      ValueError: the preset or a field is unknown, or a value is invalid.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import models
      >>> from flax import nnx
      >>> network = models.create(
      ...     "small", rngs=nnx.Rngs(0), image_shape=(32, 32, 3), num_classes=5)
      >>> jax.eval_shape(network, jnp.zeros((1, 32, 32, 3))).scores.shape
      (1, 5)
    """
    return build(configure(preset, **overrides), rngs=rngs)
