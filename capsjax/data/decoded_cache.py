"""A cache of decoded data sets on disk, so that only the first process has to decode them.

If an entry is missing or damaged, the set is decoded again.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from capsjax.data.dataset import Split
from capsjax.files import replacing


def cached(
    prepared: Path, key: str, decode: Callable[[], tuple[Split, Split]]
) -> tuple[Split, Split]:
    """Returns the train and the test split from the cache, or decodes and stores them.

    Args:
      prepared: the directory to decode. Its fingerprint (file names, sizes, modification times) is
        part of the entry's name, so that a set is decoded again if it has changed.
      key: name and version of the set.
      decode: decodes the train and the test split; its errors are passed on.
    """
    path = _entry(prepared, key)
    splits = _read(path)
    if splits is None:
        splits = decode()
        _write(path, *splits)
    return splits


def _entry(prepared: Path, key: str) -> Path:
    fingerprint = hashlib.sha256()
    for file in sorted(prepared.iterdir()):
        stat = file.stat()
        fingerprint.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = configured if os.path.isabs(configured) else os.path.expanduser("~/.cache")
    return Path(root, "capsjax", f"{key}-{fingerprint.hexdigest()[:16]}.npz")


def _read(path: Path) -> tuple[Split, Split] | None:
    try:
        # Opened here, because np.load does not close the file of a damaged zip.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return (
                Split(stored["train_images"], stored["train_labels"]),
                Split(stored["test_images"], stored["test_labels"]),
            )
    except Exception:  # a damaged zip raises nearly any exception
        return None


def _write(path: Path, train: Split, test: Split) -> None:
    """Stores both splits atomically; does nothing if the directory is not writable."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(
                file,
                train_images=train.images,
                train_labels=train.labels,
                test_images=test.images,
                test_labels=test.labels,
            )
