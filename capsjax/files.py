"""Files of this machine: paths as options give them, and writing that never destroys a file."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from capsjax.errors import ConfigError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file that replaces `path` once it is complete; an error leaves the old one.

    Raises:
      OSError: the file cannot be written; the error names `path`.

    Example:
      >>> import pathlib, tempfile
      >>> from capsjax.files import replacing
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   path = pathlib.Path(folder, "page.html")
      ...   with replacing(path) as file:
      ...     file.write(b"text") and path.exists()
      ...   path.read_bytes()
      False
      b'text'
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".capsjax-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file; an error or a crash leaves the old one or the new one."""
    with replacing(path) as file:
        file.write(text.encode())


def expand_paths(options: Any, *names: str) -> None:
    """Expands ``~`` in these options of a frozen dataclass: paths, tuples of paths, or None.

    Raises:
      ConfigError: a path is an address, such as of a bucket.
    """
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        option = "--" + name.replace("_", "-")
        several = isinstance(value, tuple)
        paths = tuple(_expanded(option, path) for path in (value if several else (value,)))
        object.__setattr__(options, name, paths if several else paths[0])


def require_folder(options: Any, name: str) -> None:
    """Raises a ConfigError if a file cannot be written: a directory is missing, or in its place."""
    path, option = getattr(options, name), "--" + name.replace("_", "-")
    if path is not None and path.is_dir():
        raise ConfigError(f"{option} must be a file, {path} is a directory")
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: no directory {path.parent}")


def _expanded(option: str, path: str | os.PathLike[str]) -> Path:
    # pathlib takes "gs://bucket" for a folder "gs:" with a bucket in it.
    if address := re.match(r"([a-z][a-z0-9+.-]+):/+", str(path), re.IGNORECASE):
        rest = str(path)[address.end() :]
        raise ConfigError(
            f"{option} must be a path on this machine, got {address[1]}://{rest}; mount it, or copy"
            " it here"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{option}: no home directory is known for {path}") from None
