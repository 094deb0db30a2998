"""Programs in alternation: order, rounds, ratios of pairs."""

import contextlib
import gc
import signal
import time

import pytest

from capsjax.bench import Times, alternate
from capsjax.bench.processes.timing import call_within


def test_ratios_are_of_pairs():
    # The machine became ten times slower after the first round; the programs' ratio stayed.
    fast, slow = Times((1.0, 10.0, 12.0)), Times((2.0, 20.0, 24.0))
    assert slow.ratio(fast) == 2.0
    assert fast.median == 10.0
    assert fast.spread == (1.0, 12.0)


def test_programs_run_in_turn_after_a_call_that_is_not_counted():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert "".join(calls) == "ab" + "abab"
    assert {name: len(each.seconds) for name, each in times.items()} == {"a": 2, "b": 2}


@pytest.fixture
def work(monkeypatch):
    """A call that takes two seconds by the clock, and none in truth."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda: now.__setitem__(0, now[0] + 2)


def test_times_are_seconds(work):
    assert alternate({"work": work}, rounds=2)["work"].seconds == (2, 2)


def test_rounds_end_with_the_time_but_not_before_three(work):
    def count(seconds):
        return len(alternate({"work": work}, rounds=6, seconds=seconds)["work"].seconds)

    assert [count(0.0), count(7.0), count(60.0)] == [3, 4, 6]


def test_no_rounds_are_named():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        alternate({}, rounds=0)


def test_what_takes_too_long_is_ended_though_it_keeps_exceptions_to_itself():
    def busy():
        while True:
            with contextlib.suppress(Exception):
                sum(range(100))

    with pytest.raises(TimeoutError, match="took longer than 0.5 seconds"):
        call_within(0.5, busy)
    assert call_within(60.0, lambda: call_within(None, lambda: 3)) == 3


def test_an_alarm_at_the_end_of_a_call_is_a_timeout_too():
    def wait(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return True

    before = signal.getsignal(signal.SIGALRM)
    gc.disable()  # what is raised in a callback of the collector, as of JAX, is only reported
    try:
        for n in range(400):
            with contextlib.suppress(TimeoutError):
                assert call_within(2e-4, lambda n=n: wait(1e-4 + 5e-7 * n))
            assert signal.getsignal(signal.SIGALRM) is before
            assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        gc.enable()
