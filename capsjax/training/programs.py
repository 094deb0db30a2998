"""The two programs that run on the devices: many train steps, and an evaluation.

The data lie on the devices; a call costs the host a few scalars. The number of steps per call is
an argument, not a constant of the program: one compilation serves every call, whether it ends at a
checkpoint, at the end of an epoch or because someone asked to stop.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from capsjax.data import Batch, Shifted, Task, evaluation_samples, is_right
from capsjax.training.drivers import Driver
from capsjax.training.objectives import Objective
from capsjax.training.step import (
    Apply,
    StepMetrics,
    TrainState,
    TrainStep,
    Variables,
    example_keys,
)

NEVER = jnp.iinfo(jnp.int32).max
_GATHER = 2


class StepSums(NamedTuple):
    """Sums over the steps of one call.

    Attributes:
      steps: number of steps, int32.
      loss: sum of their losses, float32.
      error: sum of their shares of wrong predictions, float32.
      bad_step: the first step whose loss was not finite, int32; :data:`NEVER` if all were.
    """

    steps: jax.Array
    loss: jax.Array
    error: jax.Array
    bad_step: jax.Array


class EvaluationSums(NamedTuple):
    """Sums over evaluated examples.

    Attributes:
      loss: sum of the objective, float32.
      wrong: number of wrong predictions, int32.
      examples: number of examples, int32.
    """

    loss: jax.Array
    wrong: jax.Array
    examples: jax.Array


RunSteps = Callable[..., tuple[TrainState, StepSums]]
Evaluate = Callable[..., EvaluationSums]


def make_run_steps(
    train_step: TrainStep, driver: Driver, *, batch_size: int, task: Task | None = None
) -> RunSteps:
    """Compiles ``run_steps(state, examples, order, key, num_steps) -> (state, sums)``.

    The state is donated. Step t takes the examples at positions ``t % (N // B) * B`` and following
    of the epoch's order, and the key ``fold_in(key, t)``; calls must not cross the end of an epoch.

    Args:
      train_step: from :func:`make_train_step` with the driver's axis name.
      driver: where it runs.
      batch_size: B, examples in the whole batch.
      task: the step's, which also chooses images; single ones when None.
    """
    task = Shifted() if task is None else task

    def run_steps(
        state: TrainState, examples: Batch, order: jax.Array, key: jax.Array, num_steps: jax.Array
    ) -> tuple[TrainState, StepSums]:
        steps_per_epoch = order.shape[0] // batch_size

        def body(_: jax.Array, carry: tuple[TrainState, StepSums]) -> tuple[TrainState, StepSums]:
            state, sums = carry
            first = state.step % steps_per_epoch * batch_size
            positions = driver.batch_positions(batch_size)
            step_key = jax.random.fold_in(key, state.step)
            batch = gather_batch(task, examples, step_key, positions, order[first + positions])
            next_state, metrics = train_step(state, batch, step_key)
            return next_state, _add(sums, metrics, state.step)

        zero = jnp.zeros((), jnp.float32)
        sums = StepSums(jnp.int32(0), zero, zero, jnp.int32(NEVER))
        return jax.lax.fori_loop(0, num_steps, body, (state, sums))

    compiled: RunSteps = driver.compile(run_steps, donate=True)
    return compiled


def gather_batch(
    task: Task, examples: Batch, key: jax.Array, positions: jax.Array, chosen: jax.Array
) -> Batch:
    """The images that a task chooses for the examples at positions of a step's batch."""
    # Of another stream than the step's own, which splits the examples' keys.
    keys = jax.vmap(lambda k: jax.random.fold_in(k, _GATHER))(example_keys(key, positions))
    return task.gather(keys, examples, chosen)


def make_evaluate(
    apply: Apply,
    objective: Objective,
    driver: Driver,
    *,
    batch_size: int,
    num_classes: int,
    task: Task | None = None,
) -> Evaluate:
    """Compiles ``evaluate(variables, examples, first, num_batches, num_examples=None) -> sums``.

    Evaluates batches ``first`` to ``first + num_batches - 1`` of the samples that the task makes of
    the examples, as many as there are examples if not told otherwise; batches beyond the last one,
    and the missing part of a last partial batch, count nothing.

    Args:
      apply: the network as a pure function.
      objective: loss per example, with the true classes as target.
      driver: where it runs.
      batch_size: examples in the whole batch.
      num_classes: J, for the one-hot targets.
      task: makes the samples; the images as they are when None.
    """
    task = Shifted() if task is None else task

    def evaluate(
        variables: Variables,
        examples: Batch,
        first: jax.Array,
        num_batches: jax.Array,
        num_examples: jax.Array,
    ) -> EvaluationSums:
        def body(batch: jax.Array, sums: EvaluationSums) -> EvaluationSums:
            position = batch * batch_size + driver.batch_positions(batch_size)
            real = position < num_examples
            numbers = jnp.minimum(position, num_examples - 1)
            sample, labels = evaluation_samples(task, examples, numbers, num_classes=num_classes)
            prediction, _ = apply(variables, sample.images, target=sample.masks)
            loss = objective(prediction, sample.target, sample.drawings)
            wrong = ~is_right(prediction.scores, labels)
            return EvaluationSums(
                sums.loss + jnp.sum(loss, where=real),
                sums.wrong + jnp.sum(wrong & real, dtype=jnp.int32),
                sums.examples + jnp.sum(real, dtype=jnp.int32),
            )

        zero = EvaluationSums(jnp.zeros((), jnp.float32), jnp.int32(0), jnp.int32(0))
        return driver.sum(jax.lax.fori_loop(first, first + num_batches, body, zero))

    compiled: Evaluate = driver.compile(evaluate)

    def call(
        variables: Variables,
        examples: Batch,
        first: ArrayLike,
        num_batches: ArrayLike,
        num_examples: int | None = None,
    ) -> EvaluationSums:
        number = examples.labels.shape[0] if num_examples is None else num_examples
        return compiled(variables, examples, first, num_batches, np.int32(number))

    return call


def _add(sums: StepSums, metrics: StepMetrics, step: jax.Array) -> StepSums:
    bad_step = jnp.where(jnp.isfinite(metrics.loss), NEVER, step + 1)
    return StepSums(
        sums.steps + 1,
        sums.loss + metrics.loss,
        sums.error + metrics.error,
        jnp.minimum(sums.bad_step, bad_step),
    )
