"""Builds what runs compute from options: programs, data and the initial state."""

import dataclasses
import functools
from collections.abc import Sequence

import chex
import jax
import optax

from capsjax import models
from capsjax.data import Batch, Dataset, Sampler, Task
from capsjax.data.dataset import AnySplit
from capsjax.errors import ConfigError
from capsjax.training import choices, processes
from capsjax.training.config import OF_OPTIMIZER, TrainConfig
from capsjax.training.custom import Custom, try_evaluation, try_optimizer
from capsjax.training.drivers import Driver, local
from capsjax.training.feeding import (
    CHUNKS,
    Feed,
    Resident,
    Streamed,
    image_bytes,
    steps_per_chunk,
)
from capsjax.training.holdout import hold_out
from capsjax.training.inputs import choose_stream, choose_workers
from capsjax.training.loading import read_run, restore
from capsjax.training.memory import estimate_memory
from capsjax.training.objectives import Metric, Objective, weigh_classes
from capsjax.training.optimizers import make_optimizer
from capsjax.training.programs import (
    Evaluate,
    RunSteps,
    StepSums,
    as_batch,
    make_evaluate,
    make_run_steps,
    stack,
)
from capsjax.training.reporting import say
from capsjax.training.step import (
    Apply,
    TrainState,
    Variables,
    init_state,
    initial_variables,
    is_ours,
    make_train_step,
    split_abstract,
)
from capsjax.training.transfer import transfer

_EPOCHS = 20


_NONE = Custom()
# Options that the programs read themselves; the others act through the other parts.
_COMPILED = (*OF_OPTIMIZER, "freeze", "batch_size")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What runs compute. With several seeds, arrays that differ between them are stacked.

    Attributes:
      configs: the options of each run.
      model: the network's configuration.
      train: the training images on the host or on disk, without those held out.
      validation: the held-out images, as placed by the feed, or None.
      test: the test images on the host or on disk.
      sampler: makes the samples.
      driver: where it runs.
      apply: the network as a pure function.
      initial: the state before the first step.
      feed: runs the steps and the evaluations.
      steps_per_epoch: number of whole batches of training images.
      total_steps: step at which the runs end.
      num_parameters: number of parameters of one network.
      is_regression: whether the labels are numbers to predict.
    """

    configs: Sequence[TrainConfig]
    model: models.ModelConfig
    train: AnySplit
    validation: Batch | AnySplit | None
    test: AnySplit
    sampler: Sampler
    driver: Driver
    apply: Apply
    initial: TrainState
    feed: Feed
    steps_per_epoch: int
    total_steps: int
    num_parameters: int
    is_regression: bool

    @property
    def config(self) -> TrainConfig:
        """The options that all runs share."""
        return self.configs[0]

    def run_steps(
        self, state: TrainState, step: int, num_steps: int
    ) -> tuple[TrainState, StepSums]:
        """Dispatches steps, at most up to :meth:`Feed.call_end`; the state is donated."""
        return self.feed.run_steps(state, step, num_steps)


def set_up(
    configs: Sequence[TrainConfig],
    model: models.ModelConfig,
    dataset: Dataset,
    custom: Custom = _NONE,
    *,
    stratified: bool = True,
    initialise: bool = True,
) -> Setup:
    """Builds what runs compute, with validation images from :func:`hold_out`.

    Prints an estimate of the memory before building anything.

    Args:
      configs: the options of each run.
      model: the network's configuration.
      dataset: the images.
      custom: what is given in Python.
      stratified: see :func:`hold_out`.
      initialise: whether the initial state is used; False if a checkpoint will replace it.

    Raises:
      ConfigError: the options contradict each other, or do not fit this machine or these images.
    """
    config, several = configs[0], len(configs) > 1
    choices.check_dataset(dataset, model)
    train, validation = hold_out(dataset.train, config.validation, stratified=stratified)
    _check_stopping(config, dataset, validation)
    task = choices.choose_task(dataset, config.max_shift, config.fill)
    sampler = Sampler(task, model.num_classes, config.flip)
    objective = _choose_objective(config, custom, model, dataset)
    metrics = choices.choose_metrics(custom.metrics, dataset.is_regression)
    weights = choices.choose_class_weights(config.class_weights, dataset, train)
    driver = _choose_driver(config)
    choices.check_test_size(dataset, config.test_size)
    steps_per_epoch, total_steps = _count_steps(config, train)
    streamed = choose_stream(config.input, dataset, sampler, several_seeds=several)
    most = min(config.steps_per_dispatch, total_steps)
    chunk = steps_per_chunk(train, driver, config.batch_size, most)
    workers = choose_workers(config.workers, train)
    memory = estimate_memory(
        model,
        driver,
        batch_size=config.batch_size,
        examples=dataset.train.images.nbytes
        if streamed is None
        else CHUNKS * chunk * config.batch_size * image_bytes(train) // len(driver.devices),
        num_seeds=len(configs),
        optimizer=custom.optimizer,
    )
    say(f"{config.preset}: {memory}")
    if streamed is not None:
        pool = f"{workers} worker process{'es' * (workers > 1)}"
        say(f"input: streamed by {pool if workers else 'threads of this process'}, {streamed}")

    apply, shapes = split_abstract(model, frozen=config.freeze or ())
    programs = _Programs(
        config=TrainConfig(**{name: getattr(config, name) for name in _COMPILED}),
        model=model,
        apply=apply,
        optimizer=custom.optimizer,
        objective=objective,
        weights=weights,
        metrics=tuple(metrics.items()),
        sampler=sampler,
        driver=driver,
        several_seeds=several,
        streamed=streamed is not None,
        total_steps=total_steps if config.schedule == "cosine" else 0,
    )
    make = _shared_programs if _can_share(custom, task) else _Programs.make
    optimizer, steps, evaluate = make(programs)
    if custom.optimizer is not None:
        try_optimizer(optimizer, shapes.params, driver.axis_name)
    keys = [jax.random.split(jax.random.key(each.seed), 3) for each in configs]
    first = [initial_variables(model, key) for key, _, _ in keys]
    if config.init_from is not None and initialise:
        first = _transferred(config, first, driver)
    if custom.objective is not None or custom.metrics is not None:
        try_evaluation(apply, shapes, objective, metrics, sampler, train)

    order_keys = [key for _, key, _ in keys]
    step_key = driver.replicate(stack([key for _, _, key in keys]))
    feed: Feed
    if streamed is None:
        examples = driver.replicate(as_batch(train.read()))
        feed = Resident(driver, examples, order_keys, step_key, steps_per_epoch, steps, evaluate)
    else:
        feed = Streamed(
            driver=driver,
            train=train,
            order_key=order_keys[0],
            step_key=step_key,
            batch_size=config.batch_size,
            total_steps=total_steps,
            size=chunk,
            workers=workers,
            steps=steps,
            evaluate_chunk=evaluate,
        )
    return Setup(
        configs=configs,
        model=model,
        train=train,
        validation=None if validation is None else feed.place(validation),
        test=dataset.test,
        sampler=sampler,
        driver=driver,
        apply=apply,
        initial=stack([init_state(variables, optimizer) for variables in first]),
        feed=feed,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        num_parameters=memory.num_parameters,
        is_regression=dataset.is_regression,
    )


def _check_stopping(config: TrainConfig, dataset: Dataset, validation: AnySplit | None) -> None:
    if config.until_error is not None and dataset.is_regression:
        raise ConfigError("--until-error is for classes, not for numbers to predict")
    for option in config.stopping:
        if validation is None:
            raise ConfigError(
                f"{option} needs validation images, but a tenth of {len(dataset.train.labels)}"
                " training images is none"
            )


def _choose_objective(
    config: TrainConfig, custom: Custom, model: models.ModelConfig, dataset: Dataset
) -> Objective:
    if custom.objective is not None:
        return custom.objective
    choices.check_numbers(model, dataset)
    return choices.choose_objective(config.loss, config.preset, model, dataset)


def _choose_driver(config: TrainConfig) -> Driver:
    driver = choices.choose_driver(config.driver, config.devices, config.batch_size)
    if processes.number() > 1 and driver.most_devices == 1:
        raise ConfigError(
            f"--driver {config.driver} uses one device; several processes need pmap or shard"
        )
    return driver


def _count_steps(config: TrainConfig, train: AnySplit) -> tuple[int, int]:
    """Returns the number of steps of an epoch and of the whole run."""
    steps_per_epoch = choices.count_batches(train, config.batch_size)
    total_steps = config.steps or (config.epochs or _EPOCHS) * steps_per_epoch
    if total_steps >= 2**31:
        raise ConfigError(f"--epochs must make fewer than 2147483648 steps, got {total_steps}")
    if config.warmup_steps >= total_steps:
        raise ConfigError(
            f"--warmup-steps must be less than the steps of the run, {total_steps:,}, got"
            f" {config.warmup_steps:,}"
        )
    return steps_per_epoch, total_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Programs:
    """What the programs of runs are made from; runs with equal parts can share them.

    Attributes:
      config: the options that programs depend on directly; others have their defaults.
      model: the network's configuration.
      apply: the network as a pure function.
      optimizer: given in Python, or None for that of the options.
      objective: loss per example.
      weights: of the classes, or None.
      metrics: names and functions.
      sampler: makes the samples.
      driver: where the programs run.
      several_seeds: whether several networks train together.
      streamed: whether images are sent in chunks.
      total_steps: steps of the run if the learning rate depends on it, otherwise 0.
    """

    config: TrainConfig
    model: models.ModelConfig
    apply: Apply
    optimizer: optax.GradientTransformation | None
    objective: Objective
    weights: tuple[float, ...] | None
    metrics: tuple[tuple[str, Metric], ...]
    sampler: Sampler
    driver: Driver
    several_seeds: bool
    streamed: bool
    total_steps: int

    def make(self) -> tuple[optax.GradientTransformation, RunSteps, Evaluate]:
        """Returns the optimizer and the programs, which are compiled when they are first called."""
        config, weights = self.config, self.weights
        optimizer = self.optimizer or make_optimizer(config, self.total_steps)
        if config.freeze:
            _, (params, _) = split_abstract(self.model)
            optimizer = choices.freeze_parts(optimizer, params, config.freeze)
        weighed = self.objective if weights is None else weigh_classes(self.objective, weights)
        steps = make_run_steps(
            make_train_step(self.apply, optimizer, weighed, axis_name=self.driver.axis_name),
            self.sampler,
            self.driver,
            batch_size=config.batch_size,
            several_seeds=self.several_seeds,
            streamed=self.streamed,
        )
        evaluate = make_evaluate(
            self.apply,
            self.objective,
            self.sampler,
            self.driver,
            batch_size=config.batch_size,
            metrics=dict(self.metrics),
            several_seeds=self.several_seeds,
            streamed=self.streamed,
        )
        return optimizer, steps, evaluate


def _can_share(custom: Custom, task: Task) -> bool:
    """Whether programs depend on their arguments alone: the user's functions may have changed."""
    try:
        hash(task)
    except TypeError:
        return False
    return is_ours(type(task)) and all(part is None for part in custom)


# Runs with the same programs, such as those of a sweep over seeds, compile them once.
_shared_programs = functools.lru_cache(maxsize=8)(_Programs.make)


def _transferred(
    config: TrainConfig, networks: Sequence[Variables], driver: Driver
) -> list[Variables]:
    """Replaces parameters by those of the network to start from."""
    assert config.init_from is not None
    run = read_run(config.init_from)
    step, source = restore(config.init_from, config.init_checkpoint, run, driver)
    source = local(source)
    started: list[Variables] = []
    new: tuple[str, ...] = ()
    for variables in networks:
        variables, new = transfer(variables, source)
        started.append(variables)
    total = len(jax.tree.leaves(networks[0].params))
    if len(new) == total:
        ours, theirs = (_describe(params) for params in (networks[0].params, source.params))
        raise ConfigError(
            f"--init-from {config.init_from} has no parameter that matches this network by name and"
            f" shape: this one has {ours}, that one {theirs}"
        )
    checkpoint = "" if step is None else f", checkpoint of step {step:,}"
    rest = f"; new: {', '.join(new)}" if new else ""
    say(
        f"copied {total - len(new)} of {total} parameter arrays from"
        f" {config.init_from}{checkpoint}{rest}"
    )
    return started


def _describe(params: chex.ArrayTree) -> str:
    """Lists the kernels of a network with their shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = [(jax.tree_util.keystr(p, simple=True, separator="."), x.shape) for p, x in leaves]
    return ", ".join(f"{name} {list(shape)}" for name, shape in named if name.endswith("kernel"))
