"""Times programs in alternation: medians, and ratios of pairs.

The speed of a machine drifts by more than programs differ. Programs to compare therefore run in
turn, and ratios are taken within each round.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

T = TypeVar("T")


class Times(NamedTuple):
    """Times of one program, one per round.

    Attributes:
      seconds: wall time of each call, until its result is ready.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the calls, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Fastest and slowest call, in seconds."""
        return min(self.seconds), max(self.seconds)

    def ratio(self, other: "Times") -> float:
        """Median over the rounds of the ratio of this program's time to the other's."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def alternate(
    programs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float = math.inf,
    pause: float = 0.0,
) -> dict[str, Times]:
    """Times calls of programs in turn, after one uncounted call of each.

    Args:
      programs: calls by name; their results are awaited.
      rounds: number of counted calls of each, at least 1.
      seconds: after three rounds, no further round begins once the counted calls have taken this
        long in total.
      pause: seconds to wait before each call. OpenMP threads of the last program spin for a while
        and would take the next program's cores.

    Returns:
      :class:`Times` by name.

    Raises:
      ValueError: `rounds` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.bench import alternate
      >>> x = jnp.ones((100, 100))
      >>> times = alternate({"sum": lambda: x.sum(), "product": lambda: x @ x}, rounds=3)
      >>> len(times["sum"].seconds), times["product"].ratio(times["product"])
      (3, 1.0)
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for program in programs.values():
        jax.block_until_ready(program())
    found: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds):
        if number >= 3 and sum(map(sum, found.values())) >= seconds:
            break
        for name, program in programs.items():
            time.sleep(pause)
            start = time.perf_counter()
            jax.block_until_ready(program())
            found[name].append(time.perf_counter() - start)
    return {name: Times(tuple(each)) for name, each in found.items()}


class _Overdue(BaseException):
    """Passes through code that catches every Exception."""


def call_within(seconds: float | None, function: Callable[[], T]) -> T:
    """Calls a function, or raises a TimeoutError if it takes longer; None for no limit.

    Works only in the main thread, and interrupts only Python code.
    """
    if seconds is None:
        return function()

    def stop(*_: Any) -> None:
        raise _Overdue

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return function()
        finally:  # where the alarm may still ring
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Overdue:
        raise TimeoutError(f"took longer than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
