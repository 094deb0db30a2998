"""How capsjax measures time: programs in alternation, medians and ratios of pairs.

The speed of a machine drifts by more than programs differ: what is compared runs in turn, and the
ratio is taken within each round.
"""

import contextlib
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax


class Times(NamedTuple):
    """Times of one program, one per round.

    Attributes:
      seconds: wall time of each call, until its result is computed.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the calls, seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Fastest and slowest call, seconds."""
        return min(self.seconds), max(self.seconds)

    def ratio(self, other: "Times") -> float:
        """Median over the rounds of this program's time by the other's of the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def alternate(
    programs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float = math.inf,
    pause: float = 0.0,
) -> dict[str, Times]:
    """Calls programs in turn, after one call of each that is not counted.

    Args:
      programs: calls by name; their results are waited for.
      rounds: counted calls of each, at least 1.
      seconds: no further round begins when counted calls have taken this long together and there
        were three rounds.
      pause: seconds to wait before each call, in which the threads of the last program come to
        rest: those of OpenMP spin for a while and take the next program's cores.

    Returns:
      :class:`Times` by name.

    Raises:
      ValueError: there are no rounds.

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
    """Passes through code that keeps exceptions to itself."""


@contextlib.contextmanager
def bounded(seconds: float | None) -> Iterator[None]:
    """Raises a TimeoutError in what takes longer; None for no bound.

    Only the main thread may ask for it, and only Python code is interrupted.
    """
    if seconds is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise _Overdue

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Overdue:
        raise TimeoutError(f"took longer than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
