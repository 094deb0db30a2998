"""Named networks."""

import dataclasses
from typing import Any

from flax import nnx

from capsjax.models.baseline import BaselineCNN, BaselineConfig
from capsjax.models.capsnet import CapsNet, CapsNetConfig
from capsjax.models.efficient import EfficientCapsNet, EfficientCapsNetConfig
from capsjax.models.matrix import MatrixCapsNet, MatrixCapsNetConfig

ModelConfig = CapsNetConfig | MatrixCapsNetConfig | EfficientCapsNetConfig | BaselineConfig
Network = CapsNet | MatrixCapsNet | EfficientCapsNet | BaselineCNN

_PAPER = CapsNetConfig()

_OFFICIAL = dataclasses.replace(
    _PAPER, primary_coupling=1 / 32, routing_bias=True, initialisation="official"
)
_CIFAR10 = dataclasses.replace(
    _OFFICIAL,
    image_shape=(24, 24, 3),
    primary_types=64,
    padding="SAME",
    leaky=True,
    decoder_features=(),
)

_PRESETS: dict[str, ModelConfig] = {
    # The formulas as printed: 8,215,568 parameters on MNIST.
    "paper": _PAPER,
    # The authors' code: biases, 1/32 coupling, its initialisers; 8,215,728 parameters on MNIST.
    "official": _OFFICIAL,
    # That code on CIFAR-10: 64 primary types, routing to "none of the above", no decoder.
    "cifar10": _CIFAR10,
    # The same on stereo pairs of toys.
    "smallnorb": dataclasses.replace(_CIFAR10, image_shape=(32, 32, 2), num_classes=5),
    # The small network that the paper trains on house numbers.
    "svhn": dataclasses.replace(
        _OFFICIAL,
        image_shape=(32, 32, 3),
        conv_features=64,
        primary_types=16,
        primary_features=6,
        class_features=8,
        decoder_features=(),
    ),
    # The same layers, cut down until two CPU cores train them in minutes: 1,051,344 parameters.
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
    # The convolutional network that the paper compares with: 35,445,522 parameters on MNIST.
    "baseline": BaselineConfig(),
    # Its small sibling, of about the size of the small capsule network: 1,059,146 parameters.
    "baseline_small": BaselineConfig(conv_features=(32, 64), pooling=2, dense_features=(320,)),
    # The one that the paper compares with on overlapping digits: 24.5 million on 36 x 36 pixels.
    "baseline_pairs": BaselineConfig(conv_features=(512, 256), pooling=2, dense_features=(1024,)),
    # Matrix capsules with EM routing, all layers of 32 as in the paper.
    "matrix_capsnet": MatrixCapsNetConfig(),
    # The small one of the same paper: A = 64, B = 8, C = D = 16.
    "matrix_capsnet_small": MatrixCapsNetConfig(
        conv_features=64, primary_types=8, capsule_types=(16, 16)
    ),
    # Self-attention routing: 161,824 parameters on MNIST.
    "efficient_capsnet": EfficientCapsNetConfig(),
}


def presets() -> tuple[str, ...]:
    """Names of the networks that :func:`create` builds.

    Example:
      >>> from capsjax import models
      >>> models.presets()[:3]
      ('paper', 'official', 'cifar10')
    """
    return tuple(_PRESETS)


def configure(preset: str, **overrides: Any) -> ModelConfig:
    """Returns the configuration of a preset, with some fields replaced.

    Args:
      preset: one of :func:`presets`.
      **overrides: fields of the preset's configuration.

    Returns:
      The configuration: :class:`CapsNetConfig`, or that of another network.

    Raises:
      ValueError: the preset, a field or a value is unknown.

    Example:
      >>> from capsjax import models
      >>> models.configure("paper", image_shape=(36, 36, 1)).num_primary
      3200
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {preset!r}")
    config = _PRESETS[preset]
    known = [field.name for field in dataclasses.fields(config)]
    for name in overrides:
        if name not in known:
            raise ValueError(f"preset {preset!r} has no field {name!r}, only {', '.join(known)}")
    return dataclasses.replace(config, **overrides)


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> Network:
    """Builds the network that a configuration describes."""
    match config:
        case CapsNetConfig():
            return CapsNet(config, rngs=rngs)
        case MatrixCapsNetConfig():
            return MatrixCapsNet(config, rngs=rngs)
        case EfficientCapsNetConfig():
            return EfficientCapsNet(config, rngs=rngs)
        case BaselineConfig():
            return BaselineCNN(config, rngs=rngs)


def create(preset: str, *, rngs: nnx.Rngs, **overrides: Any) -> Network:
    """Builds a network from a preset.

    Args:
      preset: one of :func:`presets`.
      rngs: random streams; uses ``params``.
      **overrides: fields of the preset's configuration, as in :func:`configure`.

    Returns:
      A Flax NNX module, such as :class:`CapsNet`.

    Raises:
      ValueError: the preset, a field or a value is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import models
      >>> from flax import nnx
      >>> network = models.create(
      ...     "small", rngs=nnx.Rngs(0), image_shape=(32, 32, 3), num_classes=5)
      >>> network(jnp.zeros((1, 32, 32, 3))).scores.shape
      (1, 5)
    """
    return build(configure(preset, **overrides), rngs=rngs)
