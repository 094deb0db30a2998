"""The convolutional network that the paper compares with."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from capsjax.models.network import NetworkConfig, Prediction, check_build, check_images
from capsjax.nn._convolution import make_conv
from capsjax.ops._checks import check_key
from capsjax.ops.relu import relu


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig(NetworkConfig):
    """Sizes and options of a :class:`BaselineCNN`.

    Attributes:
      image_shape: rows, columns and channels of the images.
      num_classes: J, the number of classes.
      conv_features: channels of each convolution.
      conv_kernel: kernel size of the convolutions; stride 1, SAME padding.
      pooling: window and stride of the max pooling after each convolution; 1 for none.
      dense_features: widths of the hidden fully connected layers.
      dropout_rate: dropout rate of the last hidden layer.
      dtype: dtype of the computation, ``"float32"`` or ``"bfloat16"``; parameters are float32.
    """

    conv_features: tuple[int, ...] = (256, 256, 128)
    conv_kernel: int = 5
    pooling: int = 1
    dense_features: tuple[int, ...] = (328, 192)
    dropout_rate: float = 0.5

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        for name in ("conv_features", "dense_features"):
            if not getattr(self, name):
                raise ValueError(f"{name} must have at least one entry, got {getattr(self, name)}")
        if min(self.grid) < 1:
            raise ValueError(
                f"image_shape {self.image_shape} is too small for {len(self.conv_features)}"
                f" poolings of {self.pooling}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last feature maps."""
        rows, columns = (n // self.pooling ** len(self.conv_features) for n in self.image_shape[:2])
        return rows, columns


class BaselineCNN(nnx.Module):
    """The paper's baseline: three convolutions and two hidden layers with dropout.

    It has 35.4 million parameters on MNIST. The paper gives 5 × 5 kernels, stride 1 and the number
    of parameters, which imply SAME padding without pooling.

    Args:
      config: sizes and options.
      rngs: random streams; uses ``params``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import models
      >>> from flax import nnx
      >>> network = models.create("baseline_small", rngs=nnx.Rngs(0), conv_features=(8,))
      >>> jax.jit(network)(jnp.zeros((2, 28, 28, 1))).scores.shape
      (2, 10)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 5.
    """

    def __init__(self, config: BaselineConfig, *, rngs: nnx.Rngs):
        check_build(config, BaselineConfig, rngs)
        self.config = config
        dtype = jnp.dtype(config.dtype)
        (rows, columns), channels = config.grid, config.image_shape[2]
        self.convs = nnx.List(
            [
                make_conv(a, b, config.conv_kernel, padding="SAME", dtype=dtype, rngs=rngs)
                for a, b in itertools.pairwise((channels, *config.conv_features))
            ]
        )
        flat = rows * columns * config.conv_features[-1]
        self.hidden = nnx.List(
            [
                nnx.Linear(a, b, dtype=dtype, rngs=rngs)
                for a, b in itertools.pairwise((flat, *config.dense_features))
            ]
        )
        self.logits = nnx.Linear(
            config.dense_features[-1], config.num_classes, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, images: jax.Array, *, target: jax.Array | None = None, keys: jax.Array | None = None
    ) -> Prediction:
        """Predicts the classes of images.

        Args:
          images: pixels in [0, 1], ``[..., H, W, C]``.
          target: unused.
          keys: one random key per image, ``[...]``, for dropout that does not depend on how a batch
            is split over devices; no dropout when None.

        Returns:
          :class:`capsjax.models.Prediction`, whose scores are logits.

        Raises:
          TypeError: the images are not floating point, or ``keys`` are not random keys.
          ValueError: ``images`` or ``keys`` have the wrong shape.
        """
        del target
        x = check_images(images, self.config.image_shape)
        if keys is not None:
            _check_keys(keys, x.shape[:-3])
        for conv in self.convs:
            x = _pool(relu(conv(x)), self.config.pooling)
        x = jax.lax.collapse(x, -3)
        for dense in self.hidden:
            x = relu(dense(x))
        if keys is not None:
            x = _dropout(keys, x, self.config.dropout_rate)
        return Prediction(self.logits(x).astype(jnp.float32))


def _check_keys(keys: Any, shape: tuple[int, ...]) -> None:
    check_key("keys", keys)
    if keys.shape != shape:
        raise ValueError(f"keys must have shape [...] = {shape}, got shape {keys.shape}")


def _pool(x: jax.Array, window: int) -> jax.Array:
    """Max pooling over disjoint windows; incomplete windows are dropped."""
    if window == 1:
        return x
    *leading, rows, columns, features = x.shape
    rows, columns = rows // window, columns // window
    x = x[..., : rows * window, : columns * window, :]
    x = x.reshape(*leading, rows, window, columns, window, features)
    return jnp.max(x, axis=(-4, -2))


def _dropout(keys: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    def kept(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 1 - rate, x.shape[-1:])

    mask = jax.vmap(kept)(keys.reshape(-1)).reshape(x.shape)
    return jnp.where(mask, x / (1 - rate), 0)
