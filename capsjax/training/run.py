"""Whole runs, from options to finished run directories, for one seed or several at once."""

import contextlib
import dataclasses
import datetime
import functools
import math
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import optax

from capsjax import models
from capsjax.data import Dataset
from capsjax.files import is_lost
from capsjax.training import processes
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.config import TrainConfig, check_together
from capsjax.training.counting import Evaluation
from capsjax.training.custom import Custom
from capsjax.training.drivers import local
from capsjax.training.files import write_json
from capsjax.training.loop import Progress, Run, begin, train_and_test
from capsjax.training.objectives import Metric, Objective
from capsjax.training.picture import draw_reconstructions
from capsjax.training.programs import unstack
from capsjax.training.reporting import Report, say
from capsjax.training.run_directory import RunConfig, RunDirectory
from capsjax.training.setup import Setup
from capsjax.training.starting import check_unfinished, resume, start
from capsjax.training.stopping import StopRequest


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a run.

    Attributes:
      run_dir: directory of the run.
      step: number of steps taken.
      test: evaluation of the last parameters on the whole test set; None if the run was stopped.
      validation_error: error rate of the last validation, or None.
      first_step: the step at which this process began: 0, or that of the resumed checkpoint.
      seconds: wall time in this process, including compilation.
      stopped_by: the signal that stopped the run before its end, or None.
    """

    run_dir: Path
    step: int
    test: Evaluation | None
    validation_error: float | None
    first_step: int
    seconds: float
    stopped_by: signal.Signals | None = None


def train(
    config: TrainConfig,
    *,
    model: models.ModelConfig | None = None,
    dataset: Dataset | None = None,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Result:
    """Trains a network, or resumes a run.

    Args:
      config: the options.
      model: the network's configuration; when None, that of the preset, adapted to the data set. A
        resumed run keeps its configuration.
      dataset: the images; loaded as the options say when None.
      objective: ``(prediction, target, images) -> losses``, one per example; see
        :func:`make_train_step`. When None, chosen by the options.
      optimizer: an optax transformation; when None, Adam with the options' settings. A run with a
        given objective or optimizer must be resumed with the same one.
      metrics: other values per example, ``(prediction, target) -> [B]``, by name; their means over
        validation and test images are recorded.

    Returns:
      The run's :class:`Result`.

    Raises:
      ConfigError: an option is invalid.
      capsjax.data.DataError: the data set is missing or damaged.
      CheckpointError: a checkpoint cannot be written or read.
      DivergedError: the loss is not finite; the last good checkpoint is kept.

    Example:
      >>> import tempfile, jax, numpy as np, optax
      >>> from capsjax import models
      >>> from capsjax.data import Dataset, Split
      >>> from capsjax.training import TrainConfig, train
      >>> pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
      >>> brightness = pixels.mean((1, 2, 3), keepdims=False)[:, None].astype(np.float32) / 255
      >>> split = Split(pixels, brightness)
      >>> dataset = Dataset("brightness", split, split, ("mean",))  # float32: numbers to predict
      >>> model = models.configure("baseline", image_shape=(8, 8, 1), num_classes=1,
      ...                          conv_features=(4,), dense_features=(4,))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   config = TrainConfig(run_dir=folder, steps=2, batch_size=8, validation=0, driver="jit")
      ...   result = train(config, model=model, dataset=dataset, optimizer=optax.sgd(0.1))
      >>> result.step, list(result.test.metrics)
      (2, ['absolute_error'])
    """
    (result,) = train_seeds(
        (config,),
        model=model,
        dataset=dataset,
        objective=objective,
        optimizer=optimizer,
        metrics=metrics,
    )
    return result


def train_seeds(
    configs: Sequence[TrainConfig],
    *,
    model: models.ModelConfig | None = None,
    dataset: Dataset | None = None,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    metrics: Mapping[str, Metric] | None = None,
    deadline: float = math.inf,
) -> list[Result]:
    """Trains several seeds at once, by ``vmap``; each has its own run directory.

    Runs that are resumed together continue from the last step of which all have a checkpoint.

    Args:
      configs: the options of each run, which may differ only in `seed` and `run_dir`.
      model: as in :func:`train`.
      dataset: as in :func:`train`.
      objective: as in :func:`train`.
      optimizer: as in :func:`train`.
      metrics: as in :func:`train`.
      deadline: the value of `time.monotonic` at which the runs save and stop.

    Returns:
      A :class:`Result` for each run.

    Raises:
      ConfigError: as in :func:`train`; also if the options differ otherwise, or if several runs
        have `until_error` or `patience`, which may end them at different steps.
    """
    started = time.monotonic()
    check_together(configs)
    custom = Custom(objective, optimizer, metrics)
    custom.check(configs[0])
    stop = StopRequest(deadline)
    with contextlib.ExitStack() as opened:
        opened.enter_context(processes.together())
        if processes.number() > 1:
            opened.enter_context(stop)  # a signal in the meantime must not end this process alone
        _check_alike(configs, model, dataset, custom)
        name = configs[0].dataset if dataset is None else dataset.name
        directories = [RunDirectory(_run_dir(each, name)) for each in configs]
        restarts = configs[0].auto_resume
        if restarts:
            begun = [directory.holds_run() for directory in directories]
            configs = [
                dataclasses.replace(c, auto_resume=False, resume=all(begun)) for c in configs
            ]
        if configs[0].resume:
            _lock(directories, opened)
            setup, stored = resume(configs, directories, model, dataset, custom)
            if not restarts:
                check_unfinished(setup, directories)
        else:
            for directory in directories:
                directory.check_new()  # before anything is loaded
            setup, stored = start(configs, model, dataset, custom)
            for directory in directories:
                directory.create()
            _lock(directories, opened)
            for directory in directories:
                directory.check_new()  # another process may have started a run meanwhile
        try:
            for directory, each in zip(directories, stored, strict=True):
                # A resumed run may have new options, and may have to be resumed again.
                directory.write_config(each)
            return _run(setup, stored, directories, started, stop, skip_damaged=restarts)
        except BaseException as error:
            if not configs[0].resume and not is_lost(directories[0].path, type(error)):
                for directory in directories:
                    directory.remove_unless_begun()
            raise


def _lock(directories: Sequence[RunDirectory], opened: contextlib.ExitStack) -> None:
    """Locks the directories, which process 0 writes to."""
    for directory in directories:
        processes.first(functools.partial(_enter, opened, directory), type(None))


def _enter(opened: contextlib.ExitStack, directory: RunDirectory) -> None:
    if (before := opened.enter_context(directory.locked())) is not None:
        say(
            f"{directory.path} is taken over from {before}; if that process still runs, it ends at"
            " its next checkpoint"
        )


def _check_alike(
    configs: Sequence[TrainConfig],
    model: models.ModelConfig | None,
    dataset: Dataset | None,
    custom: Custom,
) -> None:
    """Raises a ConfigError unless all processes were started with the same options."""
    others = {
        "seeds": [c.seed for c in configs],
        "run directories": [str(c.run_dir) for c in configs],
        "model": None if model is None else repr(model),
        "custom": custom.shaping,
        "a data set given in Python": dataset is not None,
    }
    # The contents of the first two are compared elsewhere; paths may differ.
    processes.check_options(configs[0], "data_dir", "init_from", "run_dir", others=others)


def _run(
    setup: Setup,
    stored: Sequence[RunConfig],
    directories: Sequence[RunDirectory],
    started: float,
    stop: StopRequest,
    *,
    skip_damaged: bool,
) -> list[Result]:
    """Trains to the end or until the runs are stopped."""
    config = setup.config
    stored[0].data.check_alike()
    initial = {"the checksum of the initial parameters": processes.checksum(setup.initial)}
    processes.check_alike(initial, what="machines and packages")
    # The stop request is exited first, so that a signal ends the process while files are closed.
    with contextlib.ExitStack() as opened, stop:
        pairs = zip(directories, stored, strict=True)
        opened.callback(setup.feed.close)
        checkpoints = [
            opened.enter_context(
                Checkpoints(
                    directory.checkpoints,
                    keep=config.keep,
                    regression=setup.is_regression,
                    run=each.shaping(),
                )
            )
            for directory, each in (pairs if processes.is_first() else ())
        ]
        progress = begin(setup, directories, checkpoints, skip_damaged=skip_damaged)
        first_step = progress.step
        report = opened.enter_context(
            Report(
                directories,
                total_steps=setup.total_steps,
                step=first_step,
                seconds=progress.seconds,
                tensorboard=config.tensorboard,
            )
        )
        report.say(_headline(setup, stored[0].data.name, directories, first_step))
        run = Run(setup, directories, checkpoints, report, stop)
        tests = train_and_test(run, progress)
        results = [
            Result(
                directory.path,
                progress.step,
                None if tests is None else tests[n],
                progress.history[-1][n] if progress.history and not setup.is_regression else None,
                first_step,
                time.monotonic() - started,
                stop.signal if tests is None else None,
            )
            for n, directory in enumerate(directories)
        ]
        if tests is not None and processes.is_first():
            _write_results(run, progress, results)
    return results


def _write_results(run: Run, progress: Progress, results: Sequence[Result]) -> None:
    """Writes the result of each run, then the pictures."""
    setup = run.setup
    for directory, result in zip(run.directories, results, strict=True):
        assert result.test is not None  # results are written only after the test
        values = {
            "step": result.step,
            "test_error": None if setup.is_regression else result.test.error,
            "test_wrong": result.test.wrong,
            "test_count": result.test.count,
            "test_loss": result.test.loss,
            "test_metrics": result.test.metrics,
            "validation_error": result.validation_error,
            "parameters": setup.num_parameters,
            "seconds": round(result.seconds, 1),
        }
        write_json(directory.result, values)
    variables = unstack(jax.device_get(local(progress.state.variables)), len(results))
    for directory, each in zip(run.directories, variables, strict=True):
        picture = directory.picture
        draw_reconstructions(setup.apply, each, setup.model, setup.sampler, setup.test, picture)


def _headline(setup: Setup, dataset: str, directories: Sequence[RunDirectory], step: int) -> str:
    config, devices = setup.config, setup.driver.devices
    validation = 0 if setup.validation is None else len(setup.validation.labels)
    test = len(setup.test.labels) if config.test_size is None else config.test_size
    where = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
    if processes.number() > 1:
        where += f" of {processes.number()} processes"
    begun = f", from step {step:,}" if step else ""
    seeds = f", {len(directories)} seeds at once" if len(directories) > 1 else ""
    return (
        f"{config.preset} ({setup.num_parameters:,} parameters) on {dataset}:"
        f" {len(setup.train.labels):,} training, {validation:,} validation,"
        f" {test:,} test images; {config.driver} on {where};"
        f" {setup.total_steps:,} steps of {config.batch_size}{seeds}{begun}\n"
        f"run directory: {', '.join(str(each.path) for each in directories)}"
    )


def _run_dir(config: TrainConfig, dataset: str) -> Path:
    if config.run_dir is not None:
        return config.run_dir
    now = processes.decide(datetime.datetime.now().strftime("%Y%m%d-%H%M%S"))
    name = re.sub(r"[^\w.-]", "_", dataset)
    return Path("runs") / f"{name}-{config.preset}-{now}"
