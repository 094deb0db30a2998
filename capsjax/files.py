"""Files: paths of this machine or of object storage, and writing that never destroys a file.

A path is a `pathlib.Path` on this machine. The path of a run may be a URL of object storage, such
as ``gs://bucket/run``: then it is an `etils.epath.Path`, which has the methods of `pathlib.Path`
that are used here but is no subclass.
"""

import contextlib
import csv
import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from capsjax.errors import CapsjaxError, ConfigError, how_to_install


def is_local(path: Path) -> bool:
    """Returns whether a path is one of this machine's file system, not a URL."""
    return isinstance(path, Path)


def is_lost(path: Path, error: type[BaseException] | None) -> bool:
    """Returns whether to leave files as they are after an error.

    Object storage that has failed, or that the user does not wait for, may not answer.
    """
    gone = error is not None and issubclass(error, OSError | KeyboardInterrupt)
    return gone and not is_local(path)


def absolute(path: Path) -> Path:
    """Returns a path that does not depend on the working directory; a URL as it is."""
    return path.absolute() if is_local(path) else path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file name to operating-system errors, which lack it if a read or write fails.

    Errors of object storage, whose libraries have classes of their own, become OSErrors.
    """
    try:
        yield
    except CapsjaxError:
        raise
    except OSError as error:
        if error.strerror is None and not is_local(path):
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            number = errno.ENOENT if kind is FileNotFoundError else errno.EIO
            text = "no answer" if isinstance(error, TimeoutError) else str(error)
            raise kind(number, text, str(path)) from error
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if is_local(path):
            raise
        if isinstance(error, ImportError):
            extra = f": {how_to_install('gcs')}" if str(path).startswith("gs:") else ""
            raise ConfigError(f"{path} needs a package{extra} ({error})") from None
        text = " ".join(str(error).split()) or type(error).__name__
        raise OSError(errno.EIO, text, str(path)) from error


def remove_tree(path: Path) -> None:
    """Removes a directory and its contents; errors on this machine are ignored."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.rmtree(missing_ok=True)  # type: ignore[attr-defined]


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
    if not is_local(path):
        # An object appears once all of it is uploaded, and closing a file uploads it even after an
        # error in the block.
        buffer = io.BytesIO()
        yield buffer
        with naming(path):
            path.write_bytes(buffer.getvalue())
        return
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


def write_csv(path: Path, heading: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a UTF-8 CSV file; an error or a crash leaves the old one or the new one."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(heading)
    lines.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file; an error or a crash leaves the old one or the new one.

    Names of files, which need not be UTF-8, keep their bytes.
    """
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))
