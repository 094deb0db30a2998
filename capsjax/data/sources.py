"""Data sets by name: the one way in (floor 4)."""

import difflib
import os
from pathlib import Path

from capsjax.data.dataset import DataError, Dataset
from capsjax.data.embedded import load_mnist_5k
from capsjax.data.image_folder import load_image_folder
from capsjax.data.tfds_source import NAMES as TFDS_NAMES
from capsjax.data.tfds_source import load_tfds

_NAMES = ("mnist_5k", *TFDS_NAMES, "image_folder")


def names() -> tuple[str, ...]:
    """Returns the names `load` knows.

    Example:
      >>> from capsjax.data import names
      >>> names()
      ('mnist_5k', 'mnist', 'fashion_mnist', 'kmnist', 'image_folder')
    """
    return _NAMES


def load(
    name: str = "mnist_5k",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
) -> Dataset:
    """Returns a data set, whole and decoded, as uint8 images and int32 labels.

    ``mnist_5k`` comes with the package. ``mnist``, ``fashion_mnist`` and ``kmnist`` are read from
    TFDS's directory, prepared there first where they are missing (without TensorFlow), and kept
    decoded under ``$XDG_CACHE_HOME/capsjax`` (``~/.cache/capsjax``) for the next process.
    ``image_folder`` reads ``data_dir/train/<class>/`` and ``data_dir/test/<class>/``.

    Args:
      name: one of `names()`.
      data_dir: for TFDS sets, the directory that holds (or shall hold) prepared sets, by default
        TFDS's own: ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``. For ``image_folder``, the
        directory with ``train`` and ``test``. ``mnist_5k`` needs none and ignores it.
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
    if name in TFDS_NAMES:
        return load_tfds(name, None if data_dir is None else Path(data_dir), download=download)
    if name == "image_folder":
        return load_image_folder(data_dir)
    closest = difflib.get_close_matches(name.lower(), _NAMES, n=1, cutoff=0.5)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    raise DataError(f"unknown data set {name!r}, expected one of {', '.join(_NAMES)}{hint}")
