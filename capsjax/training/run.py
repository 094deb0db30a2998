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
from typing import Any

import jax
import optax

from capsjax import models
from capsjax.data import Dataset
from capsjax.errors import ConfigError
from capsjax.training import choices, processes
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.config import OF_LEARNING_RATE, TrainConfig, check_together
from capsjax.training.counting import Evaluation
from capsjax.training.drivers import local
from capsjax.training.files import write_json
from capsjax.training.inputs import load_dataset
from capsjax.training.loading import load_own
from capsjax.training.loop import Progress, Run, begin, is_over, read_history, train_and_test
from capsjax.training.objectives import Metric, Objective
from capsjax.training.picture import draw_reconstructions
from capsjax.training.programs import unstack
from capsjax.training.reporting import Report, say
from capsjax.training.run_directory import DataDescription, RunConfig, RunDirectory
from capsjax.training.setup import Custom, Setup, set_up
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
            setup, stored = _resume(configs, directories, model, dataset, custom)
            if not restarts:
                _check_unfinished(setup, directories)
        else:
            for directory in directories:
                directory.check_new()  # before anything is loaded
            setup, stored = _start(configs, model, dataset, custom)
            for directory in directories:
                directory.create()
            _lock(directories, opened)
            for directory in directories:
                directory.check_new()  # another process may have started a run meanwhile
        try:
            for directory, each in zip(directories, stored, strict=True):
                # A resumed run may have new options, and may have to be resumed again.
                directory.write_config(each)
            return _run(setup, stored, directories, started, stop)
        except BaseException:
            if not configs[0].resume:
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
            f"{directory.path} is taken over from {before}; if that process still runs, it ends"
            " before it writes again"
        )


def _check_alike(
    configs: Sequence[TrainConfig],
    model: models.ModelConfig | None,
    dataset: Dataset | None,
    custom: Custom,
) -> None:
    """Raises a ConfigError unless all processes were started with the same options."""
    config = configs[0]
    options = {**config.to_json(), "resume": config.resume, "auto_resume": config.auto_resume}
    for name in ("data_dir", "init_from"):  # the contents are compared, paths may differ
        del options[name]
    values = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    values |= {
        "seeds": [c.seed for c in configs],
        "run directories": [str(c.run_dir) for c in configs],
    }
    values |= {"model": None if model is None else repr(model), "custom": custom.shaping}
    values["a data set given in Python"] = dataset is not None
    processes.check_alike(values, what="options")


def _start(
    configs: Sequence[TrainConfig],
    model: models.ModelConfig | None,
    dataset: Dataset | None,
    custom: Custom,
) -> tuple[Setup, list[RunConfig]]:
    """Returns what new runs compute, and the stored configuration of each."""
    config = configs[0]
    config.check_effect()
    given = dataset is not None
    if dataset is None:
        choices.check_data_dir(config.dataset, config.data_dir)
        dataset = load_dataset(
            config.dataset,
            config.input,
            data_dir=config.data_dir,
            image_size=config.image_size,
            channels=config.channels,
        )
    if model is None:
        model = choices.choose_model(config, dataset)
    else:
        choices.check_model(config, model)
    data = DataDescription.of(dataset)
    setup = set_up(configs, model, dataset, custom)
    return setup, [
        RunConfig(each, model, data, given=given, custom=custom.shaping) for each in configs
    ]


def _resume(
    configs: Sequence[TrainConfig],
    directories: Sequence[RunDirectory],
    model: models.ModelConfig | None,
    dataset: Dataset | None,
    custom: Custom,
) -> tuple[Setup, list[RunConfig]]:
    """Returns what resumed runs compute, and the stored configuration of each."""
    resumed = [directory.read_config() for directory in directories]
    for each, before in zip(configs, resumed, strict=True):
        check_same_run(each, model, before)
        model = before.model
        if custom.shaping != before.custom:
            both = (before.custom, custom.shaping)
            then, now = (" and ".join(names) or "neither" for names in both)
            raise ConfigError(
                f"to resume the run in {each.run_dir}, give the same objective and optimizer in"
                f" Python as at its start: {then}, got {now}"
            )
    stratified = {before.stratified for before in resumed}
    if len(stratified) > 1:
        raise ConfigError("these runs hold out different images; resume each one alone")
    if dataset is None:
        config, before = configs[0], resumed[0]
        other = config.data_dir if config.data_dir != before.train.data_dir else None
        dataset = load_own(before, other, input=config.input)
    data = DataDescription.of(dataset)
    for before in resumed:
        before.data.check(data)
    data = resumed[0].data.completed(data)
    assert model is not None  # there is at least one run
    configs[0].check_learning_rate()
    if not any(directory.last_checkpoint() for directory in directories):
        say(f"the run in {directories[0].path} has no checkpoint and starts again at step 0")
    setup = set_up(
        configs,
        model,
        dataset,
        custom,
        stratified=all(stratified),
        initialise=not any(directory.last_checkpoint() for directory in directories),
    )
    return setup, [
        before._replace(
            train=each,
            model=model,
            data=data,
            changes=(*before.changes, *_changes(before, each, directory.last_checkpoint())),
        )
        for each, before, directory in zip(configs, resumed, directories, strict=True)
    ]


def _changes(before: RunConfig, config: TrainConfig, step: int) -> list[dict[str, Any]]:
    """Returns the record of a changed learning rate for a run that is resumed at this step."""
    # A cosine schedule depends on the last step.
    names = (*OF_LEARNING_RATE, *(("steps", "epochs") if config.schedule == "cosine" else ()))
    options = {name: getattr(config, name) for name in names}
    changed = {n: v for n, v in options.items() if v != getattr(before.train, n)}
    return [{"step": step, **changed}] if changed else []


def _run(
    setup: Setup,
    stored: Sequence[RunConfig],
    directories: Sequence[RunDirectory],
    started: float,
    stop: StopRequest,
) -> list[Result]:
    """Trains to the end or until the runs are stopped."""
    config = setup.config
    data = dataclasses.asdict(stored[0].data)
    processes.check_alike({_words(name): value for name, value in data.items()}, what="data")
    initial = {"the checksum of the initial parameters": processes.checksum(setup.initial)}
    processes.check_alike(initial, what="machines and packages")
    # The stop request is exited first, so that a signal ends the process while files are closed.
    with contextlib.ExitStack() as opened, stop:
        pairs = zip(directories, stored, strict=True)
        checkpoints = [
            Checkpoints(
                directory.checkpoints,
                keep=config.keep,
                regression=setup.is_regression,
                run=each.shaping(),
            )
            for directory, each in (pairs if processes.is_first() else ())
        ]
        opened.callback(setup.feed.close)
        for saved in checkpoints:
            opened.enter_context(contextlib.closing(saved))
        progress = begin(setup, directories, checkpoints)
        first_step = progress.step
        report = opened.enter_context(
            Report(
                directories,
                total_steps=setup.total_steps,
                step=first_step,
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


def check_same_run(
    config: TrainConfig,
    model: models.ModelConfig | None,
    before: RunConfig,
    *,
    may_change_rate: bool = True,
) -> None:
    """Raises a ConfigError unless the options, and the network if given, are those of the run."""
    config.check_resumes(before.train, may_change_rate=may_change_rate)
    if model is not None and model != before.model:
        raise ConfigError(f"the run in {config.run_dir} trains another network: {before.model}")


def _words(name: str) -> str:
    return "data " + name.replace("_", " ")


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


def _check_unfinished(setup: Setup, directories: Sequence[RunDirectory]) -> None:
    """Raises a ConfigError if all of these runs are finished."""
    results = [each.read_result() for each in directories]
    _, history = read_history(setup, [each.read_metrics() for each in directories])
    ends = [r.step for r in results if r and is_over(setup, r.step, history)]
    if len(ends) == len(directories):
        raise ConfigError(
            f"the run in {directories[0].path} is finished at step {ends[0]:,}; raise --epochs,"
            " --steps or --patience to continue"
        )


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
