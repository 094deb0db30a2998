"""Reports of a run while it trains: a progress bar, lines, JSON lines, TensorBoard."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capsjax.errors import naming
from capsjax.training.run_directory import RunDirectory

_FLUSH_SECONDS = 10.0  # between two writes of events to the disk


class Report:
    """Shows and records the metrics of runs that train together; a context manager.

    Args:
      directories: receive the metrics, each those of its run.
      total_steps: steps of the whole run.
      step: the step at which this process begins.
      tensorboard: whether to write event files too.
      console: where lines and the bar go; standard error by default, so that standard output
        holds the result alone.
    """

    def __init__(
        self,
        directories: Sequence[RunDirectory],
        *,
        total_steps: int,
        step: int,
        tensorboard: bool,
        console: Console | None = None,
    ):
        self._directories = directories
        self._started = time.monotonic()
        written = directories if tensorboard else ()
        self._events = [_Events(directory.tensorboard, step) for directory in written]
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            expand=True,
            speed_estimate_period=60,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "compiling", total=total_steps, completed=step, status=""
        )

    def __enter__(self) -> Self:
        """Starts the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the bar and closes the event files."""
        self._progress.stop()
        for events in self._events:
            # A full disk has been reported where it first showed; a second report adds nothing.
            with contextlib.suppress(OSError):
                events.close()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def progress(self, step: int, loss: float, error: float, examples_per_second: float) -> None:
        """Moves the bar."""
        status = f"{examples_per_second:,.0f} examples/s  loss {loss:.4f}  error {error:.1%}"
        self._progress.update(self._task, completed=step, description="training", status=status)

    @contextlib.contextmanager
    def evaluating(self, what: str) -> Iterator[None]:
        """Shows what is being evaluated."""
        self._progress.update(self._task, description=what)
        yield
        self._progress.update(self._task, description="training")

    def record(self, split: str, step: int, metrics: Sequence[Mapping[str, float]]) -> None:
        """Records the metrics of a split at a step, of each run."""
        seconds = round(time.monotonic() - self._started, 3)
        for directory, values in zip(self._directories, metrics, strict=True):
            finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
            directory.append_metrics({"split": split, "step": step, "seconds": seconds, **finite})
        for events, values in zip(self._events, metrics, strict=False):
            events.add({f"{split}/{name}": value for name, value in values.items()}, step)


class _Events:
    """TensorBoard's event file of a run, which this process and thread write themselves."""

    def __init__(self, directory: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory
        self._writer = EventsWriter(str(directory / "events"))
        self._flushed = time.monotonic()
        # Hides what a resumed run does again.
        self._write(step + 1, session_log={"status": "START"})

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Adds scalars; TensorBoard shows them after some seconds."""
        scalars = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self._write(step, summary={"value": scalars})
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            with naming(self._path):
                self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def _write(self, step: int, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with naming(self._path):
            self._writer.write_event(Event(wall_time=time.time(), step=step, **fields))
