"""The programs that run on the devices: many train steps, an evaluation; and on which devices.

The data lie on the devices; a call costs the host a few scalars. The number of steps per call is
an argument, not a constant of the program: one compilation serves every call, whether it ends at a
checkpoint, at the end of an epoch or because someone asked to stop. Several seeds are a `vmap` over
the same program: what differs between them has a leading axis.

A driver hides two differences between pmap over devices, jit over a sharded mesh and jit on one
device: how a function of replicated arguments is compiled, and which part of a batch one run of
that function works on. Everything else is the same code.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from capsjax.data import Batch, Sampler, Split, is_right
from capsjax.ops._checks import as_integer, check_choice
from capsjax.training.objectives import Objective
from capsjax.training.step import Apply, StepMetrics, TrainState, TrainStep, Variables

AXIS = "batch"
NEVER = jnp.iinfo(jnp.int32).max
_SECONDS_PER_CALL = 0.5
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Driver(abc.ABC):
    """Compiles and feeds functions whose arguments are replicated over devices.

    Attributes:
      devices: the devices used.
      axis_name: the mapped axis inside of a compiled function, or None.
      most_devices: the largest number of devices; None for any.
    """

    axis_name: ClassVar[str | None] = None
    most_devices: ClassVar[int | None] = None
    devices: tuple[jax.Device, ...]

    def replicate(self, tree: Tree) -> Tree:
        """Copies arrays to each device, once."""
        placed: Tree = jax.device_put(tree, self.sharding())
        return placed

    def sharding(self, *axes: str) -> NamedSharding:
        """Returns the sharding of the leading dimensions over these axes; replicated for none."""
        return NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(*axes))

    @abc.abstractmethod
    def compile(self, function: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
        """Compiles a function of replicated arguments and results.

        Args:
          function: a function of arrays. Where it sees the axis :attr:`axis_name`, its results must
            be equal on all devices.
          donate: whether the first argument's memory is given to the results.
        """

    @abc.abstractmethod
    def batch_positions(self, batch_size: int) -> jax.Array:
        """Inside of a compiled function: the positions in the batch to work on, int32."""

    @abc.abstractmethod
    def sum(self, tree: Tree) -> Tree:
        """Inside of a compiled function: sums over the parts of the batch."""


class Jit(Driver):
    """One device, which works on the whole batch."""

    most_devices: ClassVar[int | None] = 1

    def compile(self, function: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
        """Compiles one program for all devices."""
        return jax.jit(
            function, out_shardings=self.sharding(), donate_argnums=(0,) if donate else ()
        )

    def batch_positions(self, batch_size: int) -> jax.Array:
        """All of them."""
        return jnp.arange(batch_size)

    def sum(self, tree: Tree) -> Tree:
        """The sums of the one program."""
        return tree


class Shard(Jit):
    """One global program; the batch is sharded and the compiler inserts the communication."""

    most_devices: ClassVar[int | None] = None

    def batch_positions(self, batch_size: int) -> jax.Array:
        """All of them, sharded over the devices."""
        positions = super().batch_positions(batch_size)
        return jax.lax.with_sharding_constraint(positions, self.sharding(AXIS))


class Pmap(Driver):
    """The function is mapped over the devices, and averages explicitly over a named axis."""

    axis_name = AXIS

    def compile(self, function: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
        """Compiles the program of each device."""

        # pmap needs one argument that is mapped; the state stays replicated and unstacked.
        @functools.wraps(function)
        def mapped(_: jax.Array, *arguments: Any) -> Any:
            return function(*arguments)

        compiled = jax.pmap(
            mapped,
            axis_name=AXIS,
            in_axes=(0, *[None for _ in inspect.signature(function).parameters]),
            out_axes=None,
            devices=self.devices,
            donate_argnums=(1,) if donate else (),
        )
        return functools.partial(compiled, np.arange(len(self.devices)))

    def batch_positions(self, batch_size: int) -> jax.Array:
        """The device's part."""
        part = batch_size // len(self.devices)
        return jax.lax.axis_index(AXIS) * part + jnp.arange(part)

    def sum(self, tree: Tree) -> Tree:
        """Adds up the devices' sums."""
        total: Tree = jax.lax.psum(tree, AXIS)
        return total


_DRIVERS: dict[str, type[Driver]] = {"pmap": Pmap, "jit": Jit, "shard": Shard}

if TYPE_CHECKING:
    DriverName = str
else:
    DriverName = Literal[tuple(_DRIVERS)]


def make_driver(
    name: str, *, batch_size: int | None = None, devices: Sequence[jax.Device] | None = None
) -> Driver:
    """Makes a driver.

    Args:
      name: ``"pmap"``, ``"jit"`` or ``"shard"``.
      batch_size: examples in the whole batch, which must be divisible among the devices; not
        checked when None.
      devices: the devices to use; all of them, or the first for ``"jit"``, when None.

    Returns:
      A :class:`Driver`.

    Raises:
      TypeError: the devices are not devices, or the size of the batch is not an integer.
      ValueError: the name is unknown, ``"jit"`` was given several devices, there is no device, or
        the batch cannot be divided among the devices.

    Example:
      >>> from capsjax.training import make_driver
      >>> len(make_driver("jit", batch_size=128).devices)
      1
    """
    check_choice("driver", name, _DRIVERS)
    kind = _DRIVERS[name]
    chosen = tuple(jax.devices()[: kind.most_devices]) if devices is None else _as_devices(devices)
    if kind.most_devices is not None and len(chosen) > kind.most_devices:
        raise ValueError(f"driver {name!r} runs on one device, got {len(chosen)}")
    if batch_size is not None and as_integer("batch_size", batch_size) % len(chosen):
        raise ValueError(
            f"batch_size must be divisible by the number of devices, {len(chosen)}, got"
            f" {batch_size}"
        )
    return kind(chosen)


def _as_devices(devices: Any) -> tuple[jax.Device, ...]:
    if not isinstance(devices, Sequence) or not all(hasattr(d, "platform") for d in devices):
        raise TypeError(f"devices must be a sequence of devices, got {devices!r}")
    if not devices:
        raise ValueError("devices must hold at least one device, got none")
    return tuple(devices)


class StepSums(NamedTuple):
    """Sums over the steps of one call.

    Attributes:
      loss: sum of the losses, float32.
      error: sum of the shares of wrong predictions, float32.
      bad_step: the first step whose loss was not finite, int32; :data:`NEVER` if all were.
    """

    loss: jax.Array
    error: jax.Array
    bad_step: jax.Array


class EvaluationSums(NamedTuple):
    """Sums over evaluated examples.

    Attributes:
      loss: sum of the objective, float32.
      wrong: number of wrong predictions, int32.
      examples: number of examples, int32.
      class_wrong: number of wrong predictions for examples of each class, int32 ``[J]``.
      class_examples: number of examples of each class, int32 ``[J]``.
    """

    loss: jax.Array
    wrong: jax.Array
    examples: jax.Array
    class_wrong: jax.Array
    class_examples: jax.Array


Step = Callable[..., tuple[TrainState, StepMetrics]]
RunSteps = Callable[..., tuple[TrainState, StepSums]]
Evaluate = Callable[..., EvaluationSums]


def make_step(train_step: TrainStep, sampler: Sampler, driver: Driver, *, batch_size: int) -> Step:
    """Returns ``step(state, examples, order, key) -> (state, metrics)``, for a driver to compile.

    Step t takes the examples at positions ``t % (N // B) * B`` and following of the epoch's order,
    and the key ``fold_in(key, t)``.

    Args:
      train_step: from :func:`make_train_step` with the driver's axis name.
      sampler: makes the samples from the examples.
      driver: where it runs.
      batch_size: B, examples in the whole batch.
    """
    as_integer("batch_size", batch_size)

    def step(
        state: TrainState, examples: Batch, order: jax.Array, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        first = state.step % (order.shape[0] // batch_size) * batch_size
        positions = driver.batch_positions(batch_size)
        step_key = jax.random.fold_in(key, state.step)
        sample = sampler.train(examples, step_key, positions, order[first + positions])
        return train_step(state, sample)

    return step


def make_run_steps(
    train_step: TrainStep,
    sampler: Sampler,
    driver: Driver,
    *,
    batch_size: int,
    several_seeds: bool = False,
) -> RunSteps:
    """Compiles ``run_steps(state, examples, order, key, num_steps) -> (state, sums)``.

    The steps are those of :func:`make_step`, whose arguments these are too. The state is donated.
    Calls must not cross the end of an epoch.

    Args:
      train_step: as in :func:`make_step`.
      sampler: as in :func:`make_step`.
      driver: as in :func:`make_step`.
      batch_size: as in :func:`make_step`.
      several_seeds: whether state, order, key and sums have a leading axis over seeds.
    """
    step = make_step(train_step, sampler, driver, batch_size=batch_size)

    def run_steps(
        state: TrainState, examples: Batch, order: jax.Array, key: jax.Array, num_steps: jax.Array
    ) -> tuple[TrainState, StepSums]:
        def body(_: jax.Array, carry: tuple[TrainState, StepSums]) -> tuple[TrainState, StepSums]:
            state, sums = carry
            next_state, metrics = step(state, examples, order, key)
            return next_state, _add(sums, metrics, state.step)

        zero = jnp.zeros((), jnp.float32)
        sums = StepSums(zero, zero, jnp.int32(NEVER))
        return jax.lax.fori_loop(0, num_steps, body, (state, sums))

    function = jax.vmap(run_steps, (0, None, 0, 0, None)) if several_seeds else run_steps
    compiled: RunSteps = driver.compile(function, donate=True)
    return compiled


def make_evaluate(
    apply: Apply,
    objective: Objective,
    sampler: Sampler,
    driver: Driver,
    *,
    batch_size: int,
    several_seeds: bool = False,
) -> Evaluate:
    """Compiles ``evaluate(variables, examples, first, num_batches, num_examples) -> sums``.

    Evaluates batches ``first`` to ``first + num_batches - 1`` of the first ``num_examples`` test
    samples; batches beyond the last one, and the missing part of a last partial batch, count
    nothing.

    Args:
      apply: the network as a pure function.
      objective: loss per example, with the true classes as target.
      sampler: makes the samples from the examples.
      driver: where it runs.
      batch_size: examples in the whole batch.
      several_seeds: whether variables and sums have a leading axis over seeds.
    """
    as_integer("batch_size", batch_size)

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
            sample = sampler.test(examples, jnp.minimum(position, num_examples - 1))
            prediction, _ = apply(variables, sample.images, target=sample.masks)
            loss = objective(prediction, sample.target, sample.drawings)
            wrong = ~is_right(prediction.scores, sample.labels)
            shown = (sample.target > 0) & real[:, None]
            return EvaluationSums(
                sums.loss + jnp.sum(loss, where=real),
                sums.wrong + jnp.sum(wrong & real, dtype=jnp.int32),
                sums.examples + jnp.sum(real, dtype=jnp.int32),
                sums.class_wrong + jnp.sum(shown & wrong[:, None], axis=0, dtype=jnp.int32),
                sums.class_examples + jnp.sum(shown, axis=0, dtype=jnp.int32),
            )

        none = jnp.zeros(sampler.num_classes, jnp.int32)
        zero = EvaluationSums(jnp.zeros((), jnp.float32), jnp.int32(0), jnp.int32(0), none, none)
        return driver.sum(jax.lax.fori_loop(first, first + num_batches, body, zero))

    function = jax.vmap(evaluate, (0, None, None, None, None)) if several_seeds else evaluate
    compiled: Evaluate = driver.compile(function)
    return compiled


class Pace:
    """Chooses how much work one call of the devices gets, so that it lasts about half a second.

    Args:
      limit: largest amount.
    """

    def __init__(self, limit: int):
        self._limit, self._amount, self._calls = limit, 1, 0

    def amount(self, remaining: int) -> int:
        """Returns the amount for the next call, at most what remains."""
        return max(1, min(self._amount, remaining))

    def observe(self, amount: int, seconds: float) -> None:
        """Learns how long a call took; the first is left out, it includes the compilation."""
        self._calls += 1
        if self._calls > 1:
            fitting = int(_SECONDS_PER_CALL * amount / max(seconds, 1e-6))
            self._amount = max(1, min(self._limit, fitting, 4 * self._amount))


def as_batch(split: Split) -> Batch:
    """Returns a split as JAX arrays."""
    return Batch(jnp.asarray(split.images), jnp.asarray(split.labels))


def stack(trees: Sequence[Tree]) -> Tree:
    """Joins what differs between seeds along a new leading axis; one alone stays as it is."""
    if len(trees) == 1:
        return trees[0]
    stacked: Tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return stacked


def unstack(tree: Tree, number: int) -> list[Tree]:
    """Undoes :func:`stack`."""
    if number == 1:
        return [tree]
    return [jax.tree.map(lambda x, n=n: x[n], tree) for n in range(number)]


def _add(sums: StepSums, metrics: StepMetrics, step: jax.Array) -> StepSums:
    bad_step = jnp.where(jnp.isfinite(metrics.loss), NEVER, step + 1)
    return StepSums(
        sums.loss + metrics.loss, sums.error + metrics.error, jnp.minimum(sums.bad_step, bad_step)
    )
