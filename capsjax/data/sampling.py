"""Sampling: which images a task makes samples from, and with which keys.

A test sample depends only on its number, so that the test set does not depend on the number of
devices or the batch size, and can have any length.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from capsjax.data.tasks import Batch, Sample, Task, has_vectors
from capsjax.data.transforms import Flip, random_flip, split_each
from capsjax.ops._checks import as_array, as_integer, check_choice, check_key

_TEST = 2017  # seed of the test samples
# Numbers folded into an example's key; `jax.random.split` uses 0 and 1.
_SELECT = 2
_FLIP = 3


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Makes the samples of a task from images and keys.

    Attributes:
      task: makes samples from images.
      num_classes: J.
      flip: direction in which training images are mirrored, or None; see :func:`random_flip`.

    Raises:
      TypeError: ``task`` is not a :class:`Task`, or ``num_classes`` is not an integer.
      ValueError: ``num_classes`` is not positive, or ``flip`` is unknown.

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
        if self.flip is not None:
            check_choice("flip", self.flip, get_args(Flip))

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
        split = _checked("split", split)
        check_key("key", key)
        keys = _fold_in(key, positions)
        select_keys = jax.vmap(lambda key: jax.random.fold_in(key, _SELECT))(keys)
        return self._augmented(keys, self.task.select(select_keys, split, indices))

    def train_batch(self, batch: Batch, key: jax.Array, positions: jax.Array) -> Sample:
        """Makes the training samples of :meth:`train` from a batch of their images, for streams.

        Args:
          batch: the images of the samples; requires :attr:`takes_batches`.
          key: key of the step, a typed key of shape ``[]``.
          positions: positions of the examples in the global batch, int32 ``[B]``.

        Raises:
          ValueError: the batch does not have one label per image.
          TypeError: the key is not a typed key, or the labels are not integers.
        """
        check_key("key", key)
        return self._augmented(_fold_in(key, positions), _checked("batch", batch))

    @property
    def takes_batches(self) -> bool:
        """Whether a sample needs only the image at its index, not the whole split."""
        return type(self.task).select is Task.select and not self.task.is_made

    def _augmented(self, keys: jax.Array, batch: Batch) -> Sample:
        """Makes training samples from selected images."""
        task_keys, network_keys = split_each(keys)
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

        Raises:
          ValueError: the split does not have one label per image.
          TypeError: the labels are not integers.
        """
        split = _checked("split", split)
        select_keys, task_keys = split_each(_fold_in(jax.random.key(_TEST), numbers))
        size = split.labels.shape[0]
        indices = numbers % size
        if self.task.is_made:
            order = np.random.default_rng(_TEST).permutation(size)
            indices = jnp.asarray(order, jnp.int32)[indices]
        batch = self.task.select(select_keys, split, indices)
        return self._sample(task_keys, batch, None, train=False)

    def test_batch(self, batch: Batch, numbers: jax.Array) -> Sample:
        """Makes the test samples of :meth:`test` from a batch of their images, for streams.

        Args:
          batch: the images of the samples; requires :attr:`takes_batches`.
          numbers: int32 ``[B]``.

        Raises:
          ValueError: the batch does not have one label per image.
          TypeError: the labels are not integers.
        """
        _, task_keys = split_each(_fold_in(jax.random.key(_TEST), numbers))
        return self._sample(task_keys, _checked("batch", batch), None, train=False)

    def _sample(
        self, keys: jax.Array, batch: Batch, network_keys: jax.Array | None, *, train: bool
    ) -> Sample:
        images, drawings = self.task.render(keys, batch.images, train=train)
        labels = batch.labels
        if has_vectors(labels):
            target = labels.astype(jnp.float32)
            masks = target if labels.dtype == bool else jnp.ones_like(target)
        else:
            labels = _as_labels(labels)
            masks = jax.nn.one_hot(labels, self.num_classes, dtype=jnp.float32)
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
      ValueError: a shape does not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.data import is_right
      >>> scores = jnp.array([[0.9, 0.8, 0.1], [0.9, 0.1, 0.8]])
      >>> print(is_right(scores, jnp.array([[1, 0], [1, 0]])))
      [ True False]
    """
    scores, labels = as_array("scores", scores), as_array("labels", labels)
    _check_shapes(scores, labels)
    if labels.dtype == bool:
        least = jnp.min(scores, axis=-1, where=labels, initial=jnp.inf)
        return least > jnp.max(scores, axis=-1, where=~labels, initial=-jnp.inf)
    labels = _as_labels(labels)
    if labels.ndim == 1:
        labels = labels[:, None]
    _, largest = jax.lax.top_k(scores, labels.shape[1])
    right = jnp.all(jnp.sort(largest) == jnp.sort(labels), axis=-1)
    return right & ~jnp.any(jnp.isnan(scores), axis=-1)


def _check_shapes(scores: jax.Array, labels: jax.Array) -> None:
    """Raises unless the shapes are those of one prediction and its labels per example."""
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape [B, J], got shape {scores.shape}")
    (batch, classes), shape = scores.shape, labels.shape
    if labels.dtype == bool and shape != scores.shape:
        raise ValueError(f"labels that are bool must have shape {scores.shape}, got shape {shape}")
    has_several = len(shape) == 2 and shape[0] == batch and shape[1] <= classes
    if shape != (batch,) and not has_several:
        raise ValueError(
            f"labels must have shape [B] or [B, k] for scores of shape {scores.shape}, got shape"
            f" {shape}"
        )


def _as_labels(labels: ArrayLike) -> jax.Array:
    labels = as_array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be class numbers, integers, got dtype {labels.dtype}")
    return labels


def _checked(name: str, batch: Batch) -> Batch:
    """Returns images and labels as arrays, or raises unless there is one label per image."""
    images, labels = map(as_array, (f"{name}.images", f"{name}.labels"), batch)
    number = images.shape[:-3]
    if labels.dtype == bool and labels.ndim != len(number) + 1:
        raise ValueError(
            f"{name} must have one vector per image where labels are bool, shape"
            f" {(*number, 'J')}, got labels of shape {labels.shape}"
        )
    if number != labels.shape[: labels.ndim - has_vectors(labels)]:
        raise ValueError(
            f"{name} must have one label per image, shape {number}, got labels of shape"
            f" {labels.shape}"
        )
    return Batch(images, labels)


def _fold_in(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns one key per number."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
