"""Tables of papers, row by row and seed by seed (floor 5)."""

import dataclasses
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from capsjax.data import Dataset, is_right, load
from capsjax.training.config import ConfigError
from capsjax.training.recipes import TABLES, Recipe
from capsjax.training.trials import Trials
from capsjax.version import __version__

TableName = Literal[
    "mnist", "multi_mnist", "affine", "cifar10", "svhn", "smallnorb", "ablation", "small"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Train the rows of a table with several seeds, and write mean and deviation of their errors.

    Finished trials are kept in OUTPUT/results.jsonl and not trained again; one that was cut short
    is gone on with. Tables: mnist and multi_mnist (Sabour et al. 2017, table 1), affine, cifar10,
    svhn and smallnorb (the same paper's text), ablation (what tells the authors' code from the
    formulas as printed), small (networks for two processor cores).
    """

    table: TableName
    """Table to reproduce."""

    rows: tuple[str, ...] = ()
    """Names of rows; all of the table if not given."""

    seeds: int = 3
    """Trials of each row, with seeds 0, 1, 2 and so on."""

    steps: int | None = None
    """Steps of each trial in place of the recipe's own; results say which."""

    together: int = 1
    """Trials that are trained at once, by vmap."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation."""

    data_dir: Path | None = None
    """Where data sets are prepared and looked for, or an .npz file that save_npz has written."""

    output: Path = Path("reproduced")
    """Directory for results, learning curves and what is under way."""

    seconds: float | None = None
    """Begin no further call of the device after so many seconds; the same command goes on."""

    def __post_init__(self) -> None:
        """Checks the options."""
        for name in ("seeds", "together"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps}")
        if self.seconds is not None and self.seconds <= 0:
            raise ConfigError(f"--seconds must be positive, got {self.seconds}")
        known = [recipe.name for recipe in TABLES[self.table]]
        for row in self.rows:
            if row not in known:
                raise ConfigError(
                    f"--rows: table {self.table} has {', '.join(known)}, no {row!r}"
                )

    def recipes(self) -> list[Recipe]:
        """The rows to train."""
        return [r for r in TABLES[self.table] if not self.rows or r.name in self.rows]


@dataclasses.dataclass(frozen=True)
class RowResult:
    """What the trials of a row came to.

    Attributes:
      recipe: the row.
      dataset: whose test images were taken.
      steps: that were taken, of the shortest trial.
      errors: in per cent, one for each trial.
    """

    recipe: Recipe
    dataset: str
    steps: int
    errors: tuple[float, ...]

    @property
    def text(self) -> str:
        """Mean, standard deviation and number of trials."""
        mean = f"{statistics.mean(self.errors):.2f}"
        if len(self.errors) > 1:
            mean += f" ± {statistics.stdev(self.errors):.3f}"
        return f"{mean} (n = {len(self.errors)})"


def reproduce(config: ReproduceConfig, *, say: Callable[[str], None] = print) -> list[RowResult]:
    """Trains what is missing of a table, and returns what is there.

    Args:
      config: the options.
      say: is given a line now and then.

    Raises:
      ConfigError: the options do not go together, or a file is damaged.
      capsjax.data.DataError: a data set cannot be had.
    """
    results = Results(config.output / "results.jsonl")
    until = math.inf if config.seconds is None else time.monotonic() + config.seconds
    sets: dict[str, Dataset] = {}

    def dataset(name: str) -> Dataset:
        if name not in sets:
            sets[name] = load(name, data_dir=config.data_dir)
        return sets[name]

    for recipe in config.recipes():
        missing = [
            seed for seed in range(config.seeds)
            if not results.has(config.table, recipe, seed, config)
        ]  # fmt: skip
        for first in range(0, len(missing), config.together):
            if time.monotonic() > until:
                say("the time is over; the same command goes on")
                return results.rows(config)
            seeds = missing[first : first + config.together]
            others = [dataset(recipe.also_tested_on)] if recipe.also_tested_on else []
            trials = Trials(
                recipe, dataset(recipe.dataset), seeds, _folder(config), steps=config.steps,
                dtype=config.dtype, others=others,
            )  # fmt: skip
            done = trials.run(seconds=until - time.monotonic(), say=say)
            if done is None:
                say("the time is over; the same command goes on")
                return results.rows(config)
            for trial in done:
                results.add(
                    {
                        "table": config.table, "asked_steps": config.steps, "dtype": config.dtype,
                        **dataclasses.asdict(trial), **_conditions(),
                    }
                )  # fmt: skip
                errors = ", ".join(f"{e:.2%} on {n}" for n, e in trial.errors.items())
                say(f"{recipe.name}, seed {trial.seed}: error {errors}")
            if recipe.ensemble and len(seeds) > 1:
                error = ensemble_error(*trials.scores(dataset(recipe.dataset)))
                results.add(
                    {
                        "table": config.table, "recipe": recipe.name, "ensemble": len(seeds),
                        "asked_steps": config.steps, "dtype": config.dtype, "error": error,
                        **_conditions(),
                    }
                )  # fmt: skip
                say(f"{recipe.name}, ensemble of {len(seeds)}: error {error:.2%}")
    rows = results.rows(config)
    (config.output / f"{config.table}.md").write_text(markdown(rows))
    return rows


def ensemble_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of wrong predictions of the mean of several networks' scores.

    Args:
      scores: ``[networks, N, J]``.
      labels: ``[N]`` or ``[N, k]``.

    Example:
      >>> import numpy as np
      >>> from capsjax.training.reproduce import ensemble_error
      >>> scores = np.array([[[0.9, 0.0], [0.6, 0.5]], [[0.4, 0.5], [0.0, 0.9]]])
      >>> ensemble_error(scores, np.array([0, 0]))
      0.5
    """
    return float(1 - np.mean(is_right(scores.mean(0), labels)))


class Results:
    """The finished trials in a file of JSON lines.

    Args:
      path: of the file.

    Raises:
      ConfigError: a line before the last is no result.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lines: list[dict[str, Any]] = []
        if not path.exists():
            return
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                self._lines.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise ConfigError(f"{path}:{number} is no result") from None

    def add(self, result: dict[str, Any]) -> None:
        """Adds a result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lines.append(result)
        # Written anew: a last line that was cut off must not swallow the next.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        temporary.replace(self.path)

    def has(self, table: str, recipe: Recipe, seed: int, config: ReproduceConfig) -> bool:
        """Whether a trial with this seed and these options is there."""
        return any(
            line["seed"] == seed for line in self._of(table, recipe, config) if "seed" in line
        )

    def rows(self, config: ReproduceConfig) -> list[RowResult]:
        """What there is of a table, by row and data set."""
        found = []
        for recipe in config.recipes():
            lines = [x for x in self._of(config.table, recipe, config) if "seed" in x]
            lines.sort(key=lambda line: line["seed"])
            for name in lines[0]["errors"] if lines else ():
                errors = tuple(100 * line["errors"][name] for line in lines)
                found.append(RowResult(recipe, name, min(x["steps"] for x in lines), errors))
        return found

    def _of(self, table: str, recipe: Recipe, config: ReproduceConfig) -> list[dict[str, Any]]:
        wanted = {
            "table": table, "recipe": recipe.name, "asked_steps": config.steps,
            "dtype": config.dtype,
        }  # fmt: skip
        return [x for x in self._lines if all(x.get(k) == v for k, v in wanted.items())]


def markdown(rows: Sequence[RowResult]) -> str:
    """The rows as a Markdown table; errors in per cent."""
    lines = ["| row | test images | steps | paper | capsjax |", "|---|---|---|---|---|"]
    for row in rows:
        own = row.dataset == (row.recipe.also_tested_on or row.recipe.dataset)
        published = "–" if row.recipe.published is None or not own else f"{row.recipe.published:g}"
        if own and row.recipe.spread is not None:
            published += f" ± {row.recipe.spread:g}"
        lines.append(
            f"| {row.recipe.title} | {row.dataset} | {row.steps:,} | {published} | {row.text} |"
        )
    return "\n".join(lines) + "\n"


def _folder(config: ReproduceConfig) -> Path:
    """For what is under way: of one table, number of steps and dtype."""
    steps = "all" if config.steps is None else str(config.steps)
    return config.output / f"{config.table}-{steps}-{config.dtype}"


def _conditions() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind, "platform": device.platform, "jax": jax.__version__,
        "capsjax": __version__,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
