"""Whole runs: from options to finished run directories, of one seed or of several at once."""

import contextlib
import dataclasses
import datetime
import functools
import math
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from capsjax import models
from capsjax.data import Dataset, Sampler, epoch_order, load
from capsjax.errors import ConfigError
from capsjax.training import choices
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.config import TrainConfig, check_together
from capsjax.training.evaluation import Evaluation
from capsjax.training.files import write_json
from capsjax.training.loading import load_own
from capsjax.training.loop import Progress, Run, Setup, begin, is_over, train_and_test
from capsjax.training.memory import estimate_memory
from capsjax.training.picture import draw_reconstructions
from capsjax.training.programs import (
    StepSums,
    as_batch,
    make_evaluate,
    make_run_steps,
    stack,
    unstack,
)
from capsjax.training.reporting import Report, say
from capsjax.training.run_directory import DataDescription, RunConfig, RunDirectory
from capsjax.training.step import TrainState, init_state, make_train_step, split_network
from capsjax.training.stopping import StopRequest

_EPOCHS = 20


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a run.

    Attributes:
      run_dir: its directory.
      step: steps taken.
      test: evaluation of the last parameters on the whole test set; None if the run was stopped.
      validation_error: of the last checkpoint that was validated, or None.
      first_step: the step at which this process began: 0, or that of the resumed checkpoint.
      seconds: time in this process, compilation included.
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
    config: TrainConfig, *, model: models.ModelConfig | None = None, dataset: Dataset | None = None
) -> Result:
    """Trains a network, or goes on with a run.

    Args:
      config: the options.
      model: the network's configuration; the preset's for the data set when None. A resumed run
        keeps its own.
      dataset: the images; loaded by the options when None.

    Returns:
      The run's :class:`Result`.

    Raises:
      ConfigError: an option is invalid.
      capsjax.data.DataError: the data set is missing or damaged.
      CheckpointError: a checkpoint cannot be written or read.
      DivergedError: the loss is not finite; the last good checkpoint is kept.
    """
    (result,) = train_seeds((config,), model=model, dataset=dataset)
    return result


def train_seeds(
    configs: Sequence[TrainConfig],
    *,
    model: models.ModelConfig | None = None,
    dataset: Dataset | None = None,
    deadline: float = math.inf,
) -> list[Result]:
    """Trains several seeds at once, by ``vmap``; each leaves a run directory of its own.

    Runs that are resumed together go on from the last step of which all have a checkpoint.

    Args:
      configs: the options of each run, which differ in `seed` and `run_dir` only.
      model: as in :func:`train`.
      dataset: as in :func:`train`.
      deadline: the value of `time.monotonic` at which the runs save and end, as when stopped.

    Returns:
      A :class:`Result` for each run.

    Raises:
      ConfigError: as in :func:`train`; or the options differ in more, or `until_error` is given,
        which may end the runs at different steps.
    """
    started = time.monotonic()
    check_together(configs)
    name = configs[0].dataset if dataset is None else dataset.name
    directories = [RunDirectory(_run_dir(each, name)) for each in configs]
    with contextlib.ExitStack() as locks:
        if configs[0].resume:
            for directory in directories:
                locks.enter_context(directory.locked())
            setup, stored = _resume(configs, directories, model, dataset)
        else:
            for directory in directories:
                directory.check_new()  # before anything is loaded
            setup, stored = _start(configs, model, dataset)
            for directory in directories:
                directory.create()
                locks.enter_context(directory.locked())
                directory.check_new()  # what another process may have begun meanwhile
        try:
            for directory, each in zip(directories, stored, strict=True):
                # A resumed run may have become longer, and may have to be resumed again.
                directory.write_config(each)
            return _run(setup, stored, directories, started, deadline)
        except BaseException:
            if not configs[0].resume:
                for directory in directories:
                    directory.remove_unless_begun()
            raise


def _start(
    configs: Sequence[TrainConfig], model: models.ModelConfig | None, dataset: Dataset | None
) -> tuple[Setup, list[RunConfig]]:
    """What new runs compute, and what is stored of each."""
    config = configs[0]
    config.check_effect()
    given = dataset is not None
    if dataset is None:
        choices.check_data_dir(config.dataset, config.data_dir)
        dataset = load(
            config.dataset,
            data_dir=config.data_dir,
            image_size=config.image_size,
            channels=config.channels,
        )
    if model is None:
        model = choices.choose_model(config, dataset)
    else:
        choices.check_model(config, model)
    data = DataDescription.of(dataset)
    setup = set_up(configs, model, dataset)
    return setup, [RunConfig(each, model, data, given=given) for each in configs]


def _resume(
    configs: Sequence[TrainConfig],
    directories: Sequence[RunDirectory],
    model: models.ModelConfig | None,
    dataset: Dataset | None,
) -> tuple[Setup, list[RunConfig]]:
    """What resumed runs compute, and what is stored of each."""
    resumed = [directory.read_config() for directory in directories]
    for each, before in zip(configs, resumed, strict=True):
        check_same_run(each, model, before)
        model = before.model
    stratified = {before.stratified for before in resumed}
    if len(stratified) > 1:
        raise ConfigError("these runs hold out different images; resume each by itself")
    if dataset is None:
        config, before = configs[0], resumed[0]
        other = config.data_dir if config.data_dir != before.train.data_dir else None
        dataset = load_own(before, other)
    data = DataDescription.of(dataset)
    for before in resumed:
        before.data.check(data)
    data = dataclasses.replace(data, name=resumed[0].data.name)
    assert model is not None  # there is at least one run
    setup = set_up(configs, model, dataset, stratified=all(stratified))
    _check_unfinished(setup, directories)
    given = resumed[0].given
    return setup, [RunConfig(each, model, data, all(stratified), given) for each in configs]


def _run(
    setup: Setup,
    stored: Sequence[RunConfig],
    directories: Sequence[RunDirectory],
    started: float,
    deadline: float,
) -> list[Result]:
    """Trains to the end, or until the runs are stopped."""
    config = setup.config
    # The request ends first: while files are closed, a signal ends the process.
    with contextlib.ExitStack() as opened, StopRequest(deadline) as stop:
        checkpoints = [
            Checkpoints(directory.checkpoints, keep=config.keep, run=each.shaping())
            for directory, each in zip(directories, stored, strict=True)
        ]
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
                progress.errors[n] if progress.errors else None,
                first_step,
                time.monotonic() - started,
                stop.signal if tests is None else None,
            )
            for n, directory in enumerate(directories)
        ]
        if tests is not None:
            _write_results(run, progress, results)
    return results


def set_up(
    configs: Sequence[TrainConfig],
    model: models.ModelConfig,
    dataset: Dataset,
    *,
    stratified: bool = True,
) -> Setup:
    """Builds what runs compute, with images held out as by :func:`hold_out`.

    Before it builds anything, it says which memory that takes.

    Raises:
      ConfigError: the options do not go together, or not with this machine or these images.
    """
    config = configs[0]
    choices.check_dataset(dataset, model)
    train, validation = choices.hold_out(dataset.train, config.validation, stratified=stratified)
    if config.until_error is not None and validation is None:
        raise ConfigError(
            "--until-error needs validation images, a tenth of"
            f" {len(dataset.train.labels)} training images is none"
        )
    task = choices.choose_task(dataset, config.max_shift, config.fill)
    objective = choices.choose_objective(
        config.loss, config.preset, model, several_classes=dataset.has_several_classes
    )
    driver = choices.choose_driver(config.driver, config.devices, config.batch_size)
    choices.check_test_size(dataset, config.test_size)
    steps_per_epoch = choices.count_batches(train, config.batch_size)
    total_steps = config.steps or (config.epochs or _EPOCHS) * steps_per_epoch
    if total_steps >= 2**31:
        raise ConfigError(f"--epochs must make fewer than 2147483648 steps, got {total_steps}")
    sampler = Sampler(task, model.num_classes, config.flip)
    optimizer = choices.make_optimizer(config)
    memory = estimate_memory(
        model,
        driver,
        batch_size=config.batch_size,
        examples=dataset.train.images.nbytes,
        num_seeds=len(configs),
    )
    say(f"{config.preset}: {memory}")
    keys = [jax.random.split(jax.random.key(each.seed), 3) for each in configs]
    networks = [split_network(models.build(model, rngs=nnx.Rngs(init))) for init, _, _ in keys]
    apply, _ = networks[0]
    batch_size, several = config.batch_size, len(configs) > 1
    compiled = make_run_steps(
        make_train_step(apply, optimizer, objective, axis_name=driver.axis_name),
        sampler,
        driver,
        batch_size=batch_size,
        several_seeds=several,
    )
    examples = driver.replicate(as_batch(train))
    step_key = driver.replicate(stack([key for _, _, key in keys]))

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> jax.Array:
        count = len(train.labels)
        orders = [epoch_order(jax.random.fold_in(key, epoch), count) for _, key, _ in keys]
        return driver.replicate(stack(orders))

    def run_steps(state: TrainState, step: int, num_steps: int) -> tuple[TrainState, StepSums]:
        """Starts steps that do not cross the end of an epoch."""
        epoch = step // steps_per_epoch
        return compiled(state, examples, order(epoch), step_key, np.int32(num_steps))

    return Setup(
        configs=configs,
        model=model,
        train=train,
        validation=None if validation is None else driver.replicate(as_batch(validation)),
        test=dataset.test,
        sampler=sampler,
        driver=driver,
        apply=apply,
        initial=stack([init_state(variables, optimizer) for _, variables in networks]),
        run_steps=run_steps,
        evaluate=make_evaluate(
            apply, objective, sampler, driver, batch_size=batch_size, several_seeds=several
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        num_parameters=memory.num_parameters,
    )


def check_same_run(
    config: TrainConfig, model: models.ModelConfig | None, before: RunConfig
) -> None:
    """Raises a ConfigError unless options, and the network if any, are those of a run."""
    config.check_resumes(before.train)
    if model is not None and model != before.model:
        raise ConfigError(f"the run in {config.run_dir} is of another network: {before.model}")


def _write_results(run: Run, progress: Progress, results: Sequence[Result]) -> None:
    """Writes the result of each run, and then the pictures."""
    setup = run.setup
    for directory, result in zip(run.directories, results, strict=True):
        assert result.test is not None  # results are written of runs that were tested
        values = {
            "step": result.step,
            "test_error": result.test.error,
            "test_wrong": result.test.wrong,
            "test_count": result.test.count,
            "test_loss": result.test.loss,
            "validation_error": result.validation_error,
            "parameters": setup.num_parameters,
            "seconds": round(result.seconds, 1),
        }
        write_json(directory.result, values)
    variables = unstack(jax.device_get(progress.state.variables), len(results))
    for directory, each in zip(run.directories, variables, strict=True):
        picture = directory.picture
        draw_reconstructions(setup.apply, each, setup.model, setup.sampler, setup.test, picture)


def _check_unfinished(setup: Setup, directories: Sequence[RunDirectory]) -> None:
    """Raises a ConfigError if there is nothing left to do in any directory."""
    results = [each.read_result() for each in directories]
    ends = [r.step for r in results if r and is_over(setup, r.step, [r.validation_error])]
    if len(ends) == len(directories):
        raise ConfigError(
            f"the run in {directories[0].path} is finished at step {ends[0]:,}; raise --epochs or"
            " --steps to continue"
        )


def _headline(setup: Setup, dataset: str, directories: Sequence[RunDirectory], step: int) -> str:
    config, devices = setup.config, setup.driver.devices
    validation = 0 if setup.validation is None else len(setup.validation.labels)
    test = len(setup.test.labels) if config.test_size is None else config.test_size
    where = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
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
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.-]", "_", dataset)
    return Path("runs") / f"{name}-{config.preset}-{now}"
