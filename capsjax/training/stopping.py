"""Stops a run on a signal or at a deadline; a second signal ends the process at once."""

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from capsjax.training import processes

# A launcher may pass on a signal that the terminal also sent to all processes.
_SAME_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, Ctrl-C and SIGTERM are recorded instead of ending the process.

    The run checks :meth:`requested` between dispatches, and then saves and ends. A second signal
    raises KeyboardInterrupt at once. Outside the main thread, signals are not handled. With several
    processes, a signal to any of them stops all.

    Args:
      deadline: the value of `time.monotonic` from which a stop is requested too.

    Attributes:
      signal: the signal that any process received, or None.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self._deadline = deadline
        self.signal: signal.Signals | None = None
        self._first: tuple[signal.Signals, float] | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._depth = self._turn = 0

    def requested(self) -> bool:
        """Returns whether the run should end, the same in all processes; all must call this."""
        if self._first is not None:
            processes.ask_to_stop(self._first[0], self._turn)
        is_over, number = processes.first(self._decide, tuple[bool, int])
        self.signal = signal.Signals(number) if number else None
        return is_over

    def _decide(self) -> tuple[bool, int]:
        """Returns whether the run should end, and the number of the signal or 0."""
        received = self._first[0] if self._first else processes.asked_to_stop(self._turn)
        return received is not None or time.monotonic() >= self._deadline, int(received or 0)

    def __enter__(self) -> Self:
        """Installs the handlers, at the outermost entry."""
        self._depth += 1
        if self._depth > 1:
            return self
        self._turn = processes.next_turn()
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
        """Restores the handlers, at the outermost exit."""
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is not None:
            if processes.number() > 1 and now - self._first[1] < _SAME_SECONDS:
                return
            raise KeyboardInterrupt(number)
        self.signal = signal.Signals(number)
        self._first = self.signal, now
        # Bypasses Python's buffers, which may be in the middle of a write.
        with contextlib.suppress(OSError):  # the reader may be gone
            os.write(2, b"\nstopping: the run will be saved; signal again to quit at once\n")
