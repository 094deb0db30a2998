"""The files of a run: configuration, metrics, result, and the directory of checkpoints."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar

import msgspec
from orbax.checkpoint.utils import checkpoint_steps

from capsjax.errors import ConfigError, ProcessError
from capsjax.files import is_local, naming, remove_tree, write_text
from capsjax.models import (
    BaselineConfig,
    CapsNetConfig,
    EfficientCapsNetConfig,
    MatrixCapsNetConfig,
    ModelConfig,
)
from capsjax.training import processes
from capsjax.training.config import TrainConfig
from capsjax.training.data_description import DataDescription
from capsjax.training.files import decode, read_json, read_json_lines, write_json
from capsjax.training.run_lock import RunLock, lock_of

T = TypeVar("T")

_MODELS: dict[str, type[ModelConfig]] = {
    "capsnet": CapsNetConfig,
    "matrix_capsnet": MatrixCapsNetConfig,
    "efficient_capsnet": EfficientCapsNetConfig,
    "baseline": BaselineConfig,
}


class RunConfig(NamedTuple):
    """The contents of config.json.

    Attributes:
      train: the options.
      model: the network's configuration.
      data: describes the data set.
      stratified: whether the images held out for validation were drawn class by class.
      given: whether the data set was given, instead of loaded by the options.
      custom: which of objective and optimizer were given, instead of chosen by the options.
      changes: changes of the learning rate's options when the run was resumed, each with the step.
    """

    train: TrainConfig
    model: ModelConfig
    data: DataDescription
    stratified: bool = True
    given: bool = False
    custom: tuple[str, ...] = ()
    changes: tuple[dict[str, Any], ...] = ()

    @property
    def dataset(self) -> str:
        """The name to load the data set by."""
        return self.data.name if self.given else self.train.dataset

    def to_json(self) -> dict[str, Any]:
        """Returns the contents as JSON values."""
        kind = next(kind for kind, made in _MODELS.items() if isinstance(self.model, made))
        return {
            "train": self.train.to_json(),
            "model": {"kind": kind, **dataclasses.asdict(self.model)},
            "data": dataclasses.asdict(self.data),
            "stratified": self.stratified,
            "given": self.given,
            "custom": self.custom,
            "changes": self.changes,
        }

    def shaping(self) -> dict[str, Any]:
        """Returns the contents that affect the parameters, as JSON values."""
        values = self.to_json()
        del values["given"], values["changes"]
        shaping = self.train.shaping()
        values["train"] = {k: v for k, v in values["train"].items() if k in shaping}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
ErrorRate = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Record(TypedDict):
    """One line of metrics.jsonl; a number that was not finite is None."""

    split: Literal["train", "validation", "test"]
    step: Count
    seconds: NotRequired[Seconds]
    loss: float | None
    error: ErrorRate | None
    count: NotRequired[Count]
    examples_per_second: NotRequired[Seconds]
    metrics: NotRequired[dict[str, float | None]]


def seconds_of(records: Sequence[Record]) -> float:
    """Time that training took, of records of version 0.1 as well.

    There the time begins at 0 after each resumption: this sums the last records of all parts.
    """
    times = [record.get("seconds", 0.0) for record in records] + [0.0]
    return sum(a for a, b in itertools.pairwise(times) if a > b)


class StoredResult(msgspec.Struct):
    """The parts of result.json that are read."""

    step: Count
    test_wrong: Count | None
    test_count: Count
    validation_error: ErrorRate | None
    seconds: Seconds

    def __post_init__(self) -> None:
        if (self.test_wrong or 0) > self.test_count or not self.test_count:
            raise ValueError(f"{self.test_wrong} of {self.test_count} test images are wrong")


class _StoredConfig(msgspec.Struct):
    train: TrainConfig
    model: msgspec.Raw
    data: DataDescription
    stratified: bool = False  # as it was when this was not recorded
    given: bool = False
    custom: tuple[Literal["objective", "optimizer"], ...] = ()
    changes: tuple[dict[str, Any], ...] = ()


class _StoredModel(msgspec.Struct):
    kind: Literal[tuple(_MODELS)]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths and small files of a run. Process 0 reads them and shares what it read.

    Attributes:
      path: the directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The options, the network's configuration and the data set's description."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """The result of the finished run."""
        return self.path / "result.json"

    @property
    def picture(self) -> Path:
        """Test images over their reconstructions."""
        return self.path / "reconstructions.png"

    @property
    def checkpoints(self) -> Path:
        """Orbax's directory."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @functools.cached_property
    def lock(self) -> RunLock:
        """Lets one process at a time write to the run."""
        return lock_of(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[str | None]:
        """Keeps other processes from writing to the run, see :meth:`RunLock.held`.

        Raises:
          ConfigError: the directory does not exist, or another process is writing to it.
        """
        if is_local(self.path):  # object storage has no directories
            self._check_exists()
        with self.lock.held() as before:
            yield before

    def check_new(self) -> None:
        """Raises a ConfigError if the directory holds a run or files with the names of a run's."""
        self._first(self._check_new, type(None))

    def _check_new(self) -> None:
        if self.config.exists():
            raise ConfigError(
                f"--run-dir {self.path} already holds a run; resume it with --resume, or name"
                " another directory"
            )
        for path in (
            self.checkpoints,
            self.metrics,
            self.result,
            self.picture,
            self.tensorboard,
        ):
            if any(path.iterdir()) if path.is_dir() else path.exists():
                raise ConfigError(
                    f"--run-dir {self.path} holds {path.name} of a run whose {self.config.name} is"
                    " missing; name another directory"
                )

    def create(self) -> None:
        """Makes the directory of a new run.

        Raises:
          ConfigError: it holds a run, or it cannot be made.
        """
        self.check_new()
        self._first(self._make, type(None))

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--run-dir {self.path} cannot be made: {error.strerror or error}"
            ) from None

    def exists(self) -> bool:
        """Returns whether there is such a directory."""
        return self._first(self.path.exists, bool)

    def last_checkpoint(self) -> int:
        """Returns the last step that has a checkpoint; 0 without any."""
        return self._first(lambda: max(self.checkpoint_steps(), default=0), int)

    def holds_run(self) -> bool:
        """Returns whether a run has begun in the directory."""
        return self._first(self.config.exists, bool)

    def checkpoint_steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, as this process finds them."""
        steps: list[int] = checkpoint_steps(self.checkpoints)
        return steps

    def remove_unless_begun(self) -> None:
        """Removes a run that failed before its first checkpoint and record."""
        if not processes.is_first():
            return  # the other processes may be gone: nothing is shared
        with contextlib.suppress(OSError, ProcessError), naming(self.path):
            self.lock.check()
            if self.checkpoint_steps() or (self.metrics.exists() and self.metrics.read_bytes()):
                return
            for folder in (self.checkpoints, self.tensorboard):
                remove_tree(folder)
            for path in (self.metrics, self.config, self.path / ".lock"):
                path.unlink(missing_ok=True)
            self.path.rmdir()  # unless others have put files into it

    def write_config(self, config: RunConfig) -> None:
        """Writes what is needed to resume or evaluate the run."""
        self._first(lambda: write_json(self.config, config.to_json()), type(None))

    def read_config(self) -> RunConfig:
        """Reads what :meth:`write_config` wrote.

        Raises:
          ConfigError: the directory is missing, holds no run, or its configuration is damaged.
        """
        stored = decode(self._first(self._read_config, bytes), _StoredConfig, str(self.config))
        kind = decode(stored.model, _StoredModel, f"model in {self.config}").kind
        model = decode(stored.model, _MODELS[kind], f"model in {self.config}")
        train = dataclasses.replace(stored.train, run_dir=self.path, resume=True)
        about = (stored.data, stored.stratified, stored.given, stored.custom, stored.changes)
        return RunConfig(train, model, *about)

    def _read_config(self) -> bytes:
        self._check_exists()
        if not self.config.exists():
            raise ConfigError(f"run directory {self.path} holds no run: {self.config.name} missing")
        return self.config.read_bytes()

    def _check_exists(self) -> None:
        if not self.path.is_dir():
            what = "is not a directory" if self.path.exists() else "does not exist"
            raise ConfigError(f"run directory {self.path} {what}")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Appends a line to the metrics."""
        with naming(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[Record]:
        """Returns the metrics' records; a last line cut short by a crash is left out.

        Raises:
          ConfigError: a line is damaged.
        """
        return self._first(lambda: read_json_lines(self.metrics, Record), list[Record])

    def forget_metrics_after(self, step: int) -> list[Record]:
        """Drops the records of steps that a resumed run repeats, and returns the others."""
        kept = [r for r in self.read_metrics() if r["step"] <= step and r["split"] != "test"]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        self._first(lambda: write_text(self.metrics, text), type(None))
        return kept

    def read_result(self) -> StoredResult | None:
        """Returns the result of the finished run, or None if there is none yet.

        Raises:
          ConfigError: the file is damaged.
        """
        found = self._first(self._read_results, list[StoredResult])
        return found[0] if found else None

    def _read_results(self) -> list[StoredResult]:
        return [read_json(self.result, StoredResult)] if self.result.exists() else []

    def _first(self, function: Callable[[], T], kind: type[T]) -> T:
        """Calls a function in process 0, whose errors name the directory."""

        def named() -> T:
            with naming(self.path):
                return function()

        return processes.first(named, kind)
