"""What a run leaves on disk (floor 5): configuration, metrics, result; checkpoints beside them."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capsjax.models import BaselineConfig, CapsNetConfig, ModelConfig
from capsjax.training.config import ConfigError, TrainConfig

_MODELS: dict[str, Callable[..., ModelConfig]] = {
    "capsnet": CapsNetConfig,
    "baseline": BaselineConfig,
}


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

    def create(self) -> None:
        """Makes the directory for a new run, which must not hold one already.

        Raises:
          ConfigError: it holds a run, or it cannot be made.
        """
        if self.config.exists():
            raise ConfigError(
                f"--run-dir {self.path} already holds a run; go on with it by --resume, or name"
                " another directory"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--run-dir {self.path} cannot be made: {error.strerror or error}"
            ) from None

    def write_config(
        self, config: TrainConfig, model: ModelConfig, class_names: tuple[str, ...]
    ) -> None:
        """Writes what is needed to resume or evaluate the run."""
        kind = "baseline" if isinstance(model, BaselineConfig) else "capsnet"
        values = {
            "train": config.to_json(),
            "model": {"kind": kind, **dataclasses.asdict(model)},
            "class_names": class_names,
        }
        write_json(self.config, values)

    def read_config(self) -> tuple[TrainConfig, ModelConfig, tuple[str, ...]]:
        """Reads what :meth:`write_config` wrote.

        Raises:
          ConfigError: the directory is missing, holds no run, or its configuration is damaged.
        """
        if not self.path.is_dir():
            raise ConfigError(f"run directory {self.path} does not exist")
        if not self.config.exists():
            raise ConfigError(f"run directory {self.path} holds no run: {self.config.name} missing")
        try:
            values = json.loads(self.config.read_text())
            train = TrainConfig.from_json(values["train"], run_dir=self.path)
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values["model"].items()
            }
            model = _MODELS[fields.pop("kind")](**fields)
            return train, model, tuple(values["class_names"])
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

    def forget_metrics_after(self, step: int) -> None:
        """Drops the records of steps that a resumed run will take again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        _write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file so that a crash leaves the old one or the new one, never half of one."""
    _write_atomically(path, json.dumps(values, indent=2) + "\n")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
