"""The programs that run on the devices: many train steps, or an evaluation.

The data stay on the devices, and a dispatch transfers only a few scalars. The number of steps is an
argument of the program, not a constant, so that one compilation serves every dispatch: up to a
checkpoint, to the end of an epoch or to a requested stop. Several seeds are a `vmap` over the same
program; what differs between them has a leading axis.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from capsjax.data import Batch, Sample, Sampler, Split
from capsjax.models import Prediction
from capsjax.ops._checks import as_integer
from capsjax.training.drivers import Driver
from capsjax.training.objectives import Metric, Objective
from capsjax.training.step import (
    Apply,
    StepMetrics,
    TrainState,
    TrainStep,
    Variables,
    check_per_example,
    is_wrong,
)

NEVER = jnp.iinfo(jnp.int32).max
_SECONDS_PER_CALL = 0.5
# Steps in a block on a GPU, and bytes that their samples may take: to make a sample takes dozens of
# small kernels, which take longer to launch than to run.
_BLOCK, _BLOCK_BYTES = 16, 2**26
Tree = TypeVar("Tree")


class StepSums(NamedTuple):
    """Sums over the steps of one dispatch.

    Attributes:
      loss: sum of the losses, float32.
      error: sum of the error rates, float32.
      bad_step: the first step whose loss was not finite, int32; :data:`NEVER` if all were.
    """

    loss: jax.Array
    error: jax.Array
    bad_step: jax.Array


class EvaluationSums(NamedTuple):
    """Sums over evaluated examples.

    Attributes:
      loss: sum of the objective, float32.
      wrong: number of wrong predictions, int32; 0 where the labels are numbers to predict.
      examples: number of examples, int32.
      class_wrong: number of wrong predictions for examples of each class, int32 ``[J]``.
      class_examples: number of examples of each class, int32 ``[J]``.
      metrics: sum of each metric, float32, by name.
    """

    loss: jax.Array
    wrong: jax.Array
    examples: jax.Array
    class_wrong: jax.Array
    class_examples: jax.Array
    metrics: dict[str, jax.Array]


Carry = tuple[TrainState, StepSums]
Step = Callable[..., tuple[TrainState, StepMetrics]]
RunSteps = Callable[..., Carry]
Evaluate = Callable[..., EvaluationSums]


def make_step(train_step: TrainStep, sampler: Sampler, driver: Driver, *, batch_size: int) -> Step:
    """Returns ``step(state, examples, order, key) -> (state, metrics)``, for a driver to compile.

    Step t uses the key ``fold_in(key, t)`` and the B examples of the epoch's order that begin at
    position ``t % (N // B) * B``.

    Args:
      train_step: from :func:`make_train_step` with the driver's axis name.
      sampler: makes the samples from the examples.
      driver: where it runs.
      batch_size: B, examples in the whole batch.
    """
    as_integer("batch_size", batch_size)
    draw = _make_draw(sampler, driver, batch_size)

    def step(
        state: TrainState, examples: Batch, order: jax.Array, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        return train_step(state, draw(state.step, examples, order, key))

    return step


def _make_draw(sampler: Sampler, driver: Driver, batch_size: int) -> Callable[..., Sample]:
    """Returns ``draw(step, examples, order, key) -> sample``."""

    def draw(step: jax.Array, examples: Batch, order: jax.Array, key: jax.Array) -> Sample:
        first = step % (order.shape[0] // batch_size) * batch_size
        positions = driver.batch_positions(batch_size)
        step_key = jax.random.fold_in(key, step)
        return sampler.train(examples, step_key, positions, order[first + positions])

    return draw


def make_run_steps(
    train_step: TrainStep,
    sampler: Sampler,
    driver: Driver,
    *,
    batch_size: int,
    several_seeds: bool = False,
    streamed: bool = False,
) -> RunSteps:
    """Compiles ``run_steps(state, examples, order, key, num_steps) -> (state, sums)``.

    The steps and the arguments are those of :func:`make_step`. The state is donated. A call must
    not cross the end of an epoch or of a chunk.

    Args:
      train_step: as in :func:`make_step`.
      sampler: as in :func:`make_step`.
      driver: as in :func:`make_step`.
      batch_size: as in :func:`make_step`.
      several_seeds: whether state, order, key and sums have a leading axis over seeds.
      streamed: whether the examples are a chunk of batches, from :meth:`Driver.place_chunk`. The
        order is then the step number of its first batch.
    """
    as_integer("batch_size", batch_size)
    draw = (_make_streamed_draw if streamed else _make_draw)(sampler, driver, batch_size)
    in_blocks = _launches_kernels(driver)
    if in_blocks:
        train_step = jax.jit(train_step)  # traced and lowered once for two loops

    def advance(carry: Carry, sample: Sample) -> Carry:
        state, sums = carry
        next_state, metrics = train_step(state, sample)
        return next_state, _add(sums, metrics, state.step)

    def run_steps(
        state: TrainState, examples: Batch, order: jax.Array, key: jax.Array, num_steps: jax.Array
    ) -> Carry:
        def sample(step: jax.Array) -> Sample:
            return draw(step, examples, order, key)

        def one(_: jax.Array, carry: Carry) -> Carry:
            return advance(carry, sample(carry[0].step))

        def block(length: int | jax.Array, carry: Carry) -> Carry:
            """The next steps, at most `size`, with samples that are made at once."""
            samples = jax.vmap(sample)(carry[0].step + jnp.arange(size))

            def step(n: jax.Array, carry: Carry) -> Carry:
                return advance(carry, jax.tree.map(lambda x: x[n], samples))

            return jax.lax.fori_loop(0, length, step, carry)

        start = state, _no_sums()
        size = _block_size(jax.eval_shape(sample, state.step)) if in_blocks else 1
        if size == 1:
            return jax.lax.fori_loop(0, num_steps, one, start)
        # A GPU waits for the host in each iteration of a loop whose length is not constant. The
        # rest has the same loop body as a block, so that its steps have the same bits.
        whole = jax.lax.fori_loop(0, num_steps // size, lambda _, carry: block(size, carry), start)
        return block(num_steps % size, whole)

    function = jax.vmap(run_steps, (0, None, 0, 0, None)) if several_seeds else run_steps
    chunk = "examples" if streamed else None
    compiled: RunSteps = driver.compile(function, donate=True, chunk=chunk)
    return compiled


def _make_streamed_draw(sampler: Sampler, driver: Driver, batch_size: int) -> Callable[..., Sample]:
    """Returns ``draw(step, chunk, first, key) -> sample`` for batches selected on the host."""

    def draw(step: jax.Array, chunk: Batch, first: jax.Array, key: jax.Array) -> Sample:
        batch = jax.tree.map(lambda x: x[step - first], chunk)
        step_key = jax.random.fold_in(key, step)
        return sampler.train_batch(batch, step_key, driver.batch_positions(batch_size))

    return draw


def measure(
    prediction: Prediction, sample: Sample, objective: Objective, metrics: Mapping[str, Metric]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss and the metrics of each example, float32 ``[B]``.

    Raises:
      ValueError: one of them is not one real number per example.
    """
    loss = objective(prediction, sample.target, sample.drawings)
    check_per_example("objective", loss, sample)
    values = {name: metric(prediction, sample.target) for name, metric in metrics.items()}
    for name, value in values.items():
        check_per_example(f"metric {name!r}", value, sample, floating=False)
    return loss.astype(jnp.float32), {n: v.astype(jnp.float32) for n, v in values.items()}


def make_evaluate(
    apply: Apply,
    objective: Objective,
    sampler: Sampler,
    driver: Driver,
    *,
    batch_size: int,
    metrics: Mapping[str, Metric] | None = None,
    several_seeds: bool = False,
    streamed: bool = False,
) -> Evaluate:
    """Compiles ``evaluate(variables, examples, first, num_batches, num_examples) -> sums``.

    Evaluates batches ``first`` to ``first + num_batches - 1`` of the first ``num_examples`` test
    samples. Batches beyond the last, and the missing part of a partial last batch, are not counted.

    Args:
      apply: the network as a pure function.
      objective: loss per example, with the true classes as target; called without ``step``.
      sampler: makes the samples from the examples.
      driver: where it runs.
      batch_size: examples in the whole batch.
      metrics: other values per example, ``(prediction, target) -> [B]``, by name.
      several_seeds: whether variables and sums have a leading axis over seeds.
      streamed: whether the examples are a chunk of batches, from :meth:`Driver.place_chunk`. A
        further argument, ``begin``, is then the number of its first batch.
    """
    as_integer("batch_size", batch_size)
    measured = dict(metrics or {})

    def add_up(
        draw: Callable[[jax.Array, jax.Array], Sample],
        variables: Variables,
        first: jax.Array,
        num_batches: jax.Array,
        num_examples: jax.Array,
    ) -> EvaluationSums:
        def body(batch: jax.Array, sums: EvaluationSums) -> EvaluationSums:
            position = batch * batch_size + driver.batch_positions(batch_size)
            real = position < num_examples
            sample = draw(batch, jnp.minimum(position, num_examples - 1))
            prediction, _ = apply(variables, sample.images, target=sample.masks)
            loss, values = measure(prediction, sample, objective, measured)
            if sample.is_regression:
                wrong, shown = jnp.zeros_like(real), jnp.zeros(sample.target.shape, bool)
            else:
                wrong = is_wrong(prediction, sample)
                shown = (sample.target > 0) & real[:, None]
            return EvaluationSums(
                sums.loss + jnp.sum(loss, where=real),
                sums.wrong + jnp.sum(wrong & real, dtype=jnp.int32),
                sums.examples + jnp.sum(real, dtype=jnp.int32),
                sums.class_wrong + jnp.sum(shown & wrong[:, None], axis=0, dtype=jnp.int32),
                sums.class_examples + jnp.sum(shown, axis=0, dtype=jnp.int32),
                {n: sums.metrics[n] + jnp.sum(v, where=real) for n, v in values.items()},
            )

        zero = jnp.zeros((), jnp.float32)
        none = jnp.zeros(sampler.num_classes, jnp.int32)
        sums = EvaluationSums(
            zero, jnp.int32(0), jnp.int32(0), none, none, dict.fromkeys(measured, zero)
        )
        return driver.sum(jax.lax.fori_loop(first, first + num_batches, body, sums))

    def evaluate(
        variables: Variables,
        examples: Batch,
        first: jax.Array,
        num_batches: jax.Array,
        num_examples: jax.Array,
    ) -> EvaluationSums:
        def draw(_: jax.Array, numbers: jax.Array) -> Sample:
            return sampler.test(examples, numbers)

        return add_up(draw, variables, first, num_batches, num_examples)

    def evaluate_chunk(
        variables: Variables,
        chunk: Batch,
        first: jax.Array,
        num_batches: jax.Array,
        num_examples: jax.Array,
        begin: jax.Array,
    ) -> EvaluationSums:
        def draw(batch: jax.Array, numbers: jax.Array) -> Sample:
            return sampler.test_batch(jax.tree.map(lambda x: x[batch - begin], chunk), numbers)

        return add_up(draw, variables, first, num_batches, num_examples)

    if streamed:
        return driver.compile(evaluate_chunk, chunk="chunk")
    function = jax.vmap(evaluate, (0, None, None, None, None)) if several_seeds else evaluate
    compiled: Evaluate = driver.compile(function)
    return compiled


class Pace:
    """Chooses the amount of work per dispatch, so that each takes about half a second.

    Args:
      limit: the largest amount.
    """

    def __init__(self, limit: int):
        self._limit, self._amount, self._calls = limit, 1, 0

    def amount(self, remaining: int) -> int:
        """Returns the amount for the next dispatch, at most `remaining`."""
        return max(1, min(self._amount, remaining))

    def observe(self, amount: int, seconds: float) -> None:
        """Records how long a dispatch took; the first is ignored, as it includes compilation."""
        self._calls += 1
        if self._calls > 1:
            fitting = int(_SECONDS_PER_CALL * amount / max(seconds, 1e-6))
            self._amount = max(1, min(self._limit, fitting, 4 * self._amount))


def as_batch(split: Split) -> Batch:
    """Copies a split to a device; unlike ``jnp.array``, this compiles nothing."""
    # On CPUs `device_put` does not copy.
    return Batch(*(jax.device_put(np.array(x)) for x in (split.images, split.labels)))


def stack(trees: Sequence[Tree]) -> Tree:
    """Stacks trees of several seeds along a new leading axis; returns a single one unchanged."""
    if len(trees) == 1:
        return trees[0]
    stacked: Tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return stacked


def unstack(tree: Tree, number: int) -> list[Tree]:
    """Undoes :func:`stack`."""
    if number == 1:
        return [tree]
    return [jax.tree.map(lambda x, n=n: x[n], tree) for n in range(number)]


def _launches_kernels(driver: Driver) -> bool:
    return driver.devices[0].platform in ("gpu", "cuda")


def _block_size(sample: Sample) -> int:
    """Returns the number of steps in a block."""
    nbytes = sum(x.size * x.dtype.itemsize for x in (sample.images, sample.drawings))
    return max(1, min(_BLOCK, _BLOCK_BYTES // nbytes))


def _no_sums() -> StepSums:
    zero = jnp.zeros((), jnp.float32)
    return StepSums(zero, zero, jnp.int32(NEVER))


def _add(sums: StepSums, metrics: StepMetrics, step: jax.Array) -> StepSums:
    bad_step = jnp.where(jnp.isfinite(metrics.loss), NEVER, step + 1)
    return StepSums(
        sums.loss + metrics.loss, sums.error + metrics.error, jnp.minimum(sums.bad_step, bad_step)
    )
