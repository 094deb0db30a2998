"""Loads data sets by name."""

import dataclasses
import difflib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from capsjax.data.affnist import load_affnist
from capsjax.data.dataset import Dataset, Split
from capsjax.data.embedded import load_mnist_5k
from capsjax.data.image_folder import load_image_folder
from capsjax.data.npz import load_npz
from capsjax.data.tasks import Distorted, Pairs, Placed, Task
from capsjax.data.tfds_prepared import PREFIX as TFDS_PREFIX
from capsjax.data.tfds_prepared import open_prepared
from capsjax.data.tfds_source import NAMES as TFDS_NAMES
from capsjax.data.tfds_source import load_tfds
from capsjax.data.tfds_source import task_of as tfds_task_of
from capsjax.errors import DataError

# Sets that are generated from MNIST on the device and never stored.
_MADE: dict[str, Task] = {
    "multi_mnist": Pairs(),
    "expanded_mnist": Placed(),
    "affine_mnist": Distorted(),
}
_NAMES = ("mnist_5k", *TFDS_NAMES, *_MADE, "affnist", "image_folder", "npz")


def names() -> tuple[str, ...]:
    """Returns the names of the data sets that :func:`load` can load.

    Example:
      >>> from capsjax.data import names
      >>> names()
      ('mnist_5k', 'mnist', 'fashion_mnist', 'kmnist', 'cifar10', 'svhn_cropped', 'smallnorb',
       'multi_mnist', 'expanded_mnist', 'affine_mnist', 'affnist', 'image_folder', 'npz')
    """
    return _NAMES


def load(
    name: str = "mnist_5k",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    image_size: int | None = None,
    channels: int | None = None,
    in_memory: bool | Callable[[int], bool] = True,
) -> Dataset:
    """Loads a data set.

    Images are decoded into memory unless `in_memory` says otherwise.

    * ``mnist_5k`` is part of the package.
    * ``mnist``, ``fashion_mnist``, ``kmnist``, ``cifar10``, ``svhn_cropped`` and ``smallnorb``
      (both images of a pair as channels, 48x48) are read from TFDS's directory. Missing sets are
      prepared first, without TensorFlow. The decoded images are cached under
      ``$XDG_CACHE_HOME/capsjax`` (``~/.cache/capsjax``).
    * ``tfds:NAME[/CONFIG][:VERSION]`` is any set that TFDS has prepared as array_record or TFRecord
      and whose examples have one image and one class. Test images are those of the split ``test``,
      or else of ``validation``; if neither has labels, a tenth of each class of ``train``. The
      first time, a scan reads the labels and caches them like decoded images.
    * ``multi_mnist``, ``expanded_mnist`` and ``affine_mnist`` are generated from ``mnist`` on the
      device by :attr:`Dataset.task`: two digits of different classes in an image of 36x36
      (:class:`Pairs`); one digit at a random position of 40x40 (:class:`Placed`); the same under
      random affine transformations with the ranges of affNIST (:class:`Distorted`).
    * ``affnist`` reads the published images of affNIST.
    * ``image_folder`` reads the images in ``data_dir/train/<class>/`` and
      ``data_dir/test/<class>/`` (png, jpg, tif, webp, bmp, gif, pgm, ppm) and their subfolders.
      Without ``test``, a tenth of each class is held out; without ``train`` either, the class
      folders are those in ``data_dir``. Images are rotated by their EXIF orientation; 16-bit and
      floating-point grayscale images keep their precision; transparent pixels are blended with
      white unless `channels` is 4. A warning counts unused files.
    * ``npz`` reads arrays from the NumPy file ``data_dir``, written by ``numpy.savez`` or
      :func:`save_npz`: ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` and,
      optionally, ``class_names``. Images are uint8, uint16 or floating-point in [0, 1],
      ``[N, H, W, C]`` or ``[N, H, W]``; labels are whole numbers from 0, ``[N]`` or ``[N, 1]``, or
      0 and 1 for several classes per image, ``[N, J]``.

    Args:
      name: one of :func:`names`, or ``tfds:NAME[/CONFIG][:VERSION]``.
      data_dir: for TFDS sets, the directory of prepared sets, by default ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``; for ``image_folder``, the directory with ``train`` and ``test``;
        for ``affnist``, the directory with ``test_batches``; for ``npz``, the file. Instead of a
        directory it may also be an ``.npz`` file written by :func:`save_npz`: of the set, or of
        ``mnist`` for the sets generated from it. ``mnist_5k`` ignores it.
      download: whether to download a TFDS set that is not prepared yet.
      image_size: for ``image_folder`` and ``tfds:``, rows and columns. Each image is scaled, and
        its longer side cropped at both ends. When None, all images must have the same size, which
        is kept.
      channels: for ``image_folder`` and ``tfds:``, 1 (gray), 3 (RGB) or 4 (with transparency). When
        None, the set's own number; for files, 1 for grayscale images and 3 for others. All images
        must have the same number.
      in_memory: whether to decode the images of ``image_folder`` and ``tfds:`` now. Otherwise each
        is read on demand, and the splits are :class:`StoredSplit`. May be a function of the bytes
        of all decoded images.

    Returns:
      The data set.

    Raises:
      TypeError: the name is not a string.
      DataError: the name is unknown, the data are missing, damaged or inaccessible, or
        `image_size` or `channels` is given for a set other than ``image_folder`` and ``tfds:``.

    Example:
      >>> from capsjax.data import load
      >>> load().image_shape
      (28, 28, 1)
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name in _NAMES and name != "image_folder" and (image_size or channels):
        raise DataError(
            f"--image-size and --channels are for image_folder and tfds:, not for {name}"
        )
    fits = in_memory if callable(in_memory) else lambda _: in_memory
    if name == "mnist_5k":
        return load_mnist_5k()
    path = None if data_dir is None else Path(os.path.expanduser(data_dir))
    if name == "npz":
        if path is None:
            raise DataError("npz needs --data-dir, an .npz file of arrays")
        return load_npz(path)
    if path is not None and path.suffix == ".npz" and name in _NAMES and name not in _MADE:
        return load_npz(path, name, task_of(name))
    if name in TFDS_NAMES:
        return load_tfds(name, path, download=download)
    if name in _MADE:
        digits = load("mnist", data_dir=path, download=download)
        try:
            train, test = (_by_class(split.read()) for split in (digits.train, digits.test))
            return Dataset(name, train, test, digits.class_names, _MADE[name])
        except ValueError as error:
            raise DataError(f"{name} cannot be made from {path}: {error}") from None
    if name == "affnist":
        return load_affnist(path)
    if name == "image_folder":
        decides = None if in_memory is True else fits
        return load_image_folder(path, image_size=image_size, channels=channels, in_memory=decides)
    if name.startswith(TFDS_PREFIX):
        prepared = name.removeprefix(TFDS_PREFIX)
        dataset = open_prepared(prepared, path, image_size=image_size, channels=channels)
        if not fits(dataset.train.images.nbytes + dataset.test.images.nbytes):
            return dataset
        return dataclasses.replace(dataset, train=dataset.train.read(), test=dataset.test.read())
    if name.endswith(".npz"):
        raise DataError(f"unknown data set {name!r}; load a file as npz with data_dir={name!r}")
    closest = difflib.get_close_matches(name.lower(), _NAMES, n=1, cutoff=0.5)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    raise DataError(
        f"unknown data set {name!r}, expected one of {', '.join(_NAMES)}, or tfds:NAME of a"
        f" prepared set{hint}"
    )


def is_name(name: str) -> bool:
    """Whether :func:`load` accepts this name; a prepared set need not exist.

    Example:
      >>> from capsjax.data import is_name
      >>> is_name("mnist"), is_name("tfds:food101"), is_name("food101")
      (True, True, False)
    """
    return name in _NAMES or name.startswith(TFDS_PREFIX)


def source_of(name: str) -> str:
    """Returns the data set whose images a set is generated from, or the set itself.

    Example:
      >>> from capsjax.data import source_of
      >>> source_of("affine_mnist"), source_of("kmnist")
      ('mnist', 'kmnist')
    """
    return "mnist" if name in _MADE else name


def task_of(name: str) -> Task:
    """Returns the task of a data set, which makes the network's inputs from its images."""
    return _MADE.get(name) or tfds_task_of(name)


def _by_class(split: Split) -> Split:
    """Sorts a split by label, as drawing pairs requires."""
    if split.labels.ndim > 1:
        raise ValueError("labels must be class indices, got several classes for an image")
    order = np.argsort(split.labels, kind="stable")
    return Split(split.images[order], split.labels[order])
