"""Data sets as one NumPy file, for machines without TFDS (floor 4)."""

from pathlib import Path

import numpy as np

from capsjax.data.dataset import DataError, Dataset, Split
from capsjax.data.tasks import Task


def save_npz(dataset: Dataset, path: Path) -> None:
    """Writes a data set's images, labels and class names, compressed.

    ``load(name, data_dir=path)`` reads it in place of TFDS's directory.

    Example:
      >>> import pathlib, tempfile
      >>> from capsjax.data import load, save_npz
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   path = pathlib.Path(folder, "digits.npz")
      ...   save_npz(load("mnist_5k"), path)
      ...   load("mnist", data_dir=path)
      Dataset('mnist': 4000 train and 1000 test images of 28x28x1, 10 classes)
    """
    arrays = {
        f"{name}_{kind}": array
        for name in ("train", "test")
        for kind, array in getattr(dataset, name)._asdict().items()
    }
    with path.open("wb") as file:
        np.savez_compressed(file, class_names=np.array(dataset.class_names), **arrays)


def load_npz(name: str, path: Path, task: Task) -> Dataset:
    """Reads what :func:`save_npz` wrote.

    Raises:
      DataError: the file is missing, damaged, or holds something else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            train, test = (
                Split(stored[f"{split}_images"], stored[f"{split}_labels"])
                for split in ("train", "test")
            )
            return Dataset(name, train, test, tuple(map(str, stored["class_names"])), task)
    except Exception as error:  # a damaged zip raises nearly anything
        raise DataError(f"data set {name} cannot be read from {path}: {error}") from None
