"""The process of a command: its signals, standard streams, terminal, log and devices."""

import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from capsjax.errors import ConfigError

# The narrowest terminal that help is printed for; tyro loops forever if no word fits.
_NARROWEST = 40
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt for signals that would otherwise end the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(number)

    numbers = [n for n in _SIGNALS if signal.getsignal(n) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is interrupt:
                signal.signal(number, signal.SIG_DFL)


def ignore_signals() -> None:
    """Ignores signals, so that a process whose work is done ends with code 0."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def find_devices() -> None:
    """Initialises JAX's devices; raises a ConfigError if the requested ones are missing."""
    import jax

    # Without a TPU, JAX keeps an installed libtpu from querying the TPU's metadata, but libtpu
    # still reports at length that it is missing; these variables prevent that.
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1" and not _has_tpu():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no such device is visible"
        platforms = os.environ.get("JAX_PLATFORMS", "not set")
        raise ConfigError(f"JAX finds no device, JAX_PLATFORMS is {platforms}: {reason}") from None


def _has_tpu() -> bool:
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


@contextlib.contextmanager
def wide_enough() -> Iterator[None]:
    """Makes a very narrow terminal look wider."""
    given = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if given is not None:
            os.environ["COLUMNS"] = given


def print_any_character() -> None:
    """Escapes characters that a stream's encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")


def quieten_libraries() -> None:
    """Silences other libraries; capsjax reports their failures as its own errors."""
    ours = logging.getLogger("capsjax")
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())
    ours.setLevel(logging.INFO)
    ours.propagate = False
    for name in ("absl", "asyncio", "fsspec", "gcsfs", "google.auth", "s3fs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    previous = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        # At its first error Orbax closes the event loop of its other reads and writes. Each of them
        # would report that, as would each dropped coroutine.
        code = getattr(unraisable.object, "cr_code", None)
        dropped = code is not None and "orbax" in code.co_filename
        if not dropped and str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook


def drop_output() -> None:
    """Discards buffered and all later output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def exit_at_once(code: int) -> NoReturn:
    """Ends the process without Python's shutdown, which would wait for other threads."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
