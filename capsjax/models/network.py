"""Base classes of networks and their configurations."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from capsjax.nn import Decoder
from capsjax.nn._checks import check_rngs
from capsjax.ops import length
from capsjax.ops._checks import as_array, as_integer, as_integers, as_number, check_flags
from capsjax.routing import Routed, algorithm
from capsjax.routing.fused import check_implementation

_DTYPES = ("float32", "bfloat16")


class Prediction(NamedTuple):
    """The output of a network.

    Attributes:
      scores: class scores, float32, ``[..., J]``: activations of the class capsules for a capsule
        network, logits for a plain network. The predicted class has the largest score.
      poses: class capsules, ``[..., J, D]``; None for a plain network.
      reconstruction: pixels in [0, 1], float32, ``[..., H, W, C]``, or ``[..., S, H, W, C]`` for a
        target ``[..., S, J]``; None without a decoder.
    """

    scores: jax.Array
    poses: jax.Array | None = None
    reconstruction: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Fields common to all configurations; see :class:`capsjax.models.CapsNetConfig`."""

    image_shape: tuple[int, int, int] = (28, 28, 1)
    num_classes: int = 10
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the fields; all integers must be positive."""
        for field in dataclasses.fields(self):
            try:
                _check_field(field, getattr(self, field.name))
            except TypeError as error:
                raise ValueError(error) from None
        if len(self.image_shape) != 3:
            raise ValueError(
                f"image_shape must be (rows, columns, channels), got {self.image_shape!r}"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")


def _check_field(field: "dataclasses.Field[Any]", value: Any) -> None:
    """Raises unless integers are positive, numbers are finite, and switches are bools."""
    name, kind = field.name, field.type
    if getattr(kind, "__origin__", None) is tuple:
        if not isinstance(value, tuple):
            raise TypeError(f"{name} must be a tuple of positive integers, got {value!r}")
        as_integers(name, value)
    elif kind is int or (kind == int | None and value is not None):
        as_integer(name, value)
    elif kind is float:
        as_number(name, value)
    elif kind is bool:
        check_flags(**{name: value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapsuleNetworkConfig(NetworkConfig):
    """Fields common to the configurations of capsule networks."""

    routing: str = "dynamic"
    num_iterations: int = 3
    decoder_features: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the fields, and that the routing algorithm has the options."""
        super().__post_init__()
        use_bias = getattr(self, "routing_bias", False)
        algorithm(self.routing).check_options(self.routing_options, use_bias=use_bias)
        check_implementation(getattr(self, "implementation", None), self.routing)

    @property
    def routing_options(self) -> dict[str, Any]:
        """Options of the routing function, from the fields."""
        iterates = algorithm(self.routing).iterates
        options: dict[str, Any] = {"num_iterations": self.num_iterations} if iterates else {}
        # Only if they are on: not every algorithm has these options.
        switches = ("leaky", "stop_gradient")
        return options | {name: True for name in switches if getattr(self, name, False)}


def check_build(config: Any, kind: type[NetworkConfig], rngs: Any) -> None:
    """Raises a TypeError unless these are the arguments of a network with such a configuration."""
    if not isinstance(config, kind):
        raise TypeError(f"config must be of type {kind.__name__}, got {config!r}")
    check_rngs(rngs)


class CapsuleNetwork(nnx.Module):
    """A network with class capsules and an optional decoder.

    Attributes:
      config: sizes and options.
      decoder: reconstructs images from class capsules, or None.
    """

    config: CapsuleNetworkConfig
    decoder: Decoder | None

    def class_capsules(self, images: jax.Array, *, implementation: Any = None) -> Routed:
        """Computes the class capsules of images whose shape has been checked."""
        raise NotImplementedError

    def route(self, images: jax.Array) -> Routed:
        """Computes class capsules and coupling of images ``[..., H, W, C]`` in [0, 1]."""
        images = check_images(images, self.config.image_shape)
        # Only the implementation that stores the votes returns the coupling.
        return self.class_capsules(images, implementation="reference")

    def __call__(
        self, images: jax.Array, *, target: jax.Array | None = None, keys: jax.Array | None = None
    ) -> Prediction:
        """Predicts the classes of images, and reconstructs them if there is a decoder.

        Args:
          images: pixels in [0, 1], ``[..., H, W, C]``.
          target: classes to reconstruct, one-hot or multi-hot ``[..., J]``: in training the true
            ones. ``[..., S, J]`` gives S reconstructions of each image. The class with the largest
            score when None.
          keys: unused.

        Returns:
          :class:`capsjax.models.Prediction`, whose scores are the class capsules' activations.

        Raises:
          TypeError: the images are not floating point.
          ValueError: ``images`` or ``target`` has the wrong shape.
        """
        del keys
        images = check_images(images, self.config.image_shape)
        routed = self.class_capsules(images)
        if algorithm(self.config.routing).squash is not None:
            # Recomputed in float32: activations rounded to bfloat16 would have ties.
            scores = length(routed.poses.astype(jnp.float32))
        else:
            scores = routed.activations.astype(jnp.float32)
        if self.decoder is None:
            return Prediction(scores, routed.poses)
        if target is None:
            target = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
        target = as_array("target", target)
        several = target.shape[scores.ndim - 1 : -1][:1]
        if target.shape != (*scores.shape[:-1], *several, scores.shape[-1]):
            raise ValueError(
                f"target must be one-hot or multi-hot, [..., J] = {scores.shape} or [..., S, J],"
                f" got shape {target.shape}; for class numbers use jax.nn.one_hot"
            )
        poses = routed.poses
        if target.ndim > scores.ndim:
            poses = jnp.broadcast_to(poses[..., None, :, :], (*target.shape, poses.shape[-1]))
        reconstruction = self.decoder(poses, target).astype(jnp.float32)
        return Prediction(scores, routed.poses, reconstruction)


def check_images(images: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
    """Returns `images` as an array, or raises unless they are ``[..., *image_shape]``."""
    images = as_array("images", images)
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
    return images


def grid_after(grid: tuple[int, int], layers: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns after unpadded convolutions (kernel, stride); (0, 0) if none are left."""
    rows, columns = grid
    for kernel, stride in layers:
        rows, columns = ((size - kernel) // stride + 1 for size in (rows, columns))
        if min(rows, columns) < 1:
            return 0, 0
    return rows, columns


def make_decoder(
    config: CapsuleNetworkConfig,
    features: int,
    *,
    dtype: Dtype,
    rngs: nnx.Rngs,
    **initialisers: Any,
) -> Decoder | None:
    """Makes the decoder, or returns None if the configuration has none."""
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
