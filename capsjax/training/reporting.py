"""Reports of a run while it trains: a progress bar, lines, JSON lines, TensorBoard."""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capsjax.errors import ProcessError
from capsjax.files import is_local, is_lost, naming
from capsjax.training import processes
from capsjax.training.files import finite
from capsjax.training.run_directory import RunDirectory

_FLUSH_SECONDS = 10.0  # between two writes of events to disk, or uploads
# Seconds of training, without compilation, after which the total time is predicted.
_ENOUGH_SECONDS = 3


def say(line: str, console: Console | None = None) -> None:
    """Prints a line on standard error, in process 0 only."""
    console = console or _console()
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _console() -> Console:
    return Console(stderr=True, quiet=not processes.is_first())


class Report:
    """Shows and records the metrics of runs that train together; a context manager.

    Args:
      directories: where the metrics of each run go.
      total_steps: number of steps of the whole run.
      step: the step at which this process begins.
      seconds: time that the steps before it took.
      tensorboard: whether to write event files too.
      console: where lines and the bar are printed; by default standard error, which leaves
        standard output to the result.
    """

    def __init__(
        self,
        directories: Sequence[RunDirectory],
        *,
        total_steps: int,
        step: int,
        seconds: float = 0.0,
        tensorboard: bool,
        console: Console | None = None,
    ):
        # Only process 0 writes files.
        directories = directories if processes.is_first() else ()
        self._spools = [_Spool(directory) for directory in directories]
        self._num_steps = total_steps - step
        self._measured: tuple[int, float] | None = None
        self._flushed = time.monotonic()
        self._started = self._flushed - seconds
        written = self._spools if tensorboard else ()
        self._events = [_Events(spool.directory.tensorboard, step) for spool in written]
        self._console = console or _console()
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
            # A full disk was reported at the first failed write; a second report adds nothing.
            with contextlib.suppress(OSError):
                events.close()
        for spool in self._spools:
            with contextlib.suppress(OSError, ProcessError):
                spool.close(kind)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        say(line, self._progress.console)

    def progress(self, step: int, loss: float, error: float, examples_per_second: float) -> None:
        """Moves the bar."""
        status = f"{examples_per_second:,.0f} examples/s  loss {loss:.4f}"
        if not math.isnan(error):
            status += f"  error {error:.1%}"
        self._progress.update(self._task, completed=step, description="training", status=status)

    def measure(self, num_steps: int, seconds: float) -> None:
        """Records how long some steps took, and predicts the total time once.

        The first measurement is ignored, since it includes compilation.
        """
        if self._measured is None:
            self._measured = 0, 0.0
            return
        before = self._measured[1]
        self._measured = self._measured[0] + num_steps, before + seconds
        if before < _ENOUGH_SECONDS <= self._measured[1]:
            whole = self._num_steps * self._measured[1] / self._measured[0]
            self.say(f"training: about {duration(whole)} for {self._num_steps:,} steps")

    @contextlib.contextmanager
    def evaluating(self, what: str) -> Iterator[None]:
        """Shows what is being evaluated."""
        self._progress.update(self._task, description=what)
        yield
        self._progress.update(self._task, description="training")

    def record(self, split: str, step: int, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Records the metrics of each run on a split at a step."""
        seconds = round(time.monotonic() - self._started, 3)
        for spool, values in zip(self._spools, metrics, strict=False):
            record = {"split": split, "step": step, "seconds": seconds, **finite(values)}
            spool.directory.append_metrics(record)
        for events, values in zip(self._events, metrics, strict=False):
            numbers = {**values, **values.get("metrics", {})}
            numbers.pop("metrics", None)
            events.add({f"{split}/{name}": value for name, value in numbers.items()}, step)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what has been recorded to the run directories.

        Raises:
          ProcessError: another process has taken a run over.
        """
        for events in self._events:
            events.flush()
        for spool in self._spools:
            spool.upload()
        self._flushed = time.monotonic()


class _Spool:
    """Where the files of a run grow.

    This is the run directory, or a copy on this machine if the run is in object storage, where a
    file can only be replaced.
    """

    def __init__(self, run: RunDirectory):
        self._run, self._folder = run, None
        self._uploaded: dict[Path, int] = {}  # sizes
        self.directory = run
        if not is_local(run.path):
            self._folder = tempfile.TemporaryDirectory(prefix="capsjax-")
            self.directory = RunDirectory(Path(self._folder.name))
            with naming(run.metrics):
                if run.metrics.exists():  # the run is resumed
                    self.directory.metrics.write_bytes(run.metrics.read_bytes())

    def upload(self) -> None:
        """Replaces the files in object storage that have grown, unless the run was taken over."""
        if self._folder is None:
            return
        self._run.lock.check()
        local = self.directory.path
        for source in filter(Path.is_file, local.rglob("*")):
            content = source.read_bytes()
            if self._uploaded.get(source) == len(content):
                continue
            target = self._run.path / source.relative_to(local).as_posix()
            with naming(target):
                target.write_bytes(content)
            self._uploaded[source] = len(content)

    def close(self, error: type[BaseException] | None) -> None:
        """Uploads what is left and removes the copy."""
        if self._folder is not None:
            with self._folder:
                if not is_lost(self._run.path, error):
                    self.upload()


class _Events:
    """TensorBoard's event file of a run, written without a thread of its own."""

    def __init__(self, directory: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory
        self._writer = EventsWriter(str(directory / "events"))
        # Hides the events of steps that a resumed run repeats.
        self._write(step + 1, session_log={"status": "START"})

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Adds scalars."""
        scalars = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self._write(step, summary={"value": scalars})

    def flush(self) -> None:
        """Writes the scalars, so that TensorBoard shows them."""
        with naming(self._path):
            self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def _write(self, step: int, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with naming(self._path):
            self._writer.write_event(Event(wall_time=time.time(), step=step, **fields))


def duration(seconds: float) -> str:
    """Returns at most two units, such as 2 h 50 min or 40 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
