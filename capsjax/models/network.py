"""What every network returns and how its sizes are checked (floor 4)."""

from typing import Any, NamedTuple

import jax


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
    if images.ndim < 3 or images.shape[-3:] != tuple(image_shape):
        raise ValueError(
            f"images must have shape [..., H, W, C] = [..., {', '.join(map(str, image_shape))}],"
            f" got shape {images.shape}"
        )


def check_positive(config: Any, *names: str) -> None:
    """Raises a ValueError unless these fields hold positive integers (or sequences of them)."""
    for name in names:
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(v, int) and v > 0 for v in items):
            raise ValueError(f"{name} must be positive, got {value!r}")
