"""The files of a run: configuration, metrics, result; checkpoints beside them."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import msgspec
import numpy as np

from capsjax.data import Dataset
from capsjax.errors import ConfigError
from capsjax.models import (
    BaselineConfig,
    CapsNetConfig,
    EfficientCapsNetConfig,
    MatrixCapsNetConfig,
    ModelConfig,
)
from capsjax.training.config import TrainConfig
from capsjax.training.files import decode, read_json, read_json_lines, write_atomically, write_json

_MODELS: dict[str, type[ModelConfig]] = {
    "capsnet": CapsNetConfig,
    "matrix_capsnet": MatrixCapsNetConfig,
    "efficient_capsnet": EfficientCapsNetConfig,
    "baseline": BaselineConfig,
}


@dataclasses.dataclass(frozen=True)
class DataDescription:
    """Identifies a data set.

    Attributes:
      name: its name.
      class_names: its classes, in the order of the labels.
      train_images: number of training images.
      checksum: CRC-32 of the training images and labels.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: int
    checksum: int

    @classmethod
    def of(cls, dataset: Dataset) -> "DataDescription":
        """Describes a data set."""
        images, labels = (np.ascontiguousarray(x).data for x in dataset.train)
        checksum = zlib.crc32(labels, zlib.crc32(images))
        return cls(dataset.name, dataset.class_names, len(labels), checksum)

    def check(self, found: "DataDescription") -> None:
        """Raises a ConfigError unless these are the data that a run was started with."""
        for name in ("class_names", "train_images", "checksum"):
            then, now = getattr(self, name), getattr(found, name)
            if then != now:
                raise ConfigError(
                    f"data set {found.name} is not the one that the run was started with:"
                    f" {name.replace('_', ' ')} were {then}, are {now}"
                )


class RunConfig(NamedTuple):
    """The contents of config.json: options, network, data."""

    train: TrainConfig
    model: ModelConfig
    data: DataDescription


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


class StoredResult(msgspec.Struct):
    """What is read of result.json."""

    step: Count
    test_wrong: Count
    test_count: Count
    validation_error: ErrorRate | None
    seconds: Seconds

    def __post_init__(self) -> None:
        if self.test_wrong > self.test_count or not self.test_count:
            raise ValueError(f"{self.test_wrong} of {self.test_count} test images are wrong")


class _StoredConfig(msgspec.Struct):
    train: TrainConfig
    model: msgspec.Raw
    data: DataDescription


class _StoredModel(msgspec.Struct):
    kind: Literal[tuple(_MODELS)]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths and small files of a run.

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

    def check_new(self) -> None:
        """Raises a ConfigError if the directory holds a run already."""
        if self.config.exists():
            raise ConfigError(
                f"--run-dir {self.path} already holds a run; go on with it by --resume, or name"
                " another directory"
            )
        if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            raise ConfigError(
                f"--run-dir {self.path} holds checkpoints of a run whose {self.config.name} is"
                " missing; name another directory"
            )

    def create(self) -> None:
        """Makes the directory for a new run, which must not hold one already.

        Raises:
          ConfigError: it holds a run, or it cannot be made.
        """
        self.check_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--run-dir {self.path} cannot be made: {error.strerror or error}"
            ) from None

    def write_config(self, config: RunConfig) -> None:
        """Writes what is needed to resume or evaluate the run."""
        kind = next(kind for kind, made in _MODELS.items() if isinstance(config.model, made))
        values = {
            "train": config.train.to_json(),
            "model": {"kind": kind, **dataclasses.asdict(config.model)},
            "data": dataclasses.asdict(config.data),
        }
        write_json(self.config, values)

    def read_config(self) -> RunConfig:
        """Reads what :meth:`write_config` wrote.

        Raises:
          ConfigError: the directory is missing, holds no run, or its configuration is damaged.
        """
        if not self.path.is_dir():
            what = "is not a directory" if self.path.exists() else "does not exist"
            raise ConfigError(f"run directory {self.path} {what}")
        if not self.config.exists():
            raise ConfigError(f"run directory {self.path} holds no run: {self.config.name} missing")
        stored = read_json(self.config, _StoredConfig)
        kind = decode(stored.model, _StoredModel, f"model in {self.config}").kind
        model = decode(stored.model, _MODELS[kind], f"model in {self.config}")
        train = dataclasses.replace(stored.train, run_dir=self.path, resume=True)
        return RunConfig(train, model, stored.data)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Appends a line to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[Record]:
        """Returns the metrics' records; a last line cut short by a crash is left out.

        Raises:
          ConfigError: a line is damaged.
        """
        return read_json_lines(self.metrics, Record)

    def forget_metrics_after(self, step: int) -> list[Record]:
        """Drops the records of what a resumed run will do again, and returns the others."""
        kept = [r for r in self.read_metrics() if r["step"] <= step and r["split"] != "test"]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def read_result(self) -> StoredResult | None:
        """Returns the result of the finished run, or None if there is none yet.

        Raises:
          ConfigError: the file is damaged.
        """
        return read_json(self.result, StoredResult) if self.result.exists() else None
