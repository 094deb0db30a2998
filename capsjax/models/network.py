"""What every network returns and how its sizes are checked."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from capsjax.nn import Decoder
from capsjax.ops import length
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


def check_positive(config: Any, *names: str) -> None:
    """Raises a ValueError unless these fields hold positive integers (or tuples of them)."""
    for name in names:
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        if isinstance(value, list) or any(
            isinstance(v, bool) or not isinstance(v, int | np.integer) or v < 1 for v in items
        ):
            kind = "a tuple of positive integers" if isinstance(value, list) else "positive"
            raise ValueError(f"{name} must be {kind}, got {value!r}")
    if not isinstance(config.image_shape, tuple) or len(config.image_shape) != 3:
        raise ValueError(
            f"image_shape must be (rows, columns, channels), got {config.image_shape!r}"
        )
    if config.dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {config.dtype!r}")


def grid_after(grid: tuple[int, int], layers: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns that convolutions (kernel, stride) without padding leave; 0, 0 for none."""
    rows, columns = grid
    for kernel, stride in layers:
        rows, columns = ((size - kernel) // stride + 1 for size in (rows, columns))
        if min(rows, columns) < 1:
            return 0, 0
    return rows, columns


def routing_options(config: Any) -> dict[str, Any]:
    """The options of the routing function that a configuration's fields give."""
    options = {}
    if algorithm(config.routing).iterates:
        options["num_iterations"] = config.num_iterations
    # Only where they are on: algorithms that do not know them are content without.
    options.update(
        {name: True for name in ("leaky", "stop_gradient") if getattr(config, name, False)}
    )
    return options


def check_routing(config: Any) -> None:
    """Raises a ValueError unless there is such a routing algorithm, with these options."""
    use_bias = getattr(config, "routing_bias", False)
    algorithm(config.routing).check_options(routing_options(config), use_bias=use_bias)
    check_implementation(getattr(config, "implementation", None), config.routing)


def make_decoder(
    config: Any, features: int, *, dtype: Dtype, rngs: nnx.Rngs, **initialisers: Any
) -> Decoder | None:
    """The decoder of class capsules with so many dimensions, if the configuration has one."""
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


def predict(
    config: Any, routed: Routed, decoder: Decoder | None, target: jax.Array | None
) -> Prediction:
    """What class capsules say: activations as scores, and the target's reconstruction."""
    if algorithm(config.routing).squash is not None:
        # Again in float32: what has been rounded to bfloat16 leaves ties.
        scores = length(routed.poses.astype(jnp.float32))
    else:
        scores = routed.activations.astype(jnp.float32)
    if decoder is None:
        return Prediction(scores, routed.poses)
    if target is None:
        target = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
    poses = routed.poses
    if target.ndim > scores.ndim:  # several drawings of each image
        poses = jnp.broadcast_to(poses[..., None, :, :], (*target.shape, poses.shape[-1]))
    return Prediction(scores, routed.poses, decoder(poses, target).astype(jnp.float32))
