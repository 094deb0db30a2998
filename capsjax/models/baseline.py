"""The convolutional network that the paper compares with."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from capsjax.models.network import NetworkConfig, Prediction, check_build, check_images, make_conv


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig(NetworkConfig):
    """Sizes and options of a :class:`BaselineCNN`.

    Attributes:
      image_shape: rows, columns and channels of the images.
      num_classes: J, the number of classes.
      conv_features: channels of the convolutions, one entry each.
      conv_kernel: rows and columns of their kernels; stride 1, SAME padding.
      pooling: rows and columns over which the maximum is taken after each convolution; 1 for none.
      dense_features: widths of the hidden fully connected layers.
      dropout_rate: share of the last hidden layer that is dropped in training.
      dtype: dtype of the computation, ``"float32"`` or ``"bfloat16"``; parameters are float32.
    """

    conv_features: tuple[int, ...] = (256, 256, 128)
    conv_kernel: int = 5
    pooling: int = 1
    dense_features: tuple[int, ...] = (328, 192)
    dropout_rate: float = 0.5

    def __post_init__(self) -> None:
        """Checks the fields, so that a wrong one is named before anything is built."""
        super().__post_init__()
        for name in ("conv_features", "dense_features"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one layer, got {getattr(self, name)}")
        if min(self.grid) < 1:
            raise ValueError(
                f"image_shape {self.image_shape} is too small for {len(self.conv_features)}"
                f" poolings of {self.pooling}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns that the convolutions leave."""
        rows, columns = (n // self.pooling ** len(self.conv_features) for n in self.image_shape[:2])
        return rows, columns


class BaselineCNN(nnx.Module):
    """Three convolutions, two hidden layers, dropout, class logits: 35.4 M parameters on MNIST.

    The paper gives 5 × 5 kernels with stride 1 and its number of parameters; SAME padding without
    pooling is what makes them add up.

    Args:
      config: sizes and options.
      rngs: random streams; uses ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import models
      >>> from flax import nnx
      >>> network = models.create("baseline", rngs=nnx.Rngs(0), conv_features=(8,))
      >>> network(jnp.zeros((2, 28, 28, 1))).scores.shape
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
          target: unused; there is no decoder.
          keys: one random key per image, ``[...]``: dropout, whose draws then depend on the image
            alone and not on how a batch is split over devices. None: no dropout.

        Returns:
          :class:`capsjax.models.Prediction`; the scores are logits.

        Raises:
          ValueError: the images have the wrong shape.
        """
        del target
        x = check_images(images, self.config.image_shape)
        for conv in self.convs:
            x = _pool(jax.nn.relu(conv(x)), self.config.pooling)
        x = jax.lax.collapse(x, -3)
        for dense in self.hidden:
            x = jax.nn.relu(dense(x))
        if keys is not None:
            x = _dropout(keys, x, self.config.dropout_rate)
        return Prediction(self.logits(x).astype(jnp.float32))


def _pool(x: jax.Array, window: int) -> jax.Array:
    """Maxima over windows that do not overlap; rows and columns that fill none are left out."""
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
