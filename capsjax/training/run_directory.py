"""What a run leaves on disk: configuration, metrics, result; checkpoints beside them."""

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

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

_MODELS: dict[str, type[ModelConfig]] = {
    "capsnet": CapsNetConfig,
    "matrix_capsnet": MatrixCapsNetConfig,
    "efficient_capsnet": EfficientCapsNetConfig,
    "baseline": BaselineConfig,
}


@dataclasses.dataclass(frozen=True)
class DataDescription:
    """What tells one data set from another.

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
    """What a run directory says about its run: options, network, data."""

    train: TrainConfig
    model: ModelConfig
    data: DataDescription


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
        try:
            values = json.loads(self.config.read_text())
            train = TrainConfig.from_json(values["train"], run_dir=self.path)
            fields = _with_tuples(values["model"])
            model = _MODELS[fields.pop("kind")](**fields)
            return RunConfig(train, model, DataDescription(**_with_tuples(values["data"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.config} is damaged: {error}") from None

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Appends a line to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the metrics' records; a last line cut short by a crash is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def forget_metrics_after(self, step: int) -> list[dict[str, Any]]:
        """Drops the records of what a resumed run will do again, and returns the others."""
        kept = [r for r in self.read_metrics() if r["step"] <= step and r["split"] != "test"]
        _write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def finished_at(self) -> int | None:
        """The step of the result, or None if there is none (or it cannot be read)."""
        try:
            step = json.loads(self.result.read_text())["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return int(step)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples, the configurations no lists."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file so that a crash leaves the old one or the new one, never half of one."""
    _write_atomically(path, json.dumps(values, indent=2) + "\n")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
