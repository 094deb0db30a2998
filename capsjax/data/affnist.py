"""affNIST, read from its published MATLAB files."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from capsjax.data.dataset import Dataset, Split
from capsjax.errors import DataError

_SIDE = 40
_FOLDERS = {"train": "training_and_validation_batches", "test": "test_batches"}


def load_affnist(data_dir: str | os.PathLike[str] | None) -> Dataset:
    """Reads ``data_dir/training_and_validation_batches/*.mat`` and ``data_dir/test_batches/*.mat``.

    These are the folders of the published archives of transformed images. The 1.9 million training
    images may be missing, because the set mainly tests networks trained on ``expanded_mnist``.

    Raises:
      DataError: there are no test images, or a file cannot be read.

    Reference:
      Tieleman, *affNIST*, 2013, a data set.
    """
    if data_dir is None:
        raise DataError("affnist needs --data-dir, a directory with test_batches/*.mat")
    root = Path(data_dir)
    splits = {name: _read_folder(root / folder) for name, folder in _FOLDERS.items()}
    if not len(splits["test"].labels):
        raise DataError(f"affnist expects *.mat files in {root / _FOLDERS['test']}, got none")
    return Dataset("affnist", splits["train"], splits["test"], tuple("0123456789"))


def _read_folder(folder: Path) -> Split:
    def number(path: Path) -> tuple[int, str]:
        return (int(path.stem) if path.stem.isdecimal() else 0), path.name

    parts = [_read(path) for path in sorted(folder.glob("*.mat"), key=number)]
    none = Split(np.empty((0, _SIDE, _SIDE, 1), np.uint8), np.empty(0, np.int32))
    return Split(*(np.concatenate(x) for x in zip(none, *parts, strict=True)))


def _read(path: Path) -> Split:
    from scipy.io import loadmat

    try:
        data: Any = loadmat(path, variable_names=["affNISTdata"], simplify_cells=True)
        images = np.atleast_2d(data["affNISTdata"]["image"])
        labels = np.atleast_1d(data["affNISTdata"]["label_int"])
        # Each column is an image; simplify_cells turns a single column into a row.
        images = images.reshape(_SIDE**2, labels.size)
        if images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype}, expected uint8")
    except Exception as error:  # damaged files raise nearly anything
        raise DataError(f"affnist cannot read {path}: {error or type(error).__name__}") from None
    return Split(images.T.reshape(-1, _SIDE, _SIDE, 1), labels.astype(np.int32))
