"""Stopping a run from outside: the first signal asks, a second one insists; or a deadline asks."""

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, Ctrl-C and SIGTERM are noted instead of ending the process.

    Between two calls of the devices the run asks whether it is :meth:`requested`, saves and ends. A
    second signal raises KeyboardInterrupt at once. Signals are left alone outside of the main
    thread.

    Args:
      deadline: the value of `time.monotonic` from which on a stop is requested, too.

    Attributes:
      signal: the signal that came, or None.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self._deadline = deadline
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def requested(self) -> bool:
        """Returns whether the run should end."""
        return self.signal is not None or time.monotonic() >= self._deadline

    def __enter__(self) -> Self:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restores the handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # Past Python's buffers, which the signal may have come in the middle of.
        with contextlib.suppress(OSError):  # the terminal, or the next program, may be gone
            os.write(2, b"\nstopping: what is done will be saved; once more to quit at once\n")
