"""What a network is shown of a data set, and what it shall say.

A data set holds images; a task makes what is trained and measured on out of them, on the device:
shifted, placed on a larger canvas, distorted, cropped, or two in one. Nothing that is made is
stored. A test example is made from the number that it has in the test set, so that the set is the
same whenever, wherever and in whatever batches it is made, and as large as one likes.
"""

import dataclasses
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from capsjax.data.affine import random_affine
from capsjax.data.transforms import crop_images, random_placement, random_shift, scale_pixels

_TEST = 2017  # seed of what is drawn for test examples


class Batch(NamedTuple):
    """Images and labels on the devices: a batch, or a whole split.

    Attributes:
      images: uint8 ``[B, H, W, C]``; ``[B, 2, H, W, C]`` in a batch of pairs.
      labels: int32 ``[B]``; ``[B, 2]`` in a batch of pairs.
    """

    images: jax.Array
    labels: jax.Array


class Sample(NamedTuple):
    """What a network is shown and what it shall say.

    Attributes:
      images: pixels in [0, 1], or standardised, float32 ``[B, H, W, C]``.
      target: classes that are present, one- or multi-hot, float32 ``[B, J]``.
      masks: classes whose capsules the decoder draws, float32 ``[B, J]``; of pairs one after the
        other, ``[B, 2, J]``.
      drawings: what it shall draw, float32 ``[B, H, W, C]`` or ``[B, 2, H, W, C]``.
    """

    images: jax.Array
    target: jax.Array
    masks: jax.Array
    drawings: jax.Array


class Task(Protocol):
    """Makes samples of a split; a frozen dataclass.

    Attributes:
      classes_per_image: number of classes that an image shows.
      is_made: whether the test set is drawn too, and endless, see :func:`evaluation_samples`;
        otherwise it is the test split.
    """

    classes_per_image: ClassVar[int]
    is_made: ClassVar[bool]

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of what the network is shown, from that of the data set's images."""
        ...

    def gather(self, keys: jax.Array, split: Batch, positions: jax.Array) -> Batch:
        """The images that samples are made of.

        Args:
          keys: one for each sample, ``[B]``.
          split: the whole split.
          positions: of the first or only image of each sample, ``[B]``.
        """
        ...

    def make(self, keys: jax.Array, batch: Batch, *, num_classes: int, train: bool) -> Sample:
        """Samples of gathered images.

        Args:
          keys: one for each sample, ``[B]``.
          batch: from :meth:`gather`.
          num_classes: J.
          train: whether for training; what only makes training harder is left out otherwise.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Shifted:
    """Single images, in training shifted by up to some pixels.

    Attributes:
      max_shift: in pixels, along both axes.
    """

    classes_per_image: ClassVar[int] = 1
    is_made: ClassVar[bool] = False
    max_shift: int = 2

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The images' own."""
        return shape

    def gather(self, keys: jax.Array, split: Batch, positions: jax.Array) -> Batch:
        """The images at these positions."""
        return _at(split, positions)

    def make(self, keys: jax.Array, batch: Batch, *, num_classes: int, train: bool) -> Sample:
        """Shifts for training only."""
        images = random_shift(keys, batch.images, max_shift=self.max_shift if train else 0)
        return _single(images, batch.labels, num_classes)


@dataclasses.dataclass(frozen=True)
class Placed:
    """Single images, each somewhere on a larger canvas, in training and test.

    Attributes:
      size: rows and columns of the canvas.
    """

    classes_per_image: ClassVar[int] = 1
    is_made: ClassVar[bool] = True
    size: int = 40

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The canvas."""
        return self.size, self.size, shape[2]

    def gather(self, keys: jax.Array, split: Batch, positions: jax.Array) -> Batch:
        """The images at these positions."""
        return _at(split, positions)

    def make(self, keys: jax.Array, batch: Batch, *, num_classes: int, train: bool) -> Sample:
        """Places."""
        images = random_placement(keys, batch.images, size=self.size)
        return _single(images, batch.labels, num_classes)


@dataclasses.dataclass(frozen=True)
class Distorted:
    """Single images under random affine transformations, somewhere on a larger canvas.

    The ranges are those of affNIST.

    Attributes:
      size: rows and columns of the canvas.
    """

    classes_per_image: ClassVar[int] = 1
    is_made: ClassVar[bool] = True
    size: int = 40

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The canvas."""
        return self.size, self.size, shape[2]

    def gather(self, keys: jax.Array, split: Batch, positions: jax.Array) -> Batch:
        """The images at these positions."""
        return _at(split, positions)

    def make(self, keys: jax.Array, batch: Batch, *, num_classes: int, train: bool) -> Sample:
        """Transforms."""
        images = random_affine(keys, batch.images, size=self.size)
        return _single(images, batch.labels, num_classes)


@dataclasses.dataclass(frozen=True)
class Cropped:
    """A part of each image, standardised: mean 0 and deviation 1 over all its pixels.

    In training the part is drawn, and brightness and contrast vary; in test it is the middle. The
    defaults of the last two are those of the authors' code.

    Attributes:
      size: rows and columns of the part.
      brightness: largest number that is added to all pixels, both ways, where white is 1.
      contrast: smallest and largest factor of the distance of pixels from their channel's mean.
    """

    classes_per_image: ClassVar[int] = 1
    is_made: ClassVar[bool] = False
    size: int = 24
    brightness: float = 63 / 255
    contrast: tuple[float, float] = (0.2, 1.8)

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The part."""
        return self.size, self.size, shape[2]

    def gather(self, keys: jax.Array, split: Batch, positions: jax.Array) -> Batch:
        """The images at these positions."""
        return _at(split, positions)

    def make(self, keys: jax.Array, batch: Batch, *, num_classes: int, train: bool) -> Sample:
        """Crops, varies and standardises; the decoder shall draw what was cropped."""
        crop, bright, contrast = jnp.moveaxis(
            jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0
        )
        pixels = scale_pixels(crop_images(batch.images, self.size, crop if train else None))
        images = pixels
        if train:
            images += _uniform(bright, -self.brightness, self.brightness)
            mean = jnp.mean(images, axis=(1, 2), keepdims=True)
            images = mean + (images - mean) * _uniform(contrast, *self.contrast)
        _, target, masks, _ = _single(batch.images[:, :1, :1], batch.labels, num_classes)
        return Sample(_standardised(images), target, masks, pixels)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two images of different classes in one: each shifted, added, clipped at the maximum.

    The second is drawn uniformly among all images of the split whose class is another.

    Attributes:
      size: rows and columns of the canvas, on which both are centred before they are shifted.
      max_shift: in pixels, along both axes.
    """

    classes_per_image: ClassVar[int] = 2
    is_made: ClassVar[bool] = True
    size: int = 36
    max_shift: int = 4

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The canvas."""
        return self.size, self.size, shape[2]

    def gather(self, keys: jax.Array, split: Batch, positions: jax.Array) -> Batch:
        """Each image and one of another class; the split must be in the order of its labels."""
        first = split.labels[positions]
        begin, end = (jnp.searchsorted(split.labels, first, side=s) for s in ("left", "right"))
        others = split.labels.shape[0] - (end - begin)
        drawn = jax.vmap(lambda key, n: jax.random.randint(key, (), 0, n))(keys, others)
        second = jnp.where(drawn < begin, drawn, drawn + end - begin)
        one, two = _at(split, positions), _at(split, second)
        return Batch(*(jnp.stack(pair, axis=1) for pair in zip(one, two, strict=True)))

    def make(self, keys: jax.Array, batch: Batch, *, num_classes: int, train: bool) -> Sample:
        """Shifts each of the two, and adds them."""
        both = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        parts = jnp.stack(
            [
                random_shift(key, self.singly(batch.images[:, n]), max_shift=self.max_shift)
                for n, key in enumerate(both)
            ],
            axis=1,
        )
        total = jnp.minimum(parts.astype(jnp.int32).sum(1), 255).astype(jnp.uint8)
        masks = jax.nn.one_hot(batch.labels, num_classes)
        return Sample(scale_pixels(total), masks.sum(1), masks, scale_pixels(parts))

    def singly(self, images: jax.Array) -> jax.Array:
        """Single images in the middle of the canvas, ``[B, size, size, C]``."""
        margins = [self.size - n for n in images.shape[1:3]]
        if min(margins) < 0:
            raise ValueError(
                f"size must be at least that of the images, {images.shape[1:3]}, got {self.size}"
            )
        padding = [(0, 0), *((n // 2, n - n // 2) for n in margins), (0, 0)]
        return jnp.pad(images, padding)


def evaluation_samples(
    task: Task, split: Batch, numbers: jax.Array, *, num_classes: int
) -> tuple[Sample, jax.Array]:
    """Makes the samples with these numbers of the test set that a task makes of a split.

    The set is endless, and what is drawn for sample n depends on n alone. Every N samples begin
    with each image once: in their own order, or, where something is made of images that may be in
    the order of their labels, in one that mixes the classes.

    Args:
      task: what is made.
      split: the whole split, N images.
      numbers: int32 ``[B]``.
      num_classes: J.

    Returns:
      The samples, and the labels of what they are made of.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.data import Batch, Pairs, evaluation_samples
      >>> digits = Batch(jnp.zeros((4, 28, 28, 1), jnp.uint8), jnp.array([0, 0, 1, 2]))
      >>> sample, labels = evaluation_samples(Pairs(), digits, jnp.arange(8), num_classes=3)
      >>> sample.images.shape, sample.drawings.shape, labels.shape
      ((8, 36, 36, 1), (8, 2, 36, 36, 1), (8, 2))
    """
    seed = jax.random.key(_TEST)
    keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(seed, n)))(numbers)
    size = split.labels.shape[0]
    positions = numbers % size
    if task.is_made:
        order = np.random.default_rng(_TEST).permutation(size)
        positions = jnp.asarray(order, jnp.int32)[positions]
    batch = task.gather(keys[:, 0], split, positions)
    sample = task.make(keys[:, 1], batch, num_classes=num_classes, train=False)
    return sample, batch.labels


def is_right(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Whether the largest scores are those of the labels, all of them, bool ``[B]``.

    Args:
      scores: ``[B, J]``.
      labels: ``[B]``, or ``[B, k]`` different classes: then the k largest scores count.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.data import is_right
      >>> scores = jnp.array([[0.9, 0.8, 0.1], [0.9, 0.1, 0.8]])
      >>> print(is_right(scores, jnp.array([[1, 0], [1, 0]])))
      [ True False]
    """
    scores = jnp.asarray(scores)
    labels = jnp.asarray(labels).reshape(scores.shape[0], -1)
    _, largest = jax.lax.top_k(scores, labels.shape[1])
    return jnp.all(jnp.sort(largest) == jnp.sort(labels), axis=-1)


def _uniform(keys: jax.Array, low: float, high: float) -> jax.Array:
    """A number for each image, ``[B, 1, 1, 1]``."""
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (), minval=low, maxval=high))(keys)
    return drawn[:, None, None, None]


def _standardised(images: jax.Array) -> jax.Array:
    axes = (1, 2, 3)
    deviation = jnp.std(images, axis=axes, keepdims=True)
    # An image of one colour stays finite.
    least = 1 / jnp.sqrt(images[0].size)
    return (images - jnp.mean(images, axis=axes, keepdims=True)) / jnp.maximum(deviation, least)


def _at(split: Batch, positions: jax.Array) -> Batch:
    return Batch(split.images[positions], split.labels[positions])


def _single(images: jax.Array, labels: jax.Array, num_classes: int) -> Sample:
    pixels, target = scale_pixels(images), jax.nn.one_hot(labels, num_classes)
    return Sample(pixels, target, target, pixels)
