"""Decoded data sets on disk: a second process loads in a moment, without TFDS (floor 4).

Decoding MNIST's 70,000 PNGs takes seconds, reading the same pixels as an uncompressed npz a tenth
of one. The cache is a convenience: whatever is wrong with it, the answer is to decode again.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from capsjax.data.dataset import Dataset, Split


def cache_path(name: str, version: str, prepared: Path) -> Path:
    """Returns where the decoded form of a prepared directory belongs; it need not exist.

    The file name carries a fingerprint of the directory (file names, sizes, modification times),
    so a set that was prepared anew is decoded anew.
    """
    fingerprint = hashlib.sha256()
    for file in sorted(prepared.iterdir()):
        stat = file.stat()
        fingerprint.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return _cache_root() / f"{name}-{version}-{fingerprint.hexdigest()[:16]}.npz"


def _cache_root() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = configured if os.path.isabs(configured) else os.path.expanduser("~/.cache")
    return Path(root, "capsjax")


def read_cached(path: Path, name: str) -> Dataset | None:
    """Returns the data set stored at `path`, or None where there is none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Dataset(
                name,
                train=Split(stored["train_images"], stored["train_labels"]),
                test=Split(stored["test_images"], stored["test_labels"]),
                class_names=tuple(stored["class_names"].tolist()),
            )
    except Exception:  # A damaged zip raises nearly anything, and none of it is the user's problem.
        return None


def write_cached(path: Path, dataset: Dataset) -> None:
    """Stores a data set at `path`, all of it or nothing; does nothing where it cannot write."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    train_images=dataset.train.images,
                    train_labels=dataset.train.labels,
                    test_images=dataset.test.images,
                    test_labels=dataset.test.labels,
                    class_names=np.array(dataset.class_names),
                )
            # Readers see the old file, no file, or the whole new file.
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
