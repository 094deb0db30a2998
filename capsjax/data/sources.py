"""Data sets by name: the one way in."""

import difflib
import os
from pathlib import Path

import numpy as np

from capsjax.data.affnist import load_affnist
from capsjax.data.dataset import Dataset, Split
from capsjax.data.embedded import load_mnist_5k
from capsjax.data.image_folder import load_image_folder
from capsjax.data.npz import load_npz
from capsjax.data.tasks import Distorted, Pairs, Placed, Task
from capsjax.data.tfds_source import NAMES as TFDS_NAMES
from capsjax.data.tfds_source import load_tfds, task_of
from capsjax.errors import DataError

# Made of MNIST's digits on the device, never stored.
_MADE: dict[str, Task] = {
    "multi_mnist": Pairs(),
    "expanded_mnist": Placed(),
    "affine_mnist": Distorted(),
}
_NAMES = ("mnist_5k", *TFDS_NAMES, *_MADE, "affnist", "image_folder")


def names() -> tuple[str, ...]:
    """Returns the names `load` knows.

    Example:
      >>> from capsjax.data import names
      >>> names()
      ('mnist_5k', 'mnist', 'fashion_mnist', 'kmnist', 'cifar10', 'svhn_cropped', 'smallnorb',
       'multi_mnist', 'expanded_mnist', 'affine_mnist', 'affnist', 'image_folder')
    """
    return _NAMES


def load(
    name: str = "mnist_5k",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
) -> Dataset:
    """Returns a data set, whole and decoded, as uint8 images and int32 labels.

    ``mnist_5k`` comes with the package. ``mnist``, ``fashion_mnist``, ``kmnist``, ``cifar10``,
    ``svhn_cropped`` and ``smallnorb`` (both images of a pair as channels, 48x48) are read from
    TFDS's directory, prepared there first where they are missing (without TensorFlow), and kept
    decoded under ``$XDG_CACHE_HOME/capsjax`` (``~/.cache/capsjax``) for the next process.
    ``image_folder`` reads ``data_dir/train/<class>/`` and ``data_dir/test/<class>/``.
    What is made of ``mnist`` on the device, by :attr:`Dataset.task`: ``multi_mnist``, two digits of
    different classes in an image of 36x36 (:class:`Pairs`); ``expanded_mnist``, a digit somewhere
    on 40x40 (:class:`Placed`); ``affine_mnist``, the same under random affine transformations with
    the ranges of affNIST, whose published images it is not (:class:`Distorted`).

    Args:
      name: one of `names()`.
      data_dir: for TFDS sets, the directory that holds (or shall hold) prepared sets, by default
        TFDS's own: ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``. For ``image_folder``, the
        directory with ``train`` and ``test``; for ``affnist``, the one with ``test_batches``. In
        place of any of them a file ``.npz`` that :func:`save_npz` has written of the set, or of
        ``mnist`` for what is made of it. ``mnist_5k`` needs none and ignores it.
      download: whether a TFDS set that is not prepared yet may be downloaded.

    Returns:
      The data set: images uint8 ``[N, H, W, C]``, labels int32 ``[N]``.

    Raises:
      DataError: the name is unknown, or the data is missing, broken or out of reach.

    Example:
      >>> from capsjax.data import load
      >>> load().image_shape
      (28, 28, 1)
    """
    if name == "mnist_5k":
        return load_mnist_5k()
    path = None if data_dir is None else Path(data_dir)
    if path is not None and path.suffix == ".npz" and name in _NAMES and name not in _MADE:
        return load_npz(name, path, task_of(name))
    if name in TFDS_NAMES:
        return load_tfds(name, path, download=download)
    if name in _MADE:
        digits = load("mnist", data_dir=data_dir, download=download)
        train, test = (_by_class(split) for split in (digits.train, digits.test))
        try:
            return Dataset(name, train, test, digits.class_names, _MADE[name])
        except ValueError as error:
            raise DataError(f"{name} cannot be made of {data_dir}: {error}") from None
    if name == "affnist":
        return load_affnist(data_dir)
    if name == "image_folder":
        return load_image_folder(data_dir)
    closest = difflib.get_close_matches(name.lower(), _NAMES, n=1, cutoff=0.5)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    raise DataError(f"unknown data set {name!r}, expected one of {', '.join(_NAMES)}{hint}")


def source_of(name: str) -> str:
    """The data set whose images this one is made of: itself, unless it is made on the device.

    Example:
      >>> from capsjax.data import source_of
      >>> source_of("affine_mnist"), source_of("kmnist")
      ('mnist', 'kmnist')
    """
    return "mnist" if name in _MADE else name


def _by_class(split: Split) -> Split:
    """The same images in the order of their labels, which pairs are drawn by."""
    order = np.argsort(split.labels, kind="stable")
    return Split(split.images[order], split.labels[order])
