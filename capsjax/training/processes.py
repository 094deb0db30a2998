"""Coordinates several processes: all of them get what process 0 reads or decides.

The processes are those of ``jax.distributed`` and communicate through its coordination service. For
a single process, nothing here adds any cost.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils

from capsjax import errors
from capsjax.errors import CapsjaxError, ConfigError, ProcessError
from capsjax.options import flag

T = TypeVar("T")
Tree = TypeVar("Tree")

_PATIENCE = 30 * 60  # seconds to wait for a live process
_heartbeat_timeout = 100.0  # JAX's default, unless `initialize` was given another
_command = "capsjax"  # in messages
_GRACE = 2.0  # seconds for a process to report its own error before it reports another's
_WATCH_SECONDS = 1.0
_KEPT = 1000  # latest answers of process 0 to keep: others may not have read them yet


def know(command: str, heartbeat_timeout: float) -> None:
    """Sets the command's name, for messages, and the heartbeat timeout."""
    global _command, _heartbeat_timeout
    _command, _heartbeat_timeout = command, heartbeat_timeout


def number() -> int:
    """Returns the number of processes, without initialising JAX's devices."""
    return 1 if _client() is None else _state().num_processes


def index() -> int:
    """Returns the index of this process, from 0."""
    return 0 if _client() is None else _state().process_id


def is_first() -> bool:
    """Whether this is process 0, which writes all files of the run."""
    return index() == 0


_counter = itertools.count()
_telling = False


def first(function: Callable[[], T], kind: type[T]) -> T:
    """Calls a function in process 0, and returns its value or raises its error in all processes.

    All processes must make the same calls in the same order.

    Args:
      function: called in process 0 alone.
      kind: type of its value: JSON values, dataclasses or tuples.

    Example:
      >>> from capsjax.training.processes import first
      >>> first(lambda: 3, int)
      3
    """
    global _telling
    if number() == 1 or _telling:
        return function()
    key = f"capsjax/told/{next(_counter)}"
    if not is_first():
        answer = msgspec.msgpack.decode(_wait_for(key, 0), type=_Answer)
        if answer.error is not None:
            answer.error.raise_again()
        return msgspec.msgpack.decode(answer.value, type=kind)
    _telling = True
    try:
        value = function()
        _tell(key, _Answer(msgspec.msgpack.encode(value)))
    except Exception as error:
        _tell(key, _Answer(b"", _Error.of(error)))
        raise
    finally:
        _telling = False
    return value


def decide(value: T) -> T:
    """Returns the value of process 0, a number or a string, in all processes."""
    return first(lambda: value, type(value))


def share(function: Callable[[], Tree], like: Tree) -> Tree:
    """Calls a function in process 0 and returns its arrays in all processes, bit for bit.

    Args:
      function: called in process 0 alone.
      like: arrays, or shapes and dtypes, as the function returns them.
    """
    if number() == 1:
        return function()
    made: list[Tree] = []
    first(lambda: made.append(function()), type(None))
    # As bytes, since broadcasting adds the others' zeros, which would change the sign of -0.
    source = made[0] if made else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    sent = multihost_utils.broadcast_one_to_all(jax.tree.map(_as_bytes, source))
    copied: Tree = jax.tree.map(
        lambda data, x: np.asarray(data).view(x.dtype).reshape(x.shape), sent, like
    )
    return copied


def checksum(tree: Any) -> int:
    """Returns the CRC-32 of all arrays of a tree."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(_as_bytes(leaf).data, total)
    return total


def check_alike(values: Mapping[str, Any], *, what: str) -> None:
    """Raises a ConfigError in all processes unless their values are equal.

    Args:
      values: JSON values to compare, by name.
      what: a word for them, for the message.
    """
    if number() == 1:
        return
    turn = next(_counter)
    _tell(f"capsjax/alike/{turn}/{index()}", dict(values))

    def compare() -> None:
        expected = msgspec.msgpack.decode(msgspec.msgpack.encode(dict(values)))
        for other in range(1, number()):
            found = msgspec.msgpack.decode(_wait_for(f"capsjax/alike/{turn}/{other}", other))
            for name in sorted(expected.keys() | found.keys()):
                here, there = expected.get(name), found.get(name)
                if here != there:
                    raise ConfigError(
                        f"{name} is {_shown(there)} in process {other} and {_shown(here)} in"
                        f" process 0; all need the same {what}"
                    )

    first(compare, type(None))


def check_options(config: Any, *besides: str, others: Mapping[str, Any] | None = None) -> None:
    """Raises a ConfigError in all processes unless they were started with the same options.

    Args:
      config: a dataclass of options.
      besides: options that may differ.
      others: what else was given, by name.
    """
    options = dataclasses.asdict(config).items()
    given = {n: None if v is None else str(v) for n, v in options if n not in besides}
    values = {flag(name): value for name, value in given.items()}
    check_alike({**values, **(others or {})}, what="options")


def next_turn() -> int:
    """Returns a new number, the same in all processes."""
    return next(_counter)


def ask_to_stop(received: signal.Signals, turn: int) -> None:
    """Asks process 0 to stop the work that began with this turn in all processes."""
    if number() > 1:
        key = f"capsjax/stop/{turn}/{index()}"
        _client().key_value_set(key, received.name, allow_overwrite=True)


def asked_to_stop(turn: int) -> signal.Signals | None:
    """In process 0, returns the signal for which a process has asked to stop, or None."""
    asked = _client().key_value_dir_get(f"capsjax/stop/{turn}/") if number() > 1 else []
    return signal.Signals[asked[0][1]] if asked else None


_watched = False
_reported = False


@contextlib.contextmanager
def together() -> Iterator[None]:
    """While entered, a failure of one process ends all of them."""
    global _watched
    if number() == 1 or _watched:
        yield
        return
    _watched, over = True, threading.Event()
    watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
    watcher.start()
    try:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if any(word in str(error) for word in _OF_CONNECTIONS):
                _wait_for_end(error)
            raise
    except BaseException as error:
        report_failure(error)
        raise
    finally:
        over.set()
        _watched = False


def report_failure(error: BaseException) -> None:
    """Tells the other processes that this one fails; process 0 waits until they have ended."""
    global _reported
    client = _client()
    if client is None or number() == 1 or _reported:
        return
    _reported = True
    is_interrupt = isinstance(error, KeyboardInterrupt)  # its text is the signal's number
    text = "interrupted" if is_interrupt else str(error) or type(error).__name__
    with contextlib.suppress(Exception):  # the others may be gone
        client.key_value_set(f"capsjax/failed/{index()}", text, allow_overwrite=True)
        client.key_value_set(f"capsjax/gone/{index()}", "", allow_overwrite=True)
        end = time.monotonic() + 5 * _GRACE
        while is_first() and time.monotonic() < end:
            if len(client.key_value_dir_get("capsjax/gone/")) == number():
                time.sleep(0.2)  # for them to end
                return
            time.sleep(0.1)


def wait_for_all(name: str) -> None:
    """Waits until all processes have reached this point; each name serves once."""
    if number() > 1:
        try:
            _client().wait_at_barrier(name, _PATIENCE * 1000)
        except jax.errors.JaxRuntimeError as error:
            _wait_for_end(error)


def _watch(over: threading.Event) -> None:
    """Ends this process when another one has failed."""
    client = _client()
    while not over.wait(_WATCH_SECONDS):
        try:
            failed = client.key_value_dir_get("capsjax/failed/")
        except Exception:  # process 0 is lost, which the runtime will report
            continue
        others = sorted((int(key.rpartition("/")[2]), text) for key, text in failed)
        others = [(process, text) for process, text in others if process != index()]
        if not others or over.wait(_GRACE):
            continue
        process, text = others[0]
        _end(f"process {process} of {number()} ended: {text}")


def _end(message: str) -> NoReturn:
    """Ends the process from another thread, because the main thread may wait for the devices."""
    print(f"{_command}: error: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        _client().key_value_set(f"capsjax/gone/{index()}", "", allow_overwrite=True)
    os._exit(1)


# Words in the errors of operations on several devices.
_OF_CONNECTIONS = ("Gloo", "gloo", "collective", "peer", "Socket", "NCCL", "UNAVAILABLE")


def _wait_for_end(error: Exception) -> NoReturn:
    """Waits for the runtime to end this process and to report which other one was lost."""
    time.sleep(_heartbeat_timeout + 15)
    line = str(error).partition("\n")[0]
    raise ProcessError(f"the processes lost each other: {line}") from None


class _Error(msgspec.Struct):
    """An error, to be raised again in another process."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> "_Error":
        text = str(error) if isinstance(error, CapsjaxError) else f"process 0: {error!r}"
        if isinstance(error, OSError):
            where = f": {error.filename}" if error.filename else ""
            text = f"process 0: {error.strerror or error}{where}"
        return cls(type(error).__name__, text)

    def raise_again(self) -> NoReturn:
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, CapsjaxError):
            raise kind(self.text)
        raise OSError(self.text) if self.kind in _OS_ERRORS else RuntimeError(self.text)


_OS_ERRORS = {"OSError", *(kind.__name__ for kind in OSError.__subclasses__())}


class _Answer(msgspec.Struct):
    value: bytes
    error: _Error | None = None


def _tell(key: str, value: Any) -> None:
    _client().key_value_set_bytes(key, msgspec.msgpack.encode(value))
    stem, _, turn = key.rpartition("/")
    if stem == "capsjax/told" and int(turn) >= _KEPT:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # that turn was of another kind
            _client().key_value_delete(f"{stem}/{int(turn) - _KEPT}")


def _wait_for(key: str, process: int) -> bytes:
    try:
        data: bytes = _client().blocking_key_value_get_bytes(key, _PATIENCE * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            _wait_for_end(error)
        raise ProcessError(
            f"process {process} is alive, but has not answered for {_PATIENCE // 60} minutes"
        ) from None
    return data


def _as_bytes(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _state() -> Any:
    # JAX has no public name for its coordination service; Orbax uses the same private one.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _state().client
