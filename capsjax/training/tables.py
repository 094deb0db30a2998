"""Tables of papers, row by row and seed by seed."""

import dataclasses
import datetime
import functools
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
from capsjax.errors import ConfigError
from capsjax.training.recipes import TABLES, Recipe
from capsjax.training.trials import Trial, Trials, check_alike, describe
from capsjax.version import __version__

TableName = Literal[
    "mnist", "multi_mnist", "affine", "cifar10", "svhn", "smallnorb", "ablation", "small"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Train the rows of a table with several seeds, and write mean and deviation of their errors.

    Finished trials are kept in OUTPUT/results.jsonl and not trained again; the same command goes on
    with what was cut short. Tables: mnist and multi_mnist (Sabour et al. 2017, table 1), affine,
    cifar10, svhn and smallnorb (the same paper's text), ablation (what tells the authors' code from
    the formulas as printed), small (networks for two processor cores).
    """

    table: TableName
    """Table to reproduce."""

    rows: tuple[str, ...] = ()
    """Names of rows; all of the table if not given."""

    list: bool = False
    """Only say what the rows are: command, the paper's error, and what was measured."""

    seeds: int = 3
    """Trials of each row, with seeds 0, 1, 2 and so on."""

    steps: int | None = None
    """Steps of each trial in place of the recipe's own; results say which."""

    together: int = 1
    """Trials that are trained at once, by vmap; of rows that end at an error, always one."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation."""

    data_dir: Path | None = None
    """Where data sets are prepared and looked for, or an .npz file that save_npz has written."""

    output: Path = Path("reproduced")
    """Directory for results, learning curves and what is under way; one for each kind of data."""

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
                raise ConfigError(f"--rows: table {self.table} has {', '.join(known)}, no {row!r}")

    def recipes(self) -> Sequence[Recipe]:
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
      ensemble: number of networks whose scores were averaged; 0 for single ones.
    """

    recipe: Recipe
    dataset: str
    steps: int
    errors: tuple[float, ...]
    ensemble: int = 0

    @property
    def title(self) -> str:
        """The row in words."""
        if self.ensemble:
            return f"{self.recipe.title}, ensemble of {self.ensemble}"
        return self.recipe.title

    @property
    def published(self) -> str:
        """What the paper reports for these images; empty if nothing."""
        recipe = self.recipe
        same = self.dataset == (recipe.also_tested_on or recipe.dataset)
        return recipe.paper if same and bool(self.ensemble) == recipe.ensemble else ""

    @property
    def text(self) -> str:
        """Mean, standard deviation and number of trials."""
        mean = f"{statistics.mean(self.errors):.2f}"
        if self.ensemble:
            return mean
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
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise ConfigError(f"--output {config.output} cannot be written: {reason}") from None
    results = Results(config.output / "results.jsonl")
    until = math.inf if config.seconds is None else time.monotonic() + config.seconds
    get = functools.cache(lambda name: load(name, data_dir=config.data_dir))
    for recipe in config.recipes():
        results.check(recipe, config, get)
        together = config.together if recipe.until_error is None else 1
        while seeds := results.missing(recipe, config)[:together]:
            left = until - time.monotonic()
            done = _train(recipe, seeds, config, get, left, say) if left > 0 else None
            if done is None:
                say("the time is over; the same command goes on")
                return results.rows(config)
            for trial in done:
                results.add(config, dataclasses.asdict(trial))
                errors = ", ".join(f"{e:.2%} on {n}" for n, e in trial.errors.items())
                say(f"{recipe.name}, seed {trial.seed}: error {errors}")
            _write_table(results, config)
        if recipe.ensemble and config.seeds > 1 and not results.has_ensemble(recipe, config):
            error = ensemble_error(*_read_scores(recipe, config))
            results.add(config, {"recipe": recipe.name, "ensemble": config.seeds, "error": error})
            say(f"{recipe.name}, ensemble of {config.seeds}: error {error:.2%}")
            _write_table(results, config)
    return results.rows(config)


def _write_table(results: "Results", config: ReproduceConfig) -> None:
    """Of all rows that there are, not only of those that are asked for."""
    rows = results.rows(dataclasses.replace(config, rows=()))
    _folder(config).with_suffix(".md").write_text(markdown(rows))


def _train(
    recipe: Recipe,
    seeds: Sequence[int],
    config: ReproduceConfig,
    get: Callable[[str], Dataset],
    seconds: float,
    say: Callable[[str], None],
) -> list[Trial] | None:
    """Trials of one recipe; None if the time was over first."""
    dataset = get(recipe.dataset)
    others = [get(recipe.also_tested_on)] if recipe.also_tested_on else []
    trials = Trials(
        recipe,
        dataset,
        seeds,
        _folder(config),
        steps=config.steps,
        dtype=config.dtype,
        others=others,
    )
    done = trials.run(seconds=seconds, say=say)
    if done is not None and recipe.ensemble:
        scores, labels = trials.scores(dataset)
        for seed, of_seed in zip(seeds, scores, strict=True):
            np.savez(_scores_path(recipe, seed, config), scores=of_seed, labels=labels)
    return done


def _scores_path(recipe: Recipe, seed: int, config: ReproduceConfig) -> Path:
    return _folder(config) / f"{recipe.name}-seed-{seed}.scores.npz"


def _read_scores(recipe: Recipe, config: ReproduceConfig) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all trials, ``[trials, N, J]``, and the labels."""
    found = []
    for seed in range(config.seeds):
        path = _scores_path(recipe, seed, config)
        try:
            with np.load(path, allow_pickle=False) as stored:
                found.append(stored["scores"])
                labels = stored["labels"]
        except Exception as error:  # a damaged file raises nearly anything
            raise ConfigError(f"the scores of a finished trial cannot be read: {error}") from None
    return np.stack(found), labels


def ensemble_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of wrong predictions of the mean of several networks' scores.

    Args:
      scores: ``[networks, N, J]``.
      labels: ``[N]`` or ``[N, k]``.

    Example:
      >>> import numpy as np
      >>> from capsjax.training.tables import ensemble_error
      >>> scores = np.array([[[0.9, 0.0], [0.6, 0.5]], [[0.4, 0.5], [0.0, 0.9]]])
      >>> ensemble_error(scores, np.array([0, 0]))
      0.5
    """
    return float(1 - np.mean(is_right(scores.mean(0), labels)))


class Results:
    """The finished trials in a file of JSON lines, to which several commands may add.

    Args:
      path: of the file.

    Raises:
      ConfigError: a line before the last is no result.
    """

    def __init__(self, path: Path):
        self.path = path
        self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = []
        lines = self.path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                if not {"table", "recipe"} <= result.keys() or not (
                    {"seed", "steps", "errors"} <= result.keys()
                    or {"ensemble", "error"} <= result.keys()
                ):
                    raise ValueError
                found.append(result)
            except (ValueError, AttributeError):
                if number < len(lines):
                    raise ConfigError(f"{self.path}:{number} is no result") from None
        return found

    def add(self, config: ReproduceConfig, result: dict[str, Any]) -> None:
        """Adds a result, with the options and the machine that it was had with."""
        line = json.dumps({**_options(config), **result, **_conditions()}) + "\n"
        with self.path.open("ab+") as file:
            file.seek(0)
            before = file.read()
            # A last line that was cut off must not swallow this one.
            file.truncate(before.rfind(b"\n") + 1)
            file.write(line.encode())

    def check(self, recipe: Recipe, config: ReproduceConfig, get: Callable[[str], Dataset]) -> None:
        """Raises a ConfigError if there are trials of this name that were trained otherwise."""
        trials = [x for x in self._of(recipe, config) if "seed" in x]
        if trials:
            now = describe(recipe, get(recipe.dataset))
            for trial in trials:
                check_alike(trial.get("of", {}), now, self.path)

    def missing(self, recipe: Recipe, config: ReproduceConfig) -> list[int]:
        """The seeds of a row that are not there yet."""
        there = {line["seed"] for line in self._of(recipe, config) if "seed" in line}
        return [seed for seed in range(config.seeds) if seed not in there]

    def has_ensemble(self, recipe: Recipe, config: ReproduceConfig) -> bool:
        """Whether the mean over as many networks as are asked for is there."""
        return any(line.get("ensemble") == config.seeds for line in self._of(recipe, config))

    def rows(self, config: ReproduceConfig) -> list[RowResult]:
        """What there is of a table, by row and data set."""
        found = []
        for recipe in config.recipes():
            lines = self._of(recipe, config)
            trials = sorted((x for x in lines if "seed" in x), key=lambda line: line["seed"])
            if not trials:
                continue
            steps = min(line["steps"] for line in trials)
            for name in trials[0]["errors"]:
                errors = tuple(100 * line["errors"][name] for line in trials)
                found.append(RowResult(recipe, name, steps, errors))
            ensembles = {line["ensemble"]: line["error"] for line in lines if "ensemble" in line}
            found += [
                RowResult(recipe, recipe.dataset, steps, (100 * error,), ensemble=number)
                for number, error in ensembles.items()
            ]
        return found

    def _of(self, recipe: Recipe, config: ReproduceConfig) -> list[dict[str, Any]]:
        wanted = {**_options(config), "recipe": recipe.name}
        return [x for x in self._read() if all(x.get(k) == v for k, v in wanted.items())]


def markdown(rows: Sequence[RowResult]) -> str:
    """The rows as a Markdown table; errors in per cent."""
    lines = ["| row | test images | steps | paper | capsjax |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.title} | {row.dataset} | {row.steps:,} | {row.published} | {row.text} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _folder(config: ReproduceConfig) -> Path:
    """For what is under way: of one table, number of steps and dtype."""
    steps = "all" if config.steps is None else str(config.steps)
    return config.output / f"{config.table}-{steps}-{config.dtype}"


def _options(config: ReproduceConfig) -> dict[str, Any]:
    return {"table": config.table, "asked_steps": config.steps, "dtype": config.dtype}


def _conditions() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "capsjax": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
