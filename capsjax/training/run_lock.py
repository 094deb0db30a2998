"""Which process may write to a run directory."""

import contextlib
import datetime
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from capsjax.errors import ConfigError
from capsjax.files import is_local, naming


class RunLock:
    """Lets one process at a time write to a run directory.

    On this machine the operating system keeps the lock, and frees it if the process dies. Object
    storage has no such lock: there the last process to start takes the run over, and the one before
    it ends with an error before it writes again, see :meth:`check`.

    Args:
      directory: of the run; it must exist.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._path = directory / ".lock"
        self._claim: str | None = None  # what this process wrote to object storage

    @contextlib.contextmanager
    def held(self) -> Iterator[str | None]:
        """Holds the lock; yields the process that a run in object storage was taken from, if any.

        Raises:
          ConfigError: another process on this machine holds the lock, or the bucket is missing.
        """
        now = datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        if is_local(self._directory):
            with self._locked(holder):
                yield None
            return
        before = self._read()
        self._claim = f"{holder} ({secrets.token_hex(4)})"  # a process may start twice in a second
        try:
            with naming(self._path):
                self._path.write_text(self._claim)
        except FileNotFoundError:
            raise ConfigError(
                f"--run-dir {self._directory} cannot be made: no such bucket"
            ) from None
        try:
            yield before or None
        finally:
            with contextlib.suppress(Exception):  # such as the error that ended the run
                if self._read() == self._claim:
                    self._path.unlink()
            self._claim = None

    def check(self) -> None:
        """Raises a ConfigError if another process has taken the run over."""
        if self._claim is not None and (found := self._read()) != self._claim:
            raise ConfigError(
                f"run directory {self._directory} was taken over by {found or 'another process'};"
                " this process ends"
            )

    @contextlib.contextmanager
    def _locked(self, holder: str) -> Iterator[None]:
        other = self._read()
        lock = FileLock(self._path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run directory {self._directory} is in use by {other or 'another process'}; wait"
                " for its end, or stop it"
            ) from None
        try:
            self._path.write_text(holder)
            yield
        finally:
            lock.release()

    def _read(self) -> str:
        with naming(self._path):
            data = self._path.read_bytes() if self._path.exists() else b""
        return data.decode(errors="replace")
