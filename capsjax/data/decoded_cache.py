"""Decoded data sets on disk: a second process loads them without decoding again.

The cache is a convenience: whatever is wrong with it, the answer is to decode again.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from capsjax.data.dataset import Split


def cached(
    prepared: Path, key: str, decode: Callable[[], tuple[Split, Split]]
) -> tuple[Split, Split]:
    """Returns what `decode` returns, from the cache where it is there already.

    Args:
      prepared: the directory that is decoded. Its fingerprint (file names, sizes, modification
        times) is part of the entry's name, so a set that was prepared anew is decoded anew.
      key: name and version of the set.
      decode: makes the train and the test split; what it raises goes to the caller.
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
        # Opened here, because np.load leaves the file of a damaged zip open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return (
                Split(stored["train_images"], stored["train_labels"]),
                Split(stored["test_images"], stored["test_labels"]),
            )
    except Exception:  # A damaged zip raises nearly anything, and none of it is the user's problem.
        return None


def _write(path: Path, train: Split, test: Split) -> None:
    """Stores both splits, all of them or nothing; does nothing where it cannot write."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    train_images=train.images,
                    train_labels=train.labels,
                    test_images=test.images,
                    test_labels=test.labels,
                )
            # Readers see no entry or a whole one.
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
