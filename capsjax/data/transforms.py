"""Transformations on the device: order of examples, flip, shift, placement, crop, scale."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from capsjax.ops._checks import (
    as_array,
    as_integer,
    as_number,
    check_choice,
    check_key,
    is_sharded,
)

Fill = float | Literal["edge"]
Flip = Literal["horizontal", "vertical", "both"]


def epoch_order(key: jax.Array, num_examples: int) -> jax.Array:
    """Returns a random order of the examples of an epoch, int32 ``[num_examples]``.

    Raises:
      TypeError: the key is not a typed key, or `num_examples` is not an integer.
      ValueError: `num_examples` is negative.

    Example:
      >>> import jax
      >>> from capsjax.data import epoch_order
      >>> sorted(epoch_order(jax.random.key(0), 5).tolist())
      [0, 1, 2, 3, 4]
    """
    check_key("key", key)
    return _epoch_order(key, as_integer("num_examples", num_examples, least=0))


@functools.partial(jax.jit, static_argnums=1)
def _epoch_order(key: jax.Array, num_examples: int) -> jax.Array:
    return jax.random.permutation(key, num_examples).astype(jnp.int32)


def scale_pixels(images: jax.Array) -> jax.Array:
    """Converts images to float32 in [0, 1]; floating-point images must already be in this range.

    Raises:
      TypeError: the images are not uint8, uint16 or floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.data import scale_pixels
      >>> print(scale_pixels(jnp.array([0, 51, 255], jnp.uint8)))
      [0.  0.2 1. ]
    """
    images = as_array("images", images)
    white = white_of(images.dtype)
    pixels = images.astype(jnp.float32)
    return pixels if white == 1 else pixels / white


def white_of(dtype: DTypeLike) -> int:
    """Returns the value of a white pixel: 255 in uint8, 65535 in uint16, 1 in floating point.

    Raises:
      TypeError: images cannot have this dtype.

    Example:
      >>> from capsjax.data import white_of
      >>> white_of("uint16")
      65535
    """
    dtype = np.dtype(dtype)
    if dtype in (np.uint8, np.uint16):
        return int(np.iinfo(dtype).max)
    if jnp.issubdtype(dtype, jnp.floating):
        return 1
    raise TypeError(f"images must be uint8, uint16 or floating-point, got {dtype}")


def random_flip(keys: jax.Array, images: jax.Array, *, direction: Flip) -> jax.Array:
    """Mirrors each image with probability 1/2.

    Args:
      keys: one random key per example, ``[B]``.
      images: ``[B, ..., H, W, C]``, any dtype; if an example has several images, each is mirrored
        independently.
      direction: ``"horizontal"`` exchanges left and right, ``"vertical"`` top and bottom, and
        ``"both"`` does each independently.

    Returns:
      The images, with the same shape and dtype.

    Raises:
      ValueError: the direction is unknown, the images have too few axes, or there is not one key
        per example.
      TypeError: the keys are not typed keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.data import random_flip
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> random_flip(keys, jnp.ones((2, 28, 28, 1)), direction="horizontal").shape
      (2, 28, 28, 1)
    """
    check_choice("direction", direction, get_args(Flip))
    keys, images = as_keys_and_images(keys, images, several=True)
    axes = {"vertical": (0,), "horizontal": (1,), "both": (0, 1)}
    return _flip(keys, images, axes=axes[direction])


def random_shift(
    keys: jax.Array, images: jax.Array, *, max_shift: int, fill: Fill = 0
) -> jax.Array:
    """Shifts each image by up to `max_shift` pixels along both axes.

    All whole-pixel shifts are equally likely: 25 if `max_shift` is 2. The shift of an image depends
    only on its key, not on the rest of the batch.

    Args:
      keys: one random key per image, ``[B]``.
      images: ``[B, H, W, C]``, any dtype.
      max_shift: largest shift in pixels, at least 0.
      fill: value of uncovered pixels, of the images' dtype, or ``"edge"`` to repeat the border.

    Returns:
      The shifted images, with the same shape and dtype.

    Raises:
      ValueError: `max_shift` is negative, the images do not have four axes, `fill` is no value that
        their pixels can have, or there is not one key per image.
      TypeError: `max_shift` is not an integer, or the keys are not typed keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.data import random_shift
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> random_shift(keys, jnp.ones((2, 28, 28, 1)), max_shift=2).shape
      (2, 28, 28, 1)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 5.
    """
    margin = as_integer("max_shift", max_shift, least=0)
    keys, images = as_keys_and_images(keys, images)
    _check_fill(fill, images.dtype)
    if margin == 0:
        return images
    rows, columns = images.shape[1:3]
    return _cut(keys, images, margins=(margin, margin), sizes=(rows, columns), fill=fill)


def random_placement(keys: jax.Array, images: jax.Array, *, size: int) -> jax.Array:
    """Places each image at a random position of a larger image of zeros.

    All positions are equally likely.

    Args:
      keys: one random key per image, ``[B]``.
      images: ``[B, H, W, C]``, any dtype.
      size: rows and columns of the result, at least those of the images.

    Returns:
      ``[B, size, size, C]`` of the same dtype.

    Raises:
      ValueError: `size` is too small, the images do not have four axes, or there is not one key per
        image.
      TypeError: `size` is not an integer, or the keys are not typed keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.data import random_placement
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> random_placement(keys, jnp.ones((2, 28, 28, 1)), size=40).shape
      (2, 40, 40, 1)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 5.1.
    """
    keys, images = as_keys_and_images(keys, images)
    size = as_integer("size", size, least=0)
    rows, columns = (size - n for n in images.shape[1:3])
    if min(rows, columns) < 0:
        raise ValueError(
            f"size must be at least that of the images, {images.shape[1:3]}, got {size}"
        )
    return _cut(keys, images, margins=(rows, columns), sizes=(size, size))


def crop_images(images: jax.Array, size: int, keys: jax.Array | None = None) -> jax.Array:
    """Crops each image to a square, at its centre or at a random position.

    All random positions are equally likely.

    Args:
      images: ``[B, H, W, C]``, any dtype.
      size: rows and columns of the result, at most those of the images.
      keys: one random key per image, ``[B]``; the images are cropped at their centres when None.

    Returns:
      ``[B, size, size, C]`` of the same dtype.

    Raises:
      ValueError: `size` is too large, the images do not have four axes, or there is not one key per
        image.
      TypeError: `size` is not an integer, or the keys are not typed keys.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.data import crop_images
      >>> print(crop_images(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0, ..., 0])
      [[ 5  6]
       [ 9 10]]
    """
    if keys is None:
        images = as_images(images)
    else:
        keys, images = as_keys_and_images(keys, images)
    size = as_integer("size", size, least=0)
    room = [n - size for n in images.shape[1:3]]
    if min(room) < 0:
        raise ValueError(
            f"size must be at most that of the images, {images.shape[1:3]}, got {size}"
        )
    if keys is None:
        rows, columns = (slice(n // 2, n // 2 + size) for n in room)
        return images[:, rows, columns]
    return _cut(keys, images, margins=(0, 0), sizes=(size, size))


def split_each(keys: jax.Array, number: int = 2) -> list[jax.Array]:
    """Splits every key of ``[B]``, and returns `number` arrays ``[B]``."""
    parts = jax.vmap(lambda key: jax.random.split(key, number))(keys)
    # XLA computes slices in fewer operations than a transpose.
    return [parts[:, n] for n in range(number)]


def as_images(images: Any, *, several: bool = False) -> jax.Array:
    """Returns images ``[B, H, W, C]`` as an array; `several` allows further axes after B."""
    images = as_array("images", images)
    if images.ndim < 4 or (images.ndim > 4 and not several):
        axes = "[B, ..., H, W, C]" if several else "[B, H, W, C]"
        raise ValueError(f"images must have shape {axes}, got shape {images.shape}")
    return images


def as_keys_and_images(
    keys: Any, images: Any, *, several: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns one key per example, divided among devices as the images are, and the images."""
    images = as_images(images, several=several)
    check_key("keys", keys)
    if keys.shape != images.shape[:1]:
        what = "example" if several else "image"
        raise ValueError(
            f"keys must have one key per {what}, shape {images.shape[:1]}, got shape {keys.shape}"
        )
    if is_sharded(keys, images):
        batch = jax.typeof(images).sharding.spec[0]
        keys = jax.sharding.reshard(keys, jax.sharding.PartitionSpec(batch))
    return keys, images


def _check_fill(fill: Any, dtype: np.dtype) -> None:
    """Raises unless pixels can have the value."""
    if isinstance(fill, str):
        check_choice("fill", fill, ["edge"])
        return
    if isinstance(fill, jax.Array | np.ndarray):
        raise TypeError(f"fill must be a number or 'edge', got an array of dtype {fill.dtype}")
    as_number("fill", fill)
    if np.dtype(dtype).kind not in "iu":
        return
    if not np.iinfo(dtype).min <= fill <= np.iinfo(dtype).max:
        raise ValueError(f"fill must be a value of images of dtype {dtype}, got {fill}")
    if fill != int(fill):
        raise ValueError(f"fill must be an integer for images of dtype {dtype}, got {fill}")


# Compiled, so that a call from Python is one program and not dozens of small ones.
@functools.partial(jax.jit, static_argnames="axes")
def _flip(keys: jax.Array, images: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    """Mirrors each image along each axis of rows, 0, and columns, 1, with probability 1/2."""
    shape = (2, *images.shape[1:-3])
    drawn = jax.vmap(lambda key: jax.random.bernoulli(key, shape=shape))(keys)
    for axis in axes:
        mirrored = drawn[:, axis, ..., None, None, None]
        images = jnp.where(mirrored, jnp.flip(images, axis - 3), images)
    return images


@functools.partial(jax.jit, static_argnames=("margins", "sizes", "fill"))
def _cut(
    keys: jax.Array,
    images: jax.Array,
    *,
    margins: tuple[int, int],
    sizes: tuple[int, int],
    fill: Fill = 0,
) -> jax.Array:
    """Pads rows and columns and slices so many of each at a random offset."""
    room = [
        n + 2 * margin - size
        for n, margin, size in zip(images.shape[1:3], margins, sizes, strict=True)
    ]
    most = jnp.array(room, jnp.int32) + 1
    # With their dtype given, numbers do not depend on jax_enable_x64.
    offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, most, jnp.int32))(keys)
    for axis in (1, 2):
        images = _slice(
            images, offsets[:, axis - 1], margins[axis - 1], sizes[axis - 1], axis, fill
        )
    return images


def _slice(
    images: jax.Array, offsets: jax.Array, margin: int, size: int, axis: int, fill: Fill
) -> jax.Array:
    """Pads an axis and slices `size` positions from each image's offset."""

    def cut(images: jax.Array, offsets: jax.Array, axis: int = axis) -> jax.Array:
        padding = [(0, 0)] * images.ndim
        padding[axis] = (margin, margin)
        if fill == "edge":
            padded = jnp.pad(images, padding, mode="edge")
        else:
            padded = jnp.pad(images, padding, constant_values=fill)
        # Selects among all slices: slicing each image at its offset would be a loop on TPUs.
        shifted = [
            jax.lax.slice_in_dim(padded, offset, offset + size, axis=axis)
            for offset in range(padded.shape[axis] - size + 1)
        ]
        return jax.lax.select_n(jnp.broadcast_to(offsets, shifted[0].shape), *shifted)

    def cut_along_lanes(images: jax.Array, offsets: jax.Array) -> jax.Array:
        return jnp.moveaxis(cut(jnp.moveaxis(images, 0, -1), offsets.reshape(-1), axis - 1), -1, 0)

    sliced: jax.Array = jax.lax.platform_dependent(
        images, offsets[:, None, None, None], tpu=cut_along_lanes, default=cut
    )
    return sliced
