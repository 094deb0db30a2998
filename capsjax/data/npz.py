"""Data sets in one NumPy file, for machines without TFDS."""

import os
import zipfile
from pathlib import Path

import numpy as np

from capsjax.data.dataset import Dataset, Split
from capsjax.data.tasks import Task
from capsjax.errors import DataError
from capsjax.files import replacing


def save_npz(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Writes a data set to a compressed file, which ``load(name, data_dir=path)`` reads.

    The file holds the name, the images, the labels and the class names, but not the task.

    Raises:
      ValueError: the path does not end in ``.npz``.

    Example:
      >>> import dataclasses, pathlib, tempfile
      >>> from capsjax.data import load, save_npz
      >>> digits = dataclasses.replace(load("mnist_5k"), name="mnist")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   path = pathlib.Path(folder, "digits.npz")
      ...   save_npz(digits, path)
      ...   load("mnist", data_dir=path)
      Dataset('mnist': 4000 train and 1000 test images of 28x28x1, 10 classes)
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {path}")
    arrays = {
        f"{name}_{kind}": array
        for name in ("train", "test")
        for kind, array in getattr(dataset, name)._asdict().items()
    }
    arrays |= {"name": np.array(dataset.name), "class_names": np.array(dataset.class_names)}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def load_npz(name: str, path: Path, task: Task) -> Dataset:
    """Reads a file of :func:`save_npz`.

    Raises:
      DataError: the file is missing or damaged, or holds another data set.
    """
    try:
        if path.exists() and not zipfile.is_zipfile(path):
            raise ValueError("file must be an .npz file")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = str(stored["name"])
            if found != name:
                raise ValueError(f"file must hold {name}, got {found}")
            train, test = (
                Split(stored[f"{split}_images"], stored[f"{split}_labels"])
                for split in ("train", "test")
            )
            return Dataset(name, train, test, tuple(map(str, stored["class_names"])), task)
    except Exception as error:  # a damaged zip raises nearly any exception
        raise DataError(f"data set {name} cannot be read from {path}: {error}") from None
