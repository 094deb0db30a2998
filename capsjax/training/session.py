"""A network, its data and its compiled programs, ready to train or to evaluate."""

import dataclasses
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from capsjax import models
from capsjax.data import Batch, Dataset, Pairs, Shifted, Split, Task, epoch_order
from capsjax.errors import ConfigError
from capsjax.training.config import TrainConfig
from capsjax.training.drivers import Driver, make_driver
from capsjax.training.objectives import LOSSES, choose_loss
from capsjax.training.programs import Evaluate, RunSteps, StepSums, make_evaluate, make_run_steps
from capsjax.training.step import (
    Apply,
    TrainState,
    init_state,
    make_train_step,
    paper_optimizer,
    split_network,
)

_SECONDS_PER_CALL = 0.5


class Pace:
    """Chooses how much work one call of the devices gets, so that it lasts about half a second.

    Args:
      limit: largest amount.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._amount = 1
        self._calls = 0

    def amount(self, remaining: int) -> int:
        """Returns the amount for the next call, at most what remains."""
        return max(1, min(self._amount, remaining))

    def observe(self, amount: int, seconds: float) -> None:
        """Learns how long a call took; the first is left out, it includes the compilation."""
        self._calls += 1
        if self._calls > 1:
            fitting = int(_SECONDS_PER_CALL * amount / max(seconds, 1e-6))
            self._amount = max(1, min(self._limit, fitting, 4 * self._amount))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
      loss: mean of the objective, with the true classes as the decoder's target.
      wrong: number of wrong predictions.
      count: number of examples, every one counted once.
    """

    loss: float
    wrong: int
    count: int

    @property
    def error(self) -> float:
        """Share of wrong predictions."""
        return self.wrong / self.count


class Session:
    """Builds everything a run needs from its options.

    Args:
      config: the options.
      model: the network's configuration.
      dataset: the images.

    Raises:
      ConfigError: the options do not go together, or not with this machine or these images.
    """

    def __init__(self, config: TrainConfig, model: models.ModelConfig, dataset: Dataset):
        self.config = config
        self.model = model
        check_dataset(dataset, model)
        self.train, self.validation = hold_out(dataset.train, config.validation)
        self.test = dataset.test
        self.task = choose_task(dataset, config.max_shift)
        try:
            self.loss = choose_loss(
                config.loss, config.preset, model, several_classes=self.task.classes_per_image > 1
            )
            self.driver = make_driver(
                config.driver,
                batch_size=config.batch_size,
                devices=choose_devices(config.devices),
            )
        except ValueError as error:
            raise option_error(error) from None
        check_test_size(dataset, config.test_size)
        self.steps_per_epoch = len(self.train.labels) // config.batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"--batch-size must be at most the number of training images,"
                f" {len(self.train.labels)}, got {config.batch_size}"
            )
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        init_key, self._order_key, step_key = jax.random.split(jax.random.key(config.seed), 3)
        self.apply, variables = split_network(models.build(model, rngs=nnx.Rngs(init_key)))
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(variables.params))
        optimizer = make_optimizer(config)
        self._initial = init_state(variables, optimizer)
        self._step_key = self.driver.replicate(step_key)
        self._order: tuple[int, jax.Array] | None = None
        self._run_steps: RunSteps = make_run_steps(
            make_train_step(
                self.apply,
                optimizer,
                LOSSES[self.loss],
                num_classes=model.num_classes,
                task=self.task,
                axis_name=self.driver.axis_name,
            ),
            self.driver,
            batch_size=config.batch_size,
            task=self.task,
        )
        self.evaluator = Evaluator(
            self.apply, self.loss, self.driver, config.batch_size, model, self.task
        )
        self._examples = self.driver.replicate(_as_arrays(self.train))

    def initial_state(self) -> TrainState:
        """Returns the state before the first step, on the devices."""
        # A copy: what is donated must not be what a second call would return.
        return self.driver.replicate(jax.tree.map(jnp.copy, self._initial))

    def run_steps(
        self, state: TrainState, step: int, num_steps: int
    ) -> tuple[TrainState, StepSums]:
        """Starts steps that do not cross the end of an epoch; the state is donated."""
        epoch = step // self.steps_per_epoch
        if self._order is None or self._order[0] != epoch:
            key = jax.random.fold_in(self._order_key, epoch)
            order = epoch_order(key, len(self.train.labels))
            self._order = epoch, self.driver.replicate(order)
        return self._run_steps(
            state, self._examples, self._order[1], self._step_key, np.int32(num_steps)
        )


class Evaluator:
    """Evaluates parameters on whole splits.

    Args:
      apply: pure function of parameters and images.
      loss: name of the objective.
      driver: where it runs.
      batch_size: examples in the whole batch.
      model: the network's configuration.
      task: what is made of the images.
    """

    def __init__(
        self,
        apply: Apply,
        loss: str,
        driver: Driver,
        batch_size: int,
        model: models.ModelConfig,
        task: Task,
    ):
        self._driver = driver
        self._batch_size = batch_size
        self._evaluate: Evaluate = make_evaluate(
            apply,
            LOSSES[loss],
            driver,
            batch_size=batch_size,
            num_classes=model.num_classes,
            task=task,
        )
        self._placed: list[tuple[Split, Batch]] = []

    def __call__(
        self,
        state: TrainState,
        split: Split,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        number: int | None = None,
    ) -> Evaluation | None:
        """Evaluates every example of a split once; None if asked to stop on the way.

        Args:
          state: with the parameters.
          split: the images.
          should_stop: asked between calls of the devices.
          number: how many samples are made of the split; as many as it has images when None.
        """
        examples = self._place(split)
        number = len(split.labels) if number is None else number
        batches = -(-number // self._batch_size)
        pace, first = Pace(batches), 0
        loss, wrong, count = 0.0, 0, 0
        while first < batches:
            if should_stop():
                return None
            amount, start = pace.amount(batches - first), time.monotonic()
            sums = jax.device_get(
                self._evaluate(state.variables, examples, np.int32(first), np.int32(amount), number)
            )
            pace.observe(amount, time.monotonic() - start)
            loss, wrong, count = loss + sums.loss, wrong + sums.wrong, count + sums.examples
            first += amount
        return Evaluation(float(loss) / count, int(wrong), int(count))

    def _place(self, split: Split) -> Batch:
        """Copies a split to the devices, the first time it is evaluated."""
        for known, placed in self._placed:
            if known is split:
                return placed
        self._placed.append((split, self._driver.replicate(_as_arrays(split))))
        return self._placed[-1][1]


def hold_out(train: Split, number: int | None) -> tuple[Split, Split | None]:
    """Splits images for validation off the training images.

    Which ones does not depend on a run's seed, so that runs with different seeds share them.

    Args:
      train: images and labels.
      number: how many to hold out; a tenth when None.

    Returns:
      What is left for training, and the images for validation or None.

    Raises:
      ConfigError: nothing would be left to train on.

    Example:
      >>> import numpy as np
      >>> from capsjax.data import Split
      >>> from capsjax.training import hold_out
      >>> split = Split(np.zeros((50, 28, 28, 1), np.uint8), np.arange(50) % 10)
      >>> train, validation = hold_out(split, None)
      >>> len(train.labels), len(validation.labels)
      (45, 5)
    """
    total = len(train.labels)
    number = total // 10 if number is None else number
    if number >= total:
        raise ConfigError(
            f"--validation must be less than the number of training images, {total}, got {number}"
        )
    if not number:
        return train, None
    order = np.random.default_rng(0).permutation(total)
    held, kept = np.sort(order[:number]), np.sort(order[number:])
    return (
        Split(train.images[kept], train.labels[kept]),
        Split(train.images[held], train.labels[held]),
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Returns Adam with the options' learning rates."""
    return paper_optimizer(
        config.learning_rate,
        decay_rate=config.decay_rate,
        decay_steps=config.decay_steps,
        floor=config.min_learning_rate,
    )


def choose_task(dataset: Dataset, max_shift: int | None) -> Task:
    """Returns the data set's task, with another largest shift if there is one.

    Raises:
      ConfigError: images of this data set are not shifted, or not so far.
    """
    task = dataset.task
    if max_shift is None:
        return task
    if not isinstance(task, Shifted | Pairs):
        raise ConfigError(f"--max-shift is not for data set {dataset.name}, which moves its images")
    smallest = min(dataset.image_shape[:2])
    if max_shift >= smallest:
        raise ConfigError(
            f"--max-shift must be below the images' {smallest} pixels, got {max_shift}"
        )
    return dataclasses.replace(task, max_shift=max_shift)


def check_test_size(dataset: Dataset, number: int | None) -> None:
    """Raises a ConfigError if a number of test images is given for a set that has its own."""
    if number is not None and not dataset.task.is_made:
        raise ConfigError(
            f"--test-size is for data sets whose images are made, {dataset.name} has"
            f" {len(dataset.test.labels):,} test images"
        )
    if number is not None and number >= 2**31:
        raise ConfigError(f"--test-size must be below 2,147,483,648, got {number:,}")


def choose_devices(number: int | None) -> list[jax.Device] | None:
    """Returns the first devices, or None for all.

    Raises:
      ConfigError: there are not so many.
    """
    available = jax.devices()
    if number is None:
        return None
    if number > len(available):
        raise ConfigError(
            f"--devices must be at most {len(available)}, the number of"
            f" {available[0].platform} devices, got {number}"
        )
    return available[:number]


def option_error(error: ValueError) -> ConfigError:
    """The same error, with the argument that it begins with named as an option."""
    return ConfigError(re.sub(r"^\w+", lambda m: "--" + m[0].replace("_", "-"), str(error)))


def check_dataset(dataset: Dataset, model: models.ModelConfig) -> None:
    """Raises a ConfigError unless the network takes these images and tells these classes."""
    if not len(dataset.test.labels):
        raise ConfigError(f"data set {dataset.name} has no test images")
    if dataset.image_shape != model.image_shape:
        found, expected = ("x".join(map(str, x)) for x in (dataset.image_shape, model.image_shape))
        raise ConfigError(
            f"data set {dataset.name} has images of {found}, the network takes {expected}"
        )
    if dataset.num_classes != model.num_classes:
        raise ConfigError(
            f"data set {dataset.name} has {dataset.num_classes} classes, the network has"
            f" {model.num_classes}"
        )


def _as_arrays(split: Split) -> Batch:
    """A split as JAX arrays: uint8 images, int32 labels."""
    return Batch(jnp.asarray(split.images), jnp.asarray(split.labels, jnp.int32))
