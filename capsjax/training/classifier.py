"""A trained network as a function of stored images, without its data set."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from capsjax import models
from capsjax.data import Cropped, Distorted, Pairs, Placed, Shifted, Task
from capsjax.data.image_files import CHANNELS, read_image
from capsjax.data.sources import task_of
from capsjax.errors import ConfigError
from capsjax.ops._checks import as_integer
from capsjax.options import expanded
from capsjax.training import choices
from capsjax.training.loading import read_run, restore
from capsjax.training.step import Apply, Variables, split_abstract

_TASKS = {kind.__name__: kind for kind in (Task, Shifted, Cropped, Placed, Distorted, Pairs)}
# Rows and columns of the whole images; networks trained on these sets see their middle.
_UNCROPPED = {"cifar10": 32}


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained network together with its preprocessing of images.

    Attributes:
      model: the network's configuration.
      class_names: names of the classes, in the order of the scores.
      image_shape: rows, columns and channels of the input images.
      classes_per_image: number of classes that an image shows; None for any number.
      step: step of the checkpoint; None for a network in the package.
      is_regression: whether the scores are predicted numbers instead of class scores.
    """

    model: models.ModelConfig
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    classes_per_image: int | None
    step: int | None
    _apply: Apply = dataclasses.field(repr=False)
    _variables: Variables = dataclasses.field(repr=False)
    _task: Task = dataclasses.field(repr=False)
    _has_canvas: bool = dataclasses.field(repr=False)
    is_regression: bool = False

    def predict(self, images: jax.Array) -> models.Prediction:
        """Predicts images ``[B, H, W, C]``; a pure function, which JAX can transform and export.

        Args:
          images: uint8, uint16, or floating-point from 0 to 1.

        Raises:
          TypeError: the images have another dtype.
          ValueError: the images do not have the shape :attr:`image_shape`.
        """
        # The compiler would spend minutes on parameters that it takes for constants.
        return self._predict(jax.lax.optimization_barrier(self._variables), images)

    def __call__(self, images: npt.ArrayLike, *, batch_size: int = 100) -> npt.NDArray[np.float32]:
        """Returns the scores of images, float32 ``[N, J]``, computed batch by batch.

        Args:
          images: as in :meth:`predict`, ``[N, H, W, C]``.
          batch_size: number of images that the device processes at once.

        Raises:
          TypeError: as in :meth:`predict`.
          ValueError: as in :meth:`predict`, floating-point pixels are not from 0 to 1, or
            `batch_size` is not positive.
        """
        as_integer("batch_size", batch_size)
        images = np.asarray(images)
        if images.dtype.kind == "f" and images.size:
            low, high = images.min(), images.max()
            if not (low >= 0 and high <= 1):  # also if one of them is NaN
                raise ValueError(f"floating-point images must lie in [0, 1], got {low}..{high}")
        number = len(images)
        scores = [np.empty((0, len(self.class_names)), np.float32)]
        for first in range(0, number, batch_size):
            # All batches have the same size, so that the program is compiled once.
            positions = np.minimum(first + np.arange(min(batch_size, number)), number - 1)
            scores.append(np.asarray(self._scores(self._variables, images[positions])))
        return np.concatenate(scores)[:number]

    def read_image(self, file: Path, *, lost: "Counter[str] | None" = None) -> npt.NDArray[Any]:
        """Reads an image in the network's shape, as training on an ``image_folder`` does.

        An image of another shape is scaled, and its longer side is cropped at both ends. For
        networks of ``multi_mnist``, ``expanded_mnist`` and ``affine_mnist``, whose digits are on a
        larger canvas, a smaller image is not scaled but centred on black.

        Args:
          file: the image.
          lost: counts images that lose data, such as all but the first image of a file.

        Returns:
          The pixels, uint8, uint16 or float32 of shape :attr:`image_shape`.

        Raises:
          ConfigError: image files cannot have the network's number of channels.
          capsjax.data.DataError: the file is not an image, or is damaged.
          OSError: the operating system refuses to read it.
        """
        *size, channels = self.image_shape
        lost = Counter() if lost is None else lost
        if channels not in CHANNELS:
            raise ConfigError(
                f"the network takes images with {channels} channels, which only arrays (.npy) have"
            )
        if self._has_canvas:
            pixels = read_image(file, lost=Counter(), channels=channels)
            margins = np.subtract(size, pixels.shape[:2])
            if margins.min() >= 0:
                return np.pad(pixels, [*((n // 2, n - n // 2) for n in margins), (0, 0)])
        return read_image(file, lost=lost, size=(size[0], size[1]), channels=channels)

    def _predict(self, variables: Variables, images: jax.Array) -> models.Prediction:
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must have shape [B, {', '.join(map(str, self.image_shape))}], got"
                f" {list(images.shape)}"
            )
        # These keys are not used: only training images are augmented.
        keys = jax.random.split(jax.random.key(0), images.shape[0])
        pixels, _ = self._task.render(keys, images, train=False)
        return self._apply(variables, pixels)[0]

    @functools.cached_property
    def _scores(self) -> Callable[[Variables, npt.NDArray[Any]], jax.Array]:
        return jax.jit(lambda variables, images: self._predict(variables, images).scores)


def load_classifier(
    run_dir: str | os.PathLike[str],
    checkpoint: str | int = "last",
    *,
    image_size: int | None = None,
) -> Classifier:
    """Loads a run's network, to classify images from anywhere.

    Args:
      run_dir: the run's directory, or the name of a network in the package.
      checkpoint: ``"last"``, ``"best"`` (by validation error), or a step.
      image_size: rows and columns to which images are scaled, for a network that sees only their
        middle; by default 32 for networks trained on ``cifar10``.

    Returns:
      :class:`Classifier`.

    Raises:
      ConfigError: the directory holds no run, the network was trained with a custom task, or
        `image_size` is missing or has no effect.
      CheckpointError: the checkpoint cannot be read.

    Example:
      >>> from capsjax.data import load
      >>> from capsjax.training import load_classifier
      >>> classifier, digits = load_classifier("mnist_small"), load("mnist_5k").test
      >>> scores = classifier(digits.images[:4])
      >>> [classifier.class_names[n] for n in scores.argmax(-1)], digits.labels[:4].tolist()
      (['7', '2', '1', '0'], [7, 2, 1, 0])
    """
    path = expanded("run_dir", run_dir, remote=True)
    run = read_run(path)
    name = run.data.task or type(task_of(run.dataset)).__name__  # older versions did not record it
    rows, columns, channels = run.model.image_shape
    task = Task()
    if name == "Cropped":
        task = Cropped(rows)
        rows = columns = image_size or _UNCROPPED.get(run.dataset, 0)
        if rows < task.size:
            raise ConfigError(
                f"--image-size must be the size of the images of {run.data.name}, at least"
                f" {task.size}, as the network sees only their middle; got {image_size}"
            )
    elif name not in _TASKS:
        raise ConfigError(
            f"the images of {run.data.name} are prepared by a custom task, {name}, which is not"
            " available for other images"
        )
    elif image_size is not None:
        raise ConfigError(
            f"--image-size has no effect on a network that sees whole images, of {rows}x{columns}"
        )
    per_image = None if run.data.label_dtype == "bool" else _TASKS[name].classes_per_image
    apply, _ = split_abstract(run.model)
    step, variables = restore(path, checkpoint, run, choices.choose_driver("jit", None))
    return Classifier(
        model=run.model,
        class_names=run.data.class_names,
        image_shape=(rows, columns, channels),
        classes_per_image=per_image,
        step=step,
        _apply=apply,
        _variables=variables,
        _task=task,
        _has_canvas=_TASKS[name].is_made,
        is_regression=run.data.is_regression,
    )
