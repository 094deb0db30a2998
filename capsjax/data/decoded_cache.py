"""An on-disk cache of decoded data sets, so that only the first process decodes them.

If an entry is missing or damaged, the set is decoded again.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capsjax.data.dataset import Split
from capsjax.files import replacing

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def cached(
    prepared: Path, key: str, decode: Callable[[], tuple[Split, Split]]
) -> tuple[Split, Split]:
    """Returns the train and the test split from the cache, or decodes and stores them.

    Args:
      prepared: the directory to decode. Its fingerprint (file names, sizes, modification times) is
        part of the entry's name, so that a set is decoded again if it has changed.
      key: name and version of the set.
      decode: decodes the train and the test split; its errors propagate.
    """

    def arrays() -> dict[str, npt.NDArray[Any]]:
        train, test = decode()
        return dict(zip(_ARRAYS, (*train, *test), strict=True))

    stored = cached_arrays(prepared, key, _ARRAYS, arrays)
    values = [stored[name] for name in _ARRAYS]
    return Split(*values[:2]), Split(*values[2:])


def cached_arrays(
    prepared: Path,
    key: str,
    names: Sequence[str],
    make: Callable[[], dict[str, npt.NDArray[Any]]],
) -> dict[str, npt.NDArray[Any]]:
    """Returns arrays with these names from the cache, or makes and stores them; see `cached`."""
    path = _entry(prepared, key)
    arrays = _read(path, names)
    if arrays is None:
        arrays = make()
        _write(path, arrays)
    return arrays


def _entry(prepared: Path, key: str) -> Path:
    fingerprint = hashlib.sha256()
    for file in sorted(prepared.iterdir()):
        stat = file.stat()
        fingerprint.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = configured if os.path.isabs(configured) else os.path.expanduser("~/.cache")
    return Path(root, "capsjax", f"{key}-{fingerprint.hexdigest()[:16]}.npz")


def _read(path: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]] | None:
    try:
        # Opened here, because np.load does not close the file of a damaged zip.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except Exception:  # a damaged zip raises nearly any exception
        return None


def _write(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Stores arrays atomically; does nothing if the directory is not writable."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
