"""Stopping a run from outside: the first signal asks, a second one insists; or a deadline asks."""

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from capsjax.training import processes

# A launcher may pass on a signal that the terminal has sent to all processes, too.
_SAME_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, Ctrl-C and SIGTERM are noted instead of ending the process.

    Between two calls of the devices the run asks whether it is :meth:`requested`, saves and ends. A
    second signal raises KeyboardInterrupt at once. Signals are left alone outside of the main
    thread. Of several processes each may be the one that is signalled.

    Args:
      deadline: the value of `time.monotonic` from which on a stop is requested, too.

    Attributes:
      signal: the signal that came, to any process, or None.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self._deadline = deadline
        self.signal: signal.Signals | None = None
        self._first: tuple[signal.Signals, float] | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._depth = self._turn = 0

    def requested(self) -> bool:
        """Returns whether the run should end; all processes must ask, and hear the same."""
        if self._first is not None:
            processes.ask_to_stop(self._first[0], self._turn)
        is_over, number = processes.first(self._decide, tuple[bool, int])
        self.signal = signal.Signals(number) if number else None
        return is_over

    def _decide(self) -> tuple[bool, int]:
        """Whether the run should end, and the number of the signal or 0."""
        received = self._first[0] if self._first else processes.asked_to_stop(self._turn)
        return received is not None or time.monotonic() >= self._deadline, int(received or 0)

    def __enter__(self) -> Self:
        """Installs the handlers, at the first of several times."""
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
        """Restores the handlers, at the last of several times."""
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
        # Past Python's buffers, which the signal may have come in the middle of.
        with contextlib.suppress(OSError):  # the terminal, or the next program, may be gone
            os.write(2, b"\nstopping: the run will be saved; signal again to quit at once\n")
