"""Augmentation: what is fed to the network and which targets it is trained on.

A data set holds images; a task makes samples from them on the device: shifted, placed on a larger
canvas, distorted, cropped, or two in one. Samples are never stored. A test sample depends only on
its number, so that the test set does not depend on the number of devices or the batch size, and can
have any length.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from capsjax.data.affine import random_affine
from capsjax.data.transforms import (
    Fill,
    Flip,
    crop_images,
    random_flip,
    random_placement,
    random_shift,
    scale_pixels,
    white_of,
)
from capsjax.ops._checks import as_array, as_integer

_TEST = 2017  # seed of the test samples
# Numbers folded into an example's key; `jax.random.split` uses 0 and 1.
_SELECT = 2
_FLIP = 3


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
        return _has_vectors(self.labels) and self.labels.dtype != bool


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
      ValueError: `fill` is invalid.
    """

    max_shift: int = 2
    fill: Fill = 0.0

    def __post_init__(self) -> None:
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
    """

    size: int = 24
    brightness: float = 63 / 255
    contrast: tuple[float, float] = (0.2, 1.8)

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
        crop, bright, contrast = jnp.moveaxis(
            jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0
        )
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
    """

    classes_per_image: ClassVar[int] = 2
    is_made: ClassVar[bool] = True
    size: int = 36
    max_shift: int = 4

    def select(self, keys: jax.Array, split: Batch, indices: jax.Array) -> Batch:
        """Pairs each image with one of another class; the split must be sorted by label."""
        first = split.labels[indices]
        begin, end = (jnp.searchsorted(split.labels, first, side=s) for s in ("left", "right"))
        others = split.labels.shape[0] - (end - begin)
        drawn = jax.vmap(lambda key, n: jax.random.randint(key, (), 0, n))(keys, others)
        second = jnp.where(drawn < begin, drawn, drawn + end - begin)
        one, two = (Task.select(self, keys, split, at) for at in (indices, second))
        return Batch(*(jnp.stack(pair, axis=1) for pair in zip(one, two, strict=True)))

    def render(
        self, keys: jax.Array, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Shifts both images and adds them."""
        del train
        both = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        parts = jnp.stack(
            [
                random_shift(key, self.singly(images[:, n]), max_shift=self.max_shift)
                for n, key in enumerate(both)
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


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Makes the samples of a task from images and keys.

    Attributes:
      task: makes samples from images.
      num_classes: J.
      flip: direction in which training images are mirrored, or None; see :func:`random_flip`.

    Raises:
      TypeError: ``task`` is not a :class:`Task`, or ``num_classes`` is not an integer.
      ValueError: ``num_classes`` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.data import Batch, Pairs, Sampler
      >>> digits = Batch(jnp.zeros((4, 28, 28, 1), jnp.uint8), jnp.array([0, 0, 1, 2]))
      >>> sampler = Sampler(Pairs(), num_classes=3)
      >>> first_two = jnp.arange(2)
      >>> sample = jax.jit(sampler.train)(digits, jax.random.key(0), first_two, first_two)
      >>> sample.images.shape
      (2, 36, 36, 1)
      >>> jax.eval_shape(sampler.test, digits, jnp.arange(8)).drawings.shape
      (8, 2, 36, 36, 1)
    """

    task: Task
    num_classes: int
    flip: Flip | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise TypeError(f"task must be a Task, got {self.task!r}")
        as_integer("num_classes", self.num_classes)

    def train(
        self, split: Batch, key: jax.Array, positions: jax.Array, indices: jax.Array
    ) -> Sample:
        """Makes training samples.

        Randomness depends only on the key of the step and the position of an example in the global
        batch, so that the samples are the same for any number of devices.

        Args:
          split: the whole split, on the device.
          key: key of the step, a typed key of shape ``[]``.
          positions: positions of the examples in the global batch, int32 ``[B]``.
          indices: indices of their images in the split, int32 ``[B]``.

        Raises:
          ValueError: the split does not have one label per image.
          TypeError: the key is not a typed key, or the labels are not integers.
        """
        split = Batch(*map(as_array, ("split.images", "split.labels"), split))
        images, labels = split
        if images.shape[:-3] != labels.shape[: labels.ndim - _has_vectors(labels)]:
            raise ValueError(
                f"split must have one label per image, shape {split.images.shape[:-3]}, got"
                f" labels of shape {split.labels.shape}"
            )
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise TypeError(f"key must be a typed key as of jax.random.key, got {key.dtype}")
        keys = _fold_in(key, positions)
        select_keys = jax.vmap(lambda key: jax.random.fold_in(key, _SELECT))(keys)
        return self._augmented(keys, self.task.select(select_keys, split, indices))

    def train_batch(self, batch: Batch, key: jax.Array, positions: jax.Array) -> Sample:
        """Makes the training samples of :meth:`train` from a batch of their images, for streams.

        Args:
          batch: the images of the samples; requires :attr:`takes_batches`.
          key: key of the step, a typed key of shape ``[]``.
          positions: positions of the examples in the global batch, int32 ``[B]``.
        """
        return self._augmented(_fold_in(key, positions), batch)

    @property
    def takes_batches(self) -> bool:
        """Whether a sample needs only the image at its index, not the whole split."""
        return type(self.task).select is Task.select and not self.task.is_made

    def _augmented(self, keys: jax.Array, batch: Batch) -> Sample:
        """Makes training samples from selected images."""
        task_keys, network_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        if self.flip is not None:
            flip_keys = jax.vmap(lambda key: jax.random.fold_in(key, _FLIP))(keys)
            flipped = random_flip(flip_keys, batch.images, direction=self.flip)
            batch = batch._replace(images=flipped)
        return self._sample(task_keys, batch, network_keys, train=True)

    def test(self, split: Batch, numbers: jax.Array) -> Sample:
        """Makes the test samples with these numbers.

        The test set is endless, and sample n depends only on n. Among N consecutive samples, each
        image is the first image of one. Generated samples mix the classes; other tasks keep the
        order of the images.

        Args:
          split: the whole split of N images, on the device.
          numbers: int32 ``[B]``.
        """
        split = Batch(*map(as_array, ("split.images", "split.labels"), split))
        keys = jax.vmap(jax.random.split)(_fold_in(jax.random.key(_TEST), numbers))
        size = split.labels.shape[0]
        indices = numbers % size
        if self.task.is_made:
            order = np.random.default_rng(_TEST).permutation(size)
            indices = jnp.asarray(order, jnp.int32)[indices]
        batch = self.task.select(keys[:, 0], split, indices)
        return self._sample(keys[:, 1], batch, None, train=False)

    def test_batch(self, batch: Batch, numbers: jax.Array) -> Sample:
        """Makes the test samples of :meth:`test` from a batch of their images, for streams.

        Args:
          batch: the images of the samples; requires :attr:`takes_batches`.
          numbers: int32 ``[B]``.
        """
        keys = jax.vmap(jax.random.split)(_fold_in(jax.random.key(_TEST), numbers))
        return self._sample(keys[:, 1], batch, None, train=False)

    def _sample(
        self, keys: jax.Array, batch: Batch, network_keys: jax.Array | None, *, train: bool
    ) -> Sample:
        images, drawings = self.task.render(keys, batch.images, train=train)
        labels = batch.labels
        if _has_vectors(labels):
            target = labels.astype(jnp.float32)
            masks = target if labels.dtype == bool else jnp.ones_like(target)
        else:
            labels = _as_labels(labels)
            masks = jax.nn.one_hot(labels, self.num_classes)
            target = masks.sum(1) if self.task.classes_per_image > 1 else masks
        return Sample(images, labels, target, masks, drawings, network_keys)


def is_right(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Returns whether predictions are correct, bool ``[B]``.

    A prediction with a NaN score is wrong.

    Args:
      scores: ``[B, J]``.
      labels: integers ``[B]``, or ``[B, k]`` for k different classes, which must be those with the
        k largest scores; or bool ``[B, J]``, where the scores of all classes that are present must
        exceed those of all others.

    Raises:
      TypeError: the labels are neither integers nor bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.data import is_right
      >>> scores = jnp.array([[0.9, 0.8, 0.1], [0.9, 0.1, 0.8]])
      >>> print(is_right(scores, jnp.array([[1, 0], [1, 0]])))
      [ True False]
    """
    scores, labels = as_array("scores", scores), as_array("labels", labels)
    if labels.dtype == bool:
        least = jnp.min(scores, axis=-1, where=labels, initial=jnp.inf)
        return least > jnp.max(scores, axis=-1, where=~labels, initial=-jnp.inf)
    labels = _as_labels(labels)
    if labels.ndim == 1:
        labels = labels[:, None]
    _, largest = jax.lax.top_k(scores, labels.shape[1])
    right = jnp.all(jnp.sort(largest) == jnp.sort(labels), axis=-1)
    return right & ~jnp.any(jnp.isnan(scores), axis=-1)


def _as_labels(labels: ArrayLike) -> jax.Array:
    labels = as_array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be class numbers, integers, got dtype {labels.dtype}")
    return labels


def _has_vectors(labels: jax.Array) -> bool:
    """Whether labels are vectors with one entry per class, instead of class indices."""
    is_number = labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.floating)
    return labels.dtype == bool or is_number


def _fold_in(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns one key per number."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def _uniform(keys: jax.Array, low: float, high: float) -> jax.Array:
    """Draws one number per image, ``[B, 1, 1, 1]``."""
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (), minval=low, maxval=high))(keys)
    return drawn[:, None, None, None]


def _standardised(images: jax.Array) -> jax.Array:
    axes = (1, 2, 3)
    deviation = jnp.std(images, axis=axes, keepdims=True)
    # Keeps images of a single colour finite.
    least = 1 / jnp.sqrt(images[0].size)
    return (images - jnp.mean(images, axis=axes, keepdims=True)) / jnp.maximum(deviation, least)
