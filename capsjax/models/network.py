"""What every network returns and how its sizes are checked (floor 4)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = ("float32", "bfloat16")


class Prediction(NamedTuple):
    """What a network says about images.

    Attributes:
      scores: one per class, float32, ``[..., J]``; the largest is the predicted class. Lengths of
        the class capsules for a capsule network, logits for a plain one.
      poses: class capsules, ``[..., J, D]``; None for a plain network.
      reconstruction: pixels in [0, 1], float32, ``[..., H, W, C]``; None without a decoder.
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
