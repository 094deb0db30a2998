"""What all networks share: configurations that check themselves, capsules to predictions."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from capsjax.nn import Decoder
from capsjax.ops import conv_general_dilated, length
from capsjax.routing import Routed, algorithm
from capsjax.routing.fused import check_implementation

_DTYPES = ("float32", "bfloat16")


class Prediction(NamedTuple):
    """What a network says about images.

    Attributes:
      scores: one per class, float32, ``[..., J]``; the largest is the predicted class. Lengths of
        the class capsules for a capsule network, logits for a plain one.
      poses: class capsules, ``[..., J, D]``; None for a plain network.
      reconstruction: pixels in [0, 1], float32, ``[..., H, W, C]``; one for each of the target's
        masks where these are several; None without a decoder.
    """

    scores: jax.Array
    poses: jax.Array | None = None
    reconstruction: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Fields of every network's configuration; see :class:`capsjax.models.CapsNetConfig`."""

    image_shape: tuple[int, int, int] = (28, 28, 1)
    num_classes: int = 10
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the fields, so that a wrong one is named before anything is built.

        All integers are sizes, and positive.
        """
        for field in dataclasses.fields(self):
            _check_sizes(field, getattr(self, field.name))
        if len(self.image_shape) != 3:
            raise ValueError(
                f"image_shape must be (rows, columns, channels), got {self.image_shape!r}"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")


def _check_sizes(field: "dataclasses.Field[Any]", value: Any) -> None:
    """Raises a ValueError unless a field of integers holds positive ones."""
    kinds = {int: False, int | None: False}
    is_tuple = getattr(field.type, "__origin__", None) is tuple
    if not is_tuple and (field.type not in kinds or (value is None and field.default is None)):
        return
    items = value if isinstance(value, tuple) else (value,)
    if isinstance(value, list) or any(
        isinstance(v, bool) or not isinstance(v, int | np.integer) or v < 1 for v in items
    ):
        kind = "a tuple of positive integers" if isinstance(value, list) else "positive"
        raise ValueError(f"{field.name} must be {kind}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapsuleNetworkConfig(NetworkConfig):
    """Fields of every capsule network's configuration."""

    routing: str = "dynamic"
    num_iterations: int = 3
    decoder_features: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the fields, also that the routing algorithm takes the options."""
        super().__post_init__()
        use_bias = getattr(self, "routing_bias", False)
        algorithm(self.routing).check_options(self.routing_options, use_bias=use_bias)
        check_implementation(getattr(self, "implementation", None), self.routing)

    @property
    def routing_options(self) -> dict[str, Any]:
        """The options of the routing function that the fields give."""
        iterates = algorithm(self.routing).iterates
        options: dict[str, Any] = {"num_iterations": self.num_iterations} if iterates else {}
        # Only where they are on: an algorithm that does not know them can do without.
        switches = ("leaky", "stop_gradient")
        return options | {name: True for name in switches if getattr(self, name, False)}


class CapsuleNetwork(nnx.Module):
    """A network that ends in class capsules and may have a decoder.

    Attributes:
      config: sizes and options.
      decoder: reconstructs the images, or None.
    """

    config: CapsuleNetworkConfig
    decoder: Decoder | None

    def class_capsules(self, images: jax.Array, *, implementation: Any = None) -> Routed:
        """Class capsules of images whose shape has been checked."""
        raise NotImplementedError

    def route(self, images: jax.Array) -> Routed:
        """Class capsules of images ``[..., H, W, C]`` in [0, 1], with their coupling."""
        check_images(images, self.config.image_shape)
        # By the implementation that stores the votes: no other one returns the coupling.
        return self.class_capsules(images, implementation="reference")

    def __call__(
        self, images: jax.Array, *, target: jax.Array | None = None, keys: jax.Array | None = None
    ) -> Prediction:
        """Predicts the classes of images, and reconstructs them if there is a decoder.

        Args:
          images: pixels in [0, 1], ``[..., H, W, C]``.
          target: the classes that the decoder sees, one-hot or multi-hot ``[..., J]``, in training
            the true ones; ``[..., S, J]`` for S reconstructions of each image. None: the class
            with the largest score.
          keys: unused; nothing is drawn at random.

        Returns:
          :class:`capsjax.models.Prediction`; the scores are the class capsules' activations.

        Raises:
          ValueError: the images or the target have the wrong shape.
        """
        del keys
        check_images(images, self.config.image_shape)
        routed = self.class_capsules(images)
        if algorithm(self.config.routing).squash is not None:
            # Again in float32: what has been rounded to bfloat16 leaves ties.
            scores = length(routed.poses.astype(jnp.float32))
        else:
            scores = routed.activations.astype(jnp.float32)
        if self.decoder is None:
            return Prediction(scores, routed.poses)
        if target is None:
            target = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
        poses = routed.poses
        if target.ndim > scores.ndim:
            poses = jnp.broadcast_to(poses[..., None, :, :], (*target.shape, poses.shape[-1]))
        reconstruction = self.decoder(poses, target).astype(jnp.float32)
        return Prediction(scores, routed.poses, reconstruction)


def check_images(images: jax.Array, image_shape: tuple[int, int, int]) -> None:
    """Raises a ValueError unless `images` are ``[..., *image_shape]``."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be floating-point pixels in [0, 1], got dtype {images.dtype}; scale uint8"
            " images with capsjax.data.scale_pixels"
        )
    if images.ndim < 3 or images.shape[-3:] != tuple(image_shape):
        raise ValueError(
            f"images must have shape [..., H, W, C] = [..., {', '.join(map(str, image_shape))}],"
            f" got shape {images.shape}"
        )


def grid_after(grid: tuple[int, int], layers: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns that convolutions (kernel, stride) without padding leave; 0, 0 for none."""
    rows, columns = grid
    for kernel, stride in layers:
        rows, columns = ((size - kernel) // stride + 1 for size in (rows, columns))
        if min(rows, columns) < 1:
            return 0, 0
    return rows, columns


def make_conv(
    in_features: int,
    out_features: int,
    kernel: int | tuple[int, int],
    strides: int = 1,
    *,
    dtype: Dtype,
    rngs: nnx.Rngs,
    padding: str = "VALID",
    **options: Any,
) -> nnx.Conv:
    """A convolution of images that every platform can differentiate at speed."""
    return nnx.Conv(
        in_features,
        out_features,
        (kernel, kernel) if isinstance(kernel, int) else kernel,
        strides,
        padding=padding,
        dtype=dtype,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
        **options,
    )


def make_decoder(
    config: CapsuleNetworkConfig,
    features: int,
    *,
    dtype: Dtype,
    rngs: nnx.Rngs,
    **initialisers: Any,
) -> Decoder | None:
    """The decoder of class capsules of so many dimensions, if the configuration has one."""
    if not config.decoder_features:
        none: None = nnx.data(None)
        return none
    return Decoder(
        config.num_classes,
        features,
        config.image_shape,
        hidden_features=config.decoder_features,
        dtype=dtype,
        rngs=rngs,
        **initialisers,
    )
