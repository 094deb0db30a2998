"""Augmentation: what is fed to the network and which targets it is trained on.

A data set holds images; a task makes samples from them on the device: shifted, placed on a larger
canvas, distorted, cropped, or two in one. Samples are never stored.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from capsjax.data.affine import random_affine
from capsjax.data.transforms import (
    Fill,
    crop_images,
    random_placement,
    random_shift,
    scale_pixels,
    split_each,
    white_of,
)
from capsjax.ops._checks import as_integer, as_number


class Batch(NamedTuple):
    """Images and labels on the devices: a batch, or a whole split.

    Attributes:
      images: uint8, uint16 or float32 ``[B, H, W, C]``; ``[B, 2, H, W, C]`` in a batch of pairs.
      labels: int32 ``[B]``, or ``[B, 2]`` in a batch of pairs; bool ``[B, J]`` if an image may show
        any number of classes; float32 ``[B, J]``, numbers to predict.
    """

    images: jax.Array
    labels: jax.Array


class Sample(NamedTuple):
    """The examples of a train step or an evaluation.

    Attributes:
      images: network input, pixels in [0, 1] or standardised, float32 ``[B, H, W, C]``.
      labels: int32 ``[B]``, or ``[B, 2]`` for pairs; bool ``[B, J]`` for any number of classes;
        float32 ``[B, J]``, numbers to predict.
      target: classes that are present, one- or multi-hot, float32 ``[B, J]``; or the numbers to
        predict.
      masks: capsules that the decoder receives, float32 ``[B, J]``, or ``[B, 2, J]`` for pairs,
        whose digits are reconstructed one by one; all capsules for numbers to predict.
      drawings: reconstruction targets, float32 ``[B, H, W, C]``, or ``[B, 2, H, W, C]`` for pairs.
      keys: one key per example, for dropout, ``[B]``; None in tests.
    """

    images: jax.Array
    labels: jax.Array
    target: jax.Array
    masks: jax.Array
    drawings: jax.Array
    keys: jax.Array | None

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to predict, instead of classes."""
        return has_vectors(self.labels) and self.labels.dtype != bool


@dataclasses.dataclass(frozen=True)
class Task:
    """Base class of tasks: single, unchanged images.

    Attributes:
      classes_per_image: number of classes that an image shows.
      is_made: whether test samples are random too, and unlimited; see :meth:`Sampler.test`.
    """

    classes_per_image: ClassVar[int] = 1
    is_made: ClassVar[bool] = False

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns the shape of the network's input for images of this shape.

        Raises:
          ValueError: the task does not support images of this shape.
        """
        return shape

    def select(self, keys: jax.Array, split: Batch, indices: jax.Array) -> Batch:
        """Returns the images from which the samples are made.

        Args:
          keys: one key per sample, ``[B]``.
          split: the whole split.
          indices: index of the first or only image of each sample, ``[B]``.
        """
        del keys
        return Batch(split.images[indices], split.labels[indices])

    def render(
        self, keys: jax.Array, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the network's input and the reconstruction target.

        Args:
          keys: one key per sample, ``[B]``.
          images: from :meth:`select`.
          train: whether to apply augmentation that is for training only.
        """
        del keys, train
        pixels = scale_pixels(images)
        return pixels, pixels


@dataclasses.dataclass(frozen=True)
class _Resized(Task):
    """Base class of tasks that change the image size."""

    size: int

    def __post_init__(self) -> None:
        as_integer("size", self.size)

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns `size` rows and columns."""
        return self.size, self.size, shape[2]


@dataclasses.dataclass(frozen=True)
class Shifted(Task):
    """Single images, which are shifted at random in training.

    Attributes:
      max_shift: largest shift in pixels along each axis.
      fill: value of uncovered pixels, from 0 (black) to 1 (white), or ``"edge"`` to repeat the
        border of the image.

    Raises:
      ValueError: `max_shift` is negative, or `fill` is invalid.
      TypeError: `max_shift` is not an integer.
    """

    max_shift: int = 2
    fill: Fill = 0.0

    def __post_init__(self) -> None:
        as_integer("max_shift", self.max_shift, least=0)
        if self.fill != "edge" and not (isinstance(self.fill, int | float) and 0 <= self.fill <= 1):
            raise ValueError(
                f"fill must be 'edge' or from 0 (black) to 1 (white), got {self.fill!r}"
            )

    def render(
        self, keys: jax.Array, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Shifts the images in training."""
        if train:
            white = white_of(images.dtype)
            fill = self.fill if self.fill == "edge" or white == 1 else round(self.fill * white)
            images = random_shift(keys, images, max_shift=self.max_shift, fill=fill)
        return super().render(keys, images, train=train)


@dataclasses.dataclass(frozen=True)
class _Canvas(_Resized):
    """Base class of tasks that place whole images on a larger canvas."""

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns `size` rows and columns."""
        if max(shape[:2]) > self.size:
            raise ValueError(
                f"images must be at most {self.size} x {self.size}, the size of the canvas, got"
                f" {shape[0]} x {shape[1]}"
            )
        return super().image_shape(shape)


@dataclasses.dataclass(frozen=True)
class Placed(_Canvas):
    """Single images at random positions on a larger canvas, in training and test.

    Attributes:
      size: rows and columns of the canvas.

    Raises:
      TypeError: `size` is not an integer.
      ValueError: `size` is not positive.
    """

    is_made: ClassVar[bool] = True
    size: int = 40

    def render(
        self, keys: jax.Array, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Places each image at random."""
        return super().render(keys, random_placement(keys, images, size=self.size), train=train)


@dataclasses.dataclass(frozen=True)
class Distorted(_Resized):
    """Single images under random affine transformations on a larger canvas.

    The ranges are those of affNIST.

    Attributes:
      size: rows and columns of the canvas.

    Raises:
      TypeError: `size` is not an integer.
      ValueError: `size` is not positive.
    """

    is_made: ClassVar[bool] = True
    size: int = 40

    def render(
        self, keys: jax.Array, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Transforms each image."""
        return super().render(keys, random_affine(keys, images, size=self.size), train=train)


@dataclasses.dataclass(frozen=True)
class Cropped(_Resized):
    """Crops of images, standardised to mean 0 and standard deviation 1 over all pixels.

    In training the crop is random, and brightness and contrast vary; in test it is central. The
    default brightness and contrast are those of the authors' code.

    Attributes:
      size: rows and columns of the crop.
      brightness: largest change of brightness, in both directions, where white is 1.
      contrast: smallest and largest factor of a pixel's distance from the mean of its channel.

    Raises:
      TypeError: `size` is not an integer, or an option is not a number.
      ValueError: `size` is not positive, or `brightness` or `contrast` is invalid.
    """

    size: int = 24
    brightness: float = 63 / 255
    contrast: tuple[float, float] = (0.2, 1.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        as_number("brightness", self.brightness, least=0)
        if not isinstance(self.contrast, tuple) or len(self.contrast) != 2:
            raise ValueError(f"contrast must be a pair (smallest, largest), got {self.contrast!r}")
        for end in self.contrast:
            as_number("contrast", end)
        if self.contrast[0] > self.contrast[1]:
            raise ValueError(f"contrast must be (smallest, largest), got {self.contrast!r}")

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns `size` rows and columns."""
        if min(shape[:2]) < self.size:
            raise ValueError(
                f"images must be at least {self.size} x {self.size}, the part that is cropped, got"
                f" {shape[0]} x {shape[1]}"
            )
        return super().image_shape(shape)

    def render(
        self, keys: jax.Array, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Crops, augments and standardises images; the reconstruction target is the plain crop."""
        crop, bright, contrast = split_each(keys, 3)
        drawings = scale_pixels(crop_images(images, self.size, crop if train else None))
        pixels = drawings
        if train:
            pixels += _uniform(bright, -self.brightness, self.brightness)
            mean = jnp.mean(pixels, axis=(1, 2), keepdims=True)
            pixels = mean + (pixels - mean) * _uniform(contrast, *self.contrast)
        return _standardised(pixels), drawings


@dataclasses.dataclass(frozen=True)
class Pairs(_Canvas):
    """Pairs of images of different classes, shifted, added and clipped at white.

    The second image is drawn uniformly from all images of the split with another class.

    Attributes:
      size: rows and columns of the canvas, on which both images are centred before the shifts.
      max_shift: largest shift in pixels along each axis.

    Raises:
      TypeError: `size` or `max_shift` is not an integer.
      ValueError: `size` is not positive, or `max_shift` is negative.
    """

    classes_per_image: ClassVar[int] = 2
    is_made: ClassVar[bool] = True
    size: int = 36
    max_shift: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        as_integer("max_shift", self.max_shift, least=0)

    def select(self, keys: jax.Array, split: Batch, indices: jax.Array) -> Batch:
        """Pairs each image with one of another class; the split must be sorted by label."""
        first = split.labels[indices]
        begin, end = (jnp.searchsorted(split.labels, first, side=s) for s in ("left", "right"))
        others = split.labels.shape[0] - (end - begin)
        drawn = jax.vmap(lambda key, n: jax.random.randint(key, (), 0, n, jnp.int32))(keys, others)
        second = jnp.where(drawn < begin, drawn, drawn + end - begin)
        one, two = (Task.select(self, keys, split, at) for at in (indices, second))
        return Batch(*(jnp.stack(pair, axis=1) for pair in zip(one, two, strict=True)))

    def render(
        self, keys: jax.Array, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Shifts both images and adds them."""
        del train
        parts = jnp.stack(
            [
                random_shift(key, self.singly(images[:, n]), max_shift=self.max_shift)
                for n, key in enumerate(split_each(keys))
            ],
            axis=1,
        )
        wide = jnp.float32 if jnp.issubdtype(parts.dtype, jnp.floating) else jnp.int32
        total = jnp.minimum(parts.astype(wide).sum(1), white_of(parts.dtype)).astype(parts.dtype)
        return scale_pixels(total), scale_pixels(parts)

    def singly(self, images: jax.Array) -> jax.Array:
        """Returns single images at the centre of the canvas, ``[B, size, size, C]``."""
        margins = [self.size - n for n in images.shape[1:3]]
        if min(margins) < 0:
            raise ValueError(
                f"size must be at least that of the images, {images.shape[1:3]}, got {self.size}"
            )
        padding = [(0, 0), *((n // 2, n - n // 2) for n in margins), (0, 0)]
        return jnp.pad(images, padding)


def has_vectors(labels: jax.Array) -> bool:
    """Whether labels are vectors with one entry per class, instead of class indices."""
    is_number = labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.floating)
    return labels.dtype == bool or is_number


def _uniform(keys: jax.Array, low: float, high: float) -> jax.Array:
    """Draws one number per image, ``[B, 1, 1, 1]``."""
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, low, high))(keys)
    return drawn[:, None, None, None]


def _standardised(images: jax.Array) -> jax.Array:
    axes = (1, 2, 3)
    deviation = jnp.std(images, axis=axes, keepdims=True)
    # Keeps images of a single colour finite.
    least = 1 / math.sqrt(max(1, math.prod(images.shape[1:])))
    return (images - jnp.mean(images, axis=axes, keepdims=True)) / jnp.maximum(deviation, least)
