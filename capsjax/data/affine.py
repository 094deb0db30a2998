"""Random affine transformations of images, on the device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from capsjax.data.transforms import as_keys_and_images
from capsjax.ops._checks import as_integer, as_number


class AffineRanges(NamedTuple):
    """Ranges from which the parameters of an affine transformation are drawn uniformly.

    The defaults are the ranges of the affNIST data.

    Attributes:
      rotation: largest angle in degrees, in both directions.
      shear: largest horizontal shear, in both directions.
      least_scale: smallest scale factor; rows and columns are scaled independently.
      most_scale: largest scale factor.
    """

    rotation: float = 20.0
    shear: float = 0.2
    least_scale: float = 0.8
    most_scale: float = 1.2


def random_affine(
    keys: jax.Array, images: jax.Array, *, size: int, ranges: AffineRanges | None = None
) -> jax.Array:
    r"""Scales, shears and rotates each image, and places it at random in a larger image.

    .. math::
      A = \begin{pmatrix} \cos\phi & -\sin\phi \\ \sin\phi & \cos\phi \end{pmatrix}
          \begin{pmatrix} 1 & s \\ 0 & 1 \end{pmatrix}
          \begin{pmatrix} a & 0 \\ 0 & b \end{pmatrix}, \qquad q = A (p - c) + t

    for a pixel at :math:`p = (x, y)` in an image with centre c. The position t of the centre is
    drawn uniformly from those at which all pixels above zero stay inside; an image that is too
    large is centred. Values between pixels are interpolated linearly.

    Args:
      keys: one random key per image, ``[B]``.
      images: ``[B, H, W, C]``, uint8 or floating-point.
      size: rows and columns of the result.
      ranges: ranges of the parameters; those of affNIST when None.

    Returns:
      ``[B, size, size, C]`` of the same dtype; uint8 is rounded.

    Raises:
      ValueError: the images do not have four axes, there is not one key per image, `size` is not
        positive, or the ranges are empty.
      TypeError: `size` is not an integer, or the keys are not typed keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.data import random_affine
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> random_affine(keys, jnp.ones((2, 28, 28, 1)), size=40).shape
      (2, 40, 40, 1)

    Reference:
      Tieleman, *affNIST*, 2013, a data set.
    """
    keys, images = as_keys_and_images(keys, images)
    drawn = AffineRanges() if ranges is None else AffineRanges(*map(float, ranges))
    for name, value in drawn._asdict().items():
        as_number(name, value)
    if not 0 < drawn.least_scale <= drawn.most_scale:
        raise ValueError(
            "least_scale must be positive and at most most_scale, got"
            f" least_scale={drawn.least_scale} and most_scale={drawn.most_scale}"
        )
    return _transform(keys, images, size=as_integer("size", size), ranges=drawn)


# Compiled, so that a call from Python is one program and not dozens of small ones.
@functools.partial(jax.jit, static_argnames=("size", "ranges"))
def _transform(keys: jax.Array, images: jax.Array, *, size: int, ranges: AffineRanges) -> jax.Array:
    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        matrix_key, place_key = jax.random.split(key)
        matrix = _draw_matrix(matrix_key, ranges)
        return _warp(image, matrix, _draw_place(place_key, image, matrix, size), size)

    return jax.vmap(one)(keys, images)


def _draw_matrix(key: jax.Array, ranges: AffineRanges) -> jax.Array:
    """Draws the matrix A, which acts on columns (x, y)."""
    angle, shear, across, down = jax.random.uniform(
        key,
        (4,),
        jnp.float32,
        minval=jnp.array([-ranges.rotation, -ranges.shear, *[ranges.least_scale] * 2]),
        maxval=jnp.array([ranges.rotation, ranges.shear, *[ranges.most_scale] * 2]),
    )
    cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    rotation = jnp.array([[cos, -sin], [sin, cos]])
    shearing = jnp.array([[1.0, shear], [0.0, 1.0]])
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(rotation, shearing, precision=highest) * jnp.stack([across, down])[None]


def _centred(shape: tuple[int, ...]) -> jax.Array:
    """Coordinates (x, y) of the pixels relative to the centre, ``[2, H, W]``."""
    rows, columns = (jnp.arange(n) - (n - 1) / 2 for n in shape[:2])
    return jnp.stack(
        [jnp.broadcast_to(columns, shape[:2]), jnp.broadcast_to(rows[:, None], shape[:2])]
    )


def _product(matrix: jax.Array, points: jax.Array) -> jax.Array:
    # Written out, because TPUs would round the factors of a matrix product and shift pixels.
    return jnp.stack([row[0] * points[0] + row[1] * points[1] for row in matrix])


def _draw_place(key: jax.Array, image: jax.Array, matrix: jax.Array, size: int) -> jax.Array:
    """Draws the position (x, y) of the centre."""
    moved = _product(matrix, _centred(image.shape))
    inked = jnp.any(image > 0, axis=-1)
    least = jnp.min(moved, axis=(1, 2), where=inked, initial=jnp.inf)
    most = jnp.max(moved, axis=(1, 2), where=inked, initial=-jnp.inf)
    least, most = (jnp.where(jnp.any(inked), x, 0.0) for x in (least, most))
    low, high = -least, size - 1 - most
    middle = (low + high) / 2
    low, high = jnp.minimum(low, middle), jnp.maximum(high, middle)
    fits = -least <= size - 1 - most
    drawn = low + (high - low) * jax.random.uniform(key, (2,), jnp.float32)
    return jnp.where(fits, drawn, middle)


def _warp(image: jax.Array, matrix: jax.Array, place: jax.Array, size: int) -> jax.Array:
    rows, columns = jnp.meshgrid(jnp.arange(float(size)), jnp.arange(float(size)), indexing="ij")
    offsets = jnp.stack([columns - place[0], rows - place[1]])
    (a, b), (c, d) = matrix
    inverse = jnp.stack([jnp.stack([d, -b]), jnp.stack([-c, a])]) / (a * d - b * c)
    x, y = _product(inverse, offsets)
    height, width = image.shape[:2]
    coordinates = [y + (height - 1) / 2, x + (width - 1) / 2]

    def channel(plane: jax.Array) -> jax.Array:
        return map_coordinates(plane, coordinates, order=1, mode="constant", cval=0.0)

    warped = jax.vmap(channel, in_axes=2, out_axes=2)(image.astype(jnp.float32))
    if jnp.issubdtype(image.dtype, jnp.integer):
        warped = jnp.round(warped)
    return warped.astype(image.dtype)
