"""Reproduces tables row by row and seed by seed; each seed is an ordinary run."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from filelock import FileLock, Timeout

from capsjax.data import Dataset, is_right, load
from capsjax.errors import ConfigError
from capsjax.files import write_text
from capsjax.options import (
    check_default,
    check_types,
    expand_paths,
    require,
    require_at_least,
)
from capsjax.reproduce.recipes import TABLES, Recipe
from capsjax.reproduce.results import (
    Line,
    RowResult,
    add_result,
    check_alike,
    describe,
    markdown,
    measured,
    read_results,
    rows_of,
)
from capsjax.training import (
    EvaluateConfig,
    Result,
    evaluate,
    predict_test,
    processes,
    train_seeds,
)
from capsjax.training.data_description import DataDescription
from capsjax.training.run_directory import RunDirectory, seconds_of
from capsjax.training.starting import check_same_run

if TYPE_CHECKING:
    TableName = str
else:
    TableName = Literal[tuple(TABLES)]

_MOST_SEEDS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Train the rows of a published table with several seeds, and write mean and deviation.

    Each seed is a run under OUTPUT, which evaluate, draw, explore and train --resume can open.
    Finished runs are listed in OUTPUT/results.jsonl and not trained again. The same command
    continues interrupted ones. Tables: mnist and multi_mnist (Sabour et al. 2017, table 1), affine,
    cifar10, svhn and smallnorb (the same paper's text), ablation (differences between the authors'
    code and the printed formulas), small (networks for two CPU cores).
    """

    table: TableName
    """Table to reproduce."""

    rows: tuple[str, ...] = ()
    """Names of the rows to train. By default, all rows of the table."""

    list: bool = False
    """Only print the rows: the command, the paper's error, and the results in OUTPUT."""

    seeds: int = 3
    """Number of trials per row, with seeds 0, 1, 2 and so on."""

    steps: int | None = None
    """Steps per trial, instead of the recipe's number. The results record it."""

    together: int = 1
    """Number of trials that vmap trains together. Rows that stop at an error train one at a
    time."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation."""

    data_dir: Path | None = None
    """Directory of prepared data sets, or an .npz file written by save_npz."""

    output: Path = Path("reproduced")
    """Directory for results and runs. Use another one for other data."""

    seconds: float | None = None
    """Save and stop after this many seconds. The same command continues."""

    def __post_init__(self) -> None:
        """Checks the options."""
        check_types(self)
        expand_paths(self, "data_dir", "output")
        require_at_least(self, 1, "seeds", "together", "steps")
        require(self, "seconds", self.seconds is None or self.seconds > 0, "positive")
        for name in ("seeds", "together"):
            require(self, name, getattr(self, name) <= _MOST_SEEDS, f"at most {_MOST_SEEDS}")
        if self.list:
            training = ("seeds", "steps", "together", "dtype", "data_dir", "seconds")
            check_default(self, "with --list, which trains nothing", *training)
        known = [recipe.name for recipe in TABLES[self.table]]
        for row in self.rows:
            if row not in known:
                raise ConfigError(f"--rows must be among {', '.join(known)}, got {row!r}")

        if self.together > 1 and all(r.until_error is not None for r in self.recipes()):
            raise ConfigError("--together has no effect on rows that end at an error")

    def recipes(self) -> Sequence[Recipe]:
        """Returns the rows to train."""
        return [r for r in TABLES[self.table] if not self.rows or r.name in self.rows]

    @property
    def folder(self) -> Path:
        """Directory of the runs of this table, number of steps and dtype."""
        steps = "all" if self.steps is None else str(self.steps)
        return self.output / f"{self.table}-{steps}-{self.dtype}"

    @property
    def results(self) -> Path:
        """The file of finished trials."""
        return self.output / "results.jsonl"


def reproduce(config: ReproduceConfig, *, say: Callable[[str], None] = print) -> list[RowResult]:
    """Trains the missing trials of a table, and returns all results.

    Args:
      config: the options.
      say: called with each line of progress.

    Returns:
      The results of the rows, in the table's order; empty if the rows are only listed.

    Raises:
      ConfigError: an option is invalid, a file is damaged, or the output directory has results with
        other settings or data.
      capsjax.data.DataError: a data set is missing or damaged.
    """
    with processes.together():
        return _reproduce(config, say if processes.is_first() else lambda line: None)


def _reproduce(config: ReproduceConfig, say: Callable[[str], None]) -> list[RowResult]:
    if config.list:
        lines = read_results(config.results)
        say("\n\n".join(_listing(recipe, lines) for recipe in config.recipes()))
        say(f"\n'here' is {config.output}; RESULTS.md has the results of other machines")
        return []
    processes.check_options(config, "data_dir")
    processes.first(lambda: _make_folder(config), type(None))
    deadline = math.inf if config.seconds is None else time.monotonic() + config.seconds
    get = functools.cache(lambda name: load(name, data_dir=config.data_dir))
    for recipe in config.recipes():
        row = _Row(recipe, config, get)
        row.check()
        while row.missing():
            if processes.decide(time.monotonic() >= deadline):
                say("time limit reached; run the same command to continue")
                return _rows(config)
            with row.claimed() as seeds:
                if not seeds:
                    say(f"{recipe.name}: another command is training seeds {row.missing()}")
                    break
                if not row.train(seeds, deadline):
                    reason = "time limit reached" if time.monotonic() >= deadline else "stopped"
                    say(f"{reason}; run the same command to continue")
                    return _rows(config)
                for seed in seeds:
                    say(row.finish(seed, together=len(seeds)))
            _write_table(config)
        if recipe.ensemble and config.seeds > 1 and not row.missing() and not row.has_ensemble():
            say(row.evaluate_ensemble())
            _write_table(config)
    return _rows(config)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of a table, and its trials so far."""

    recipe: Recipe
    config: ReproduceConfig
    get: Callable[[str], Dataset]

    def run_dir(self, seed: int) -> Path:
        return self.config.folder / f"{self.recipe.name}-seed-{seed}"

    def line(self, **fields: object) -> Line:
        """Makes a result of this row."""
        options = {
            "table": self.config.table,
            "recipe": self.recipe.name,
            "asked_steps": self.config.steps,
            "dtype": self.config.dtype,
        }
        return Line(**options, **fields)  # type: ignore[arg-type]

    def lines(self) -> list[Line]:
        """The results so far."""
        like = self.line(seed=0, errors={"": 0.0})
        lines = processes.first(lambda: read_results(self.config.results), list[Line])
        return [line for line in lines if line.same_row(like)]

    def check(self) -> None:
        """Raises a ConfigError if finished trials of this row were trained differently."""
        trials = [line for line in self.lines() if line.seed is not None]
        if trials:
            now = describe(self.recipe, self.get(self.recipe.dataset))
            for trial in trials:
                check_alike(trial, now, self.config.results)

    def missing(self) -> list[int]:
        """The seeds without a result."""
        found = {line.seed for line in self.lines()}
        return [seed for seed in range(self.config.seeds) if seed not in found]

    def has_ensemble(self) -> bool:
        return any(line.ensemble == self.config.seeds for line in self.lines())

    @contextlib.contextmanager
    def claimed(self) -> Iterator[list[int]]:
        """Locks seeds to train together, skipping those that another command is training."""
        most = 1 if self.recipe.until_error is not None else self.config.together
        with contextlib.ExitStack() as locks:
            seeds: list[int] = []
            common: set[int] = set()
            for seed in self.missing():
                # Runs resumed together need a checkpoint of the same step.
                steps = self._checkpoints(seed)
                same = not seeds or self._begun(seed) == self._begun(seeds[0])
                apart = seeds and (common or steps) and not common & steps
                if len(seeds) == most or not same or apart:
                    break
                common = common & steps if seeds else steps
                lock = FileLock(f"{self.run_dir(seed)}.lock", blocking=False)
                if not processes.first(functools.partial(_try_enter, locks, lock), bool):
                    continue
                if seed in self.missing():  # another command may have finished it
                    seeds.append(seed)
            yield seeds

    def _checkpoints(self, seed: int) -> set[int]:
        """The steps of a run's checkpoints."""
        directory = RunDirectory(self.run_dir(seed))
        return processes.first(lambda: set(directory.checkpoint_steps()), set[int])

    def _begun(self, seed: int) -> tuple[bool, bool]:
        """Whether a run has started, and whether it is finished."""
        directory = RunDirectory(self.run_dir(seed))
        return (
            processes.first(directory.config.exists, bool),
            processes.first(directory.result.exists, bool),
        )

    def train(self, seeds: Sequence[int], deadline: float) -> bool:
        """Trains seeds together; returns False if the time limit was reached first."""
        begun, finished = self._begun(seeds[0])
        dataset = self.get(self.recipe.dataset)
        try:
            model = self.recipe.configure(
                image_shape=dataset.image_shape,
                num_classes=dataset.num_classes,
                dtype=self.config.dtype,
            )
        except ValueError as error:
            raise ConfigError(f"recipe {self.recipe.name}: {error}") from None
        options = [
            self.recipe.options(
                self.run_dir(seed),
                train_images=len(dataset.train.labels),
                steps=self.config.steps or self.recipe.steps,
                seed=seed,
                dtype=self.config.dtype,
                data_dir=self.config.data_dir,
                resume=begun,
            )
            for seed in seeds
        ]
        if processes.number() > 1:
            options = [dataclasses.replace(each, driver="pmap") for each in options]
        for each in options if begun else ():
            before = RunDirectory(self.run_dir(each.seed)).read_config()
            check_same_run(each, model, before, may_change_rate=False)
            before.data.check(DataDescription.of(dataset))
        if finished:  # the command was stopped before it recorded the result
            return True
        results: list[Result] = train_seeds(
            options, model=model, dataset=dataset, deadline=deadline
        )
        if results[0].stopped_by is not None and processes.number() == 1:
            signal.raise_signal(results[0].stopped_by)  # everything is saved: end the command
        return results[0].test is not None

    def finish(self, seed: int, *, together: int) -> str:
        """Records the result of a finished run, and returns it as text."""
        directory = RunDirectory(self.run_dir(seed))
        result = directory.read_result()
        assert result is not None  # the run is finished
        dataset = self.get(self.recipe.dataset)
        assert result.test_wrong is not None  # all tables are of classification
        errors = {dataset.name: result.test_wrong / result.test_count}
        counts = {dataset.name: result.test_count}
        if self.recipe.also_tested_on is not None:
            other = self.get(self.recipe.also_tested_on)
            found = evaluate(self._evaluation(seed, self.recipe.also_tested_on), dataset=other)
            errors[other.name], counts[other.name] = found.test.error, found.test.count
        seconds = seconds_of(directory.read_metrics())
        line = self.line(
            seed=seed,
            steps=result.step,
            errors=errors,
            counts=counts,
            seconds=round(seconds, 1),
            together=together,
            of=describe(self.recipe, dataset),
            run=directory.path.relative_to(self.config.output).as_posix(),
        )
        processes.first(lambda: add_result(self.config.results, line), bool)
        text = ", ".join(f"{error:.2%} on {name}" for name, error in errors.items())
        return f"{self.recipe.name}, seed {seed}: error {text}"

    def evaluate_ensemble(self) -> str:
        """Records the error of the mean of all runs' scores, and returns it as text."""
        dataset, scores = self.get(self.recipe.dataset), []
        for seed in range(self.config.seeds):
            found, labels = predict_test(self._evaluation(seed, None), dataset=dataset)
            scores.append(found)
        error = float(1 - np.mean(is_right(np.mean(scores, axis=0), labels)))
        line = self.line(ensemble=self.config.seeds, error=error)
        processes.first(lambda: add_result(self.config.results, line), bool)
        return f"{self.recipe.name}, ensemble of {self.config.seeds}: error {error:.2%}"

    def _evaluation(self, seed: int, dataset: str | None) -> EvaluateConfig:
        run_dir = self.run_dir(seed)
        return EvaluateConfig(run_dir=run_dir, dataset=dataset, driver="jit", batch_size=500)


def _rows(config: ReproduceConfig) -> list[RowResult]:
    """All results of the requested rows."""
    rows = []
    for recipe in config.recipes():
        rows += rows_of(recipe, _Row(recipe, config, load).lines())
    return rows


def _write_table(config: ReproduceConfig) -> None:
    """Writes all rows with results, not only the requested ones."""
    text = markdown(_rows(dataclasses.replace(config, rows=())))
    processes.first(lambda: write_text(config.folder.with_suffix(".md"), text), type(None))


def _make_folder(config: ReproduceConfig) -> None:
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise ConfigError(f"--output {config.output} cannot be written: {reason}") from None


def _try_enter(opened: contextlib.ExitStack, lock: FileLock) -> bool:
    """Holds a lock until `opened` is closed; False if another command holds it."""
    try:
        opened.enter_context(lock)
    except Timeout:
        return False
    return True


def _listing(recipe: Recipe, lines: Sequence[Line]) -> str:
    """Title, command, number of steps, and published and measured error."""
    return (
        f"{recipe.title}\n  {recipe.command}\n  {recipe.steps:,} steps of {recipe.batch_size}"
        f" on {recipe.dataset}\n"
        f"  error in %: paper {recipe.paper or 'none'}; here {measured(recipe, lines)}"
    )
