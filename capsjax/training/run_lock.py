"""Which process may write to a run directory."""

import contextlib
import datetime
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from capsjax.errors import ConfigError, ProcessError
from capsjax.files import is_local, is_lost, naming


class RunLock(Protocol):
    """Lets one process at a time write to a run directory."""

    def held(self) -> contextlib.AbstractContextManager[str | None]:
        """Holds the lock; yields a description of the process that it was taken from, if any."""

    def check(self) -> None:
        """Raises a ProcessError if another process has taken the lock."""


def lock_of(directory: Path) -> RunLock:
    """Returns the lock of a run directory, which must exist if it is on this machine."""
    return _FileLock(directory) if is_local(directory) else _Claim(directory)


class _FileLock:
    """A lock that the operating system frees if its process dies."""

    def __init__(self, directory: Path):
        self._directory, self._path = directory, directory / ".lock"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock.

        Raises:
          ConfigError: another process holds it.
        """
        other = _read(self._path)
        lock = FileLock(self._path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run directory {self._directory} is in use by {other or 'another process'}; wait"
                " for its end, or stop it"
            ) from None
        try:
            self._path.write_text(_this_process())
            yield
        finally:
            lock.release()

    def check(self) -> None:
        """Does nothing: nobody can take the lock."""


class _Claim:
    """An object that names the last process to start, which is the one that may write.

    Object storage has no lock that ends with its process.
    """

    def __init__(self, directory: Path):
        self._directory, self._path = directory, directory / ".lock"
        self._text: str | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[str | None]:
        """Claims the run.

        Raises:
          ConfigError: there is no such bucket.
        """
        before = _read(self._path)
        # A process may start twice in a second.
        self._text = f"{_this_process()} ({secrets.token_hex(4)})"
        try:
            with naming(self._path):
                self._path.write_text(self._text)
        except FileNotFoundError:
            text = f"--run-dir {self._directory} cannot be made: there is no such bucket"
            raise ConfigError(text) from None
        try:
            yield before or None
        except BaseException as error:
            if not is_lost(self._directory, type(error)):  # else the next process takes it over
                self._release()
            raise
        self._release()

    def check(self) -> None:
        """Raises a ProcessError if another process has claimed the run."""
        if self._text is not None and (found := _read(self._path)) != self._text:
            raise ProcessError(
                f"run directory {self._directory} was taken over by {found or 'another process'}"
            )

    def _release(self) -> None:
        with contextlib.suppress(Exception):
            if _read(self._path) == self._text:
                self._path.unlink()
        self._text = None


def _this_process() -> str:
    now = datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {now}"


def _read(path: Path) -> str:
    try:
        with naming(path):
            return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""
