"""Finished trials in a file of JSON lines, and their statistics."""

import dataclasses
import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec
from filelock import FileLock

from capsjax.data import Dataset
from capsjax.errors import ConfigError
from capsjax.files import naming
from capsjax.reproduce.recipes import Recipe
from capsjax.training.data_description import DataDescription
from capsjax.training.files import read_json_lines
from capsjax.training.run_directory import Count, ErrorRate, Seconds
from capsjax.version import __version__


class Line(msgspec.Struct, kw_only=True):
    """A line of the file: a finished trial, or an ensemble of finished trials.

    Attributes:
      table: name of the table.
      recipe: name of the row.
      asked_steps: number of steps if different from the recipe's, else None.
      dtype: dtype of the computation.
      seed: seed of a trial.
      steps: number of steps of a trial.
      errors: error rates of a trial by data set.
      counts: number of test images of a trial by data set.
      seconds: wall time of a trial and those trained together with it, over all commands.
      together: number of trials trained together; None if unknown.
      of: everything that a trial depends on besides its seed; see :func:`describe`.
      run: run directory of a trial, relative to the file's.
      ensemble: number of networks in an ensemble.
      error: error rate of an ensemble.
    """

    table: str
    recipe: str
    asked_steps: Count | None = None
    dtype: str = "float32"
    seed: Count | None = None
    steps: Count = 0
    errors: dict[str, ErrorRate] = {}
    counts: dict[str, Count] = {}
    seconds: Seconds = 0.0
    together: Count | None = None
    of: dict[str, Any] = {}
    run: str | None = None
    ensemble: Count | None = None
    error: ErrorRate = 1.0

    def __post_init__(self) -> None:
        if (self.seed is None) == (self.ensemble is None):
            raise ValueError("expected either `seed` or `ensemble`")
        if self.seed is not None and not self.errors:
            raise ValueError("a trial needs `errors`")
        if self.counts and self.counts.keys() != self.errors.keys():
            raise ValueError("`errors` and `counts` are of different data sets")

    def same_row(self, other: "Line") -> bool:
        """Whether both lines have the same row, number of steps and dtype."""
        names = ("table", "recipe", "asked_steps", "dtype")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def read_results(path: Path) -> list[Line]:
    """Reads a file of results, without a last line that a crash cut short.

    Raises:
      ConfigError: a line is damaged.
    """
    return read_json_lines(path, Line)


def add_result(path: Path, line: Line) -> bool:
    """Appends a result, with its machine and time, unless another command has added it.

    Returns:
      Whether it was added.
    """
    device = jax.devices()[0]
    conditions = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "capsjax": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    values = {k: v for k, v in msgspec.structs.asdict(line).items() if v is not None}
    with FileLock(f"{path}.lock"):
        for other in read_results(path):
            if other.same_row(line) and (other.seed, other.ensemble) == (line.seed, line.ensemble):
                return False
        with naming(path), path.open("ab+") as file:
            file.seek(0)
            # Starts a new line, in case a crash cut the last one short.
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write((json.dumps({**values, **conditions}) + "\n").encode())
    return True


def describe(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Returns everything that a trial depends on besides its seed, as JSON: recipe and data."""
    words = ("table", "title", "published", "spread", "ensemble", "also_tested_on")
    trained = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in words}
    described: dict[str, Any] = json.loads(
        json.dumps({**trained, "data": dataclasses.asdict(DataDescription.of(dataset))})
    )
    return described


def check_alike(line: Line, now: Mapping[str, Any], path: Path) -> None:
    """Raises a ConfigError if a trial of this row was trained differently."""
    for key in now:
        then = line.of.get(key)
        if key == "data" and then:
            then = {**now[key], **then}  # earlier versions recorded fewer fields
        if then != now[key]:
            raise ConfigError(
                f"{path} has results with {key.replace('_', ' ')} {line.of.get(key)}, but this"
                f" command has {now[key]}; move the file, or choose another --output"
            )


@dataclasses.dataclass(frozen=True)
class RowResult:
    """Result of the trials of a row.

    Attributes:
      recipe: the row.
      dataset: name of the data set whose test images were evaluated.
      steps: steps of the shortest trial.
      errors: error of each trial in percent.
      ensemble: number of networks in an ensemble; 0 for single networks.
    """

    recipe: Recipe
    dataset: str
    steps: int
    errors: tuple[float, ...]
    ensemble: int = 0

    @property
    def title(self) -> str:
        """Description of the row."""
        if self.ensemble:
            return f"{self.recipe.title}, ensemble of {self.ensemble}"
        return self.recipe.title

    @property
    def published(self) -> str:
        """The paper's error on this data set as text; empty if it reports none."""
        recipe = self.recipe
        same = self.dataset == (recipe.also_tested_on or recipe.dataset)
        return recipe.paper if same and bool(self.ensemble) == recipe.ensemble else ""

    @property
    def mean(self) -> str:
        """Mean and standard deviation as text."""
        mean = f"{statistics.mean(self.errors):.2f}"
        return mean + (f" ± {statistics.stdev(self.errors):.3f}" if len(self.errors) > 1 else "")

    @property
    def text(self) -> str:
        """Mean, standard deviation and number of trials as text."""
        return self.mean if self.ensemble else f"{self.mean} (n = {len(self.errors)})"


def rows_of(recipe: Recipe, lines: Sequence[Line]) -> list[RowResult]:
    """Returns the results of a row: one per data set, then those of ensembles.

    Args:
      recipe: the row.
      lines: results of the row, with the same number of steps and dtype.
    """
    trials = {line.seed: line for line in lines if line.seed is not None}
    if not trials:
        return []
    ordered = [trials[seed] for seed in sorted(trials)]
    steps = min(line.steps for line in ordered)
    rows = [
        RowResult(recipe, name, steps, tuple(100 * line.errors[name] for line in ordered))
        for name in ordered[0].errors
    ]
    ensembles = {line.ensemble: line.error for line in lines if line.ensemble is not None}
    return rows + [
        RowResult(recipe, recipe.dataset, steps, (100 * error,), ensemble=number)
        for number, error in ensembles.items()
    ]


def markdown(rows: Sequence[RowResult]) -> str:
    """Returns rows as a Markdown table, with errors in percent."""
    lines = ["| row | test images | steps | paper | capsjax |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.title} | {row.dataset} | {row.steps:,} | {row.published} | {row.text} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def measured(recipe: Recipe, lines: Sequence[Line], names: Mapping[str, str] = {}) -> str:
    """Returns the errors of a row's trials in percent as text, or "not run".

    Args:
      recipe: the row.
      lines: results. Those of the row count that were trained longest, all steps first, and among
        them those in float32 if there are any.
      names: names to print for data sets.
    """
    own = [line for line in lines if (line.table, line.recipe) == (recipe.table, recipe.name)]
    trials = [line for line in own if line.seed is not None]
    if not trials:
        return "not run"
    longest = max(
        trials, key=lambda x: (x.asked_steps is None, x.asked_steps or 0, x.dtype == "float32")
    )
    own = [line for line in own if line.same_row(longest)]
    rows = rows_of(recipe, own)
    single = [row for row in rows if not row.ensemble]
    texts = [f"{row.mean} as an ensemble of {row.ensemble}" for row in rows if row.ensemble][-1:]
    for row in single:
        several = f" on {names.get(row.dataset, row.dataset)}" if len(single) > 1 else ""
        texts.append(row.mean + several)
    steps = f"{single[0].steps:,}" + (f" of {recipe.steps:,}" if longest.asked_steps else "")
    steps += " steps" + ("" if longest.dtype == "float32" else f" in {longest.dtype}")
    seconds = {line.seed: line.seconds for line in own if line.seed is not None}
    minutes = statistics.mean(seconds.values()) / 60
    seeds = f"{len(seconds)} seed{'s' if len(seconds) > 1 else ''}"
    return f"{', '.join(texts)} ({seeds}, {steps}, {minutes:.0f} min)"
