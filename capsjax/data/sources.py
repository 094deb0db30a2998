"""Loading of data sets by name."""

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

# Sets that are made from MNIST's digits on the device and never stored.
_MADE: dict[str, Task] = {
    "multi_mnist": Pairs(),
    "expanded_mnist": Placed(),
    "affine_mnist": Distorted(),
}
_NAMES = ("mnist_5k", *TFDS_NAMES, *_MADE, "affnist", "image_folder")


def names() -> tuple[str, ...]:
    """Names of the data sets that :func:`load` can load.

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
    """Loads a data set into memory, as uint8 images and int32 labels.

    * ``mnist_5k`` comes with the package.
    * ``mnist``, ``fashion_mnist``, ``kmnist``, ``cifar10``, ``svhn_cropped`` and ``smallnorb``
      (both images of a pair as channels, 48x48) are read from TFDS's directory. Sets that are
      missing there are prepared first, without TensorFlow. The decoded images are cached under
      ``$XDG_CACHE_HOME/capsjax`` (``~/.cache/capsjax``).
    * ``multi_mnist``, ``expanded_mnist`` and ``affine_mnist`` are made from ``mnist`` on the device
      by :attr:`Dataset.task`: two digits of different classes in an image of 36x36
      (:class:`Pairs`); one digit at a random position of 40x40 (:class:`Placed`); the same under
      random affine transformations with the ranges of affNIST (:class:`Distorted`).
    * ``affnist`` reads the published images of affNIST.
    * ``image_folder`` reads ``data_dir/train/<class>/`` and ``data_dir/test/<class>/``.

    Args:
      name: one of :func:`names`.
      data_dir: for TFDS sets, the directory of prepared sets, by default ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``; for ``image_folder``, the directory with ``train`` and ``test``;
        for ``affnist``, the directory with ``test_batches``. It may also be an ``.npz`` file in
        which :func:`save_npz` stored the set, or ``mnist`` for the sets made from it. ``mnist_5k``
        ignores it.
      download: whether to download a TFDS set that is not prepared yet.

    Returns:
      The data set.

    Raises:
      DataError: the name is unknown, or the data are missing, damaged or out of reach.

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
            raise DataError(f"{name} cannot be made from {data_dir}: {error}") from None
    if name == "affnist":
        return load_affnist(data_dir)
    if name == "image_folder":
        return load_image_folder(data_dir)
    closest = difflib.get_close_matches(name.lower(), _NAMES, n=1, cutoff=0.5)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    raise DataError(f"unknown data set {name!r}, expected one of {', '.join(_NAMES)}{hint}")


def source_of(name: str) -> str:
    """Name of the data set from whose images a set is made: its own unless made on the device.

    Example:
      >>> from capsjax.data import source_of
      >>> source_of("affine_mnist"), source_of("kmnist")
      ('mnist', 'kmnist')
    """
    return "mnist" if name in _MADE else name


def _by_class(split: Split) -> Split:
    """Sorts a split by label, as drawing pairs requires."""
    order = np.argsort(split.labels, kind="stable")
    return Split(split.images[order], split.labels[order])
