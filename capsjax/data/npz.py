"""Data sets in one NumPy file: your own arrays, or a copy for machines without TFDS."""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capsjax.data.dataset import Dataset, Split
from capsjax.data.tasks import Shifted, Task
from capsjax.errors import DataError
from capsjax.files import replacing

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
# For regression, targets instead of labels.
_TARGETS = ("train_images", "train_targets", "test_images", "test_targets")
_OPTIONAL = ("class_names", "name")

_log = logging.getLogger(__name__)


def save_npz(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Writes a data set to a compressed file, which ``load("npz", data_dir=path)`` reads.

    The file holds the arrays ``train_images``, ``train_labels``, ``test_images``, ``test_labels``
    and ``class_names``, and the set's ``name``. For regression, ``train_targets`` and
    ``test_targets`` replace the labels. The task is not stored; to restore it, ``load`` the file
    under the set's name.

    Raises:
      TypeError: `dataset` is not a :class:`Dataset`.
      ValueError: the path does not end in ``.npz``.

    Example:
      >>> import dataclasses, pathlib, tempfile
      >>> from capsjax.data import load, save_npz
      >>> digits = dataclasses.replace(load("mnist_5k"), name="digits")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   path = pathlib.Path(folder, "digits.npz")
      ...   save_npz(digits, path)
      ...   load("npz", data_dir=path)
      Dataset('digits': 4000 train and 1000 test images of 28x28x1, 10 classes)
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a Dataset, got {dataset!r}")
    path = Path(os.path.expanduser(path))
    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {path}")
    labels = "targets" if dataset.is_regression else "labels"
    arrays: dict[str, Any] = {}
    for split in ("train", "test"):
        images, values = getattr(dataset, split).read()
        arrays |= {f"{split}_images": images, f"{split}_{labels}": values}
    arrays |= {"name": np.array(dataset.name), "class_names": np.array(dataset.class_names)}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def load_npz(path: Path, name: str | None = None, task: Task | None = None) -> Dataset:
    """Reads a file of arrays with the names that :func:`save_npz` uses.

    Args:
      path: the file.
      name: the expected name of the set; any when None.
      task: task of the set; shifted images when None.

    Raises:
      DataError: the file is missing or damaged, or does not hold this data set.
    """
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("file must be an .npz file")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = str(stored["name"]) if "name" in stored else path.stem
            if name not in (None, found):
                raise ValueError(
                    f"file must hold {name}, got {found}; --dataset npz reads files of any name"
                )
            has_targets = _TARGETS[1] in stored and _ARRAYS[1] not in stored
            arrays, convert = (_TARGETS, _targets) if has_targets else (_ARRAYS, _labels)
            if missing := [array for array in arrays if array not in stored]:
                raise ValueError(
                    f"file must hold the arrays {', '.join(arrays)}, and may hold class_names:"
                    f" {', '.join(missing)} missing, got {', '.join(stored) or 'none'}"
                )
            train, test = (
                Split(_images(stored[images]), convert(labels, stored[labels]))
                for images, labels in (arrays[:2], arrays[2:])
            )
            if "class_names" in stored:
                names = tuple(map(str, stored["class_names"]))
            elif train.labels.ndim > 1:
                names = tuple(map(str, range(train.labels.shape[1])))
            else:
                names = _numbers(np.concatenate([train.labels, test.labels]))
            unused = [array for array in stored if array not in (*arrays, *_OPTIONAL)]
        dataset = Dataset(found, train, test, names, task or Shifted())
    except Exception as error:  # a damaged zip raises nearly any exception
        raise DataError(f"data set {name or 'npz'} cannot be read from {path}: {error}") from None
    if unused:
        _log.warning("npz does not use the arrays %s in %s", ", ".join(unused), path)
    return dataset


def _images(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Adds the axis of a single channel, and converts to the machine's byte order and float32."""
    if images.ndim == 3:
        images = images[..., None]
    kind = np.dtype(np.float32) if images.dtype.kind == "f" else images.dtype.newbyteorder("=")
    return images.astype(kind, copy=False)


def _labels(name: str, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Converts whole numbers of any dtype to int32 ``[N]``, or 0 and 1 to bool ``[N, J]``."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    with np.errstate(invalid="ignore"):  # NaN differs from its conversion
        whole = labels.astype(np.int32) if labels.dtype.kind in "biuf" else None
    if whole is None or (whole != labels).any():
        raise ValueError(
            f"{name} must be class indices, whole numbers, got {labels.dtype}"
            f" {list(labels.shape)} such as {labels[:3].tolist()}"
        )
    if whole.ndim == 2:
        if not np.isin(whole, (0, 1)).all():
            raise ValueError(
                f"{name} of shape {list(labels.shape)} must be 0 or 1, got other numbers"
            )
        return whole.astype(np.bool_)
    return whole


def _targets(name: str, targets: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Converts numbers to float32 ``[N, J]``."""
    if targets.dtype.kind not in "biuf" or targets.ndim not in (1, 2):
        raise ValueError(
            f"{name} must be numbers [N] or [N, J], got {targets.dtype} {list(targets.shape)}"
        )
    return (targets if targets.ndim == 2 else targets[:, None]).astype(np.float32)


def _numbers(labels: npt.NDArray[np.int32]) -> tuple[str, ...]:
    """Returns class numbers as class names."""
    number = int(labels.max(initial=0)) + 1
    if number > max(len(labels), 2):
        raise ValueError(
            f"file must hold class_names, as the labels of {len(labels)} images go up to"
            f" {number - 1}"
        )
    return tuple(map(str, range(number)))
