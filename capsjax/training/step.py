"""The train step: one pure function of state and sample."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from capsjax import models
from capsjax.data import Sample, is_right
from capsjax.ops._checks import check_callable
from capsjax.routing import Algorithm, algorithm
from capsjax.training.objectives import Objective


class Variables(NamedTuple):
    """The arrays of a network, nested dicts of float32 arrays.

    Attributes:
      params: parameters that are trained by gradients.
      batch_stats: running means and variances of batch normalisation; empty without it.
    """

    params: chex.ArrayTree
    batch_stats: chex.ArrayTree


class TrainState(NamedTuple):
    """Everything that a train step changes.

    Attributes:
      step: number of steps taken, int32 scalar.
      params: the network's parameters, nested dicts of float32 arrays.
      batch_stats: the network's running statistics, see :class:`Variables`.
      opt_state: the optimiser's state.
    """

    step: jax.Array
    params: chex.ArrayTree
    batch_stats: chex.ArrayTree
    opt_state: chex.ArrayTree

    @property
    def variables(self) -> Variables:
        """The arrays of the network."""
        return Variables(self.params, self.batch_stats)


class StepMetrics(NamedTuple):
    """Metrics of a step, float32 scalars: means over the whole batch.

    Attributes:
      loss: the objective.
      error: error rate; NaN for regression.
    """

    loss: jax.Array
    error: jax.Array


TrainStep = Callable[[TrainState, Sample], tuple[TrainState, StepMetrics]]
Apply = Callable[..., tuple[models.Prediction, chex.ArrayTree]]


def split_network(
    network: models.Network, *, frozen: Sequence[str] = ()
) -> tuple[Apply, Variables]:
    """Splits a network into a pure function and its arrays.

    Args:
      network: the network.
      frozen: parts that are not trained, which use the running statistics in training too.

    Returns:
      The function ``apply(variables, images, *, train=False, axis_name=None, **options)``, which
      returns the network's prediction and its batch statistics; and the :class:`Variables`. In
      training, batch normalisation uses the statistics of the batch over all shards of
      ``axis_name`` and updates the running statistics; otherwise it uses the running statistics.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import models
      >>> from capsjax.training import split_network
      >>> from flax import nnx
      >>> apply, variables = split_network(models.create("small", rngs=nnx.Rngs(0)))
      >>> prediction, _ = jax.jit(apply)(variables, jnp.zeros((1, 28, 28, 1)))
      >>> prediction.scores.shape
      (1, 10)
    """
    if not isinstance(network, nnx.Module):
        raise TypeError(f"network must be an nnx.Module, got {network!r}")
    graphdef, *states = nnx.split(network, nnx.Param, nnx.BatchStat)

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool = False,
        axis_name: str | None = None,
        **options: Any,
    ) -> tuple[models.Prediction, chex.ArrayTree]:
        network = nnx.merge(graphdef, variables.params, variables.batch_stats)
        network.set_attributes(
            nnx.BatchNorm,
            use_running_average=not train,
            axis_name=axis_name,
            raise_if_not_found=False,
        )
        for path, module in nnx.iter_modules(network) if frozen else ():
            if isinstance(module, nnx.BatchNorm) and is_part(".".join(map(str, path)), frozen):
                module.use_running_average = True
        prediction: models.Prediction = network(images, **options)
        return prediction, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    return apply, Variables(*map(nnx.to_pure_dict, states))


def split_abstract(
    config: models.ModelConfig, *, frozen: Sequence[str] = ()
) -> tuple[Apply, Variables]:
    """Like :func:`split_network`, with shapes instead of arrays: the network is not built.

    Equal arguments give the same function, unless the routing algorithm is not the package's.
    """
    record = _algorithm(config)
    split = _split_abstract if _is_fixed(record) else _split_abstract.__wrapped__
    return split(config, record, tuple(frozen))


@functools.lru_cache(maxsize=64)
def _split_abstract(
    config: models.ModelConfig, record: Algorithm | None, frozen: tuple[str, ...]
) -> tuple[Apply, Variables]:
    del record  # part of the key: its name may be another's by the next call
    network = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    return split_network(network, frozen=frozen)


def initial_variables(config: models.ModelConfig, key: jax.Array) -> Variables:
    """Returns the arrays of a new network; one program is compiled instead of one per operation."""
    record = _algorithm(config)
    make = _make_initial if _is_fixed(record) else _make_initial.__wrapped__
    return make(config, record)(key)


@functools.lru_cache(maxsize=64)
def _make_initial(
    config: models.ModelConfig, record: Algorithm | None
) -> Callable[[jax.Array], Variables]:
    del record  # part of the key
    return jax.jit(lambda key: split_network(models.build(config, rngs=nnx.Rngs(key)))[1])


def _algorithm(config: models.ModelConfig) -> Algorithm | None:
    return None if isinstance(config, models.BaselineConfig) else algorithm(config.routing)


def is_ours(*functions: Callable[..., Any]) -> bool:
    """Whether functions or classes are the package's, and so stay what they are in a notebook."""
    return all(str(getattr(f, "__module__", "")).startswith("capsjax.") for f in functions)


def _is_fixed(record: Algorithm | None) -> bool:
    return record is None or is_ours(*filter(callable, vars(record).values()))


def init_state(variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    if not isinstance(variables, Variables):
        raise TypeError(f"variables must be Variables, as of split_network, got {variables!r}")
    check_optimizer(optimizer)
    opt_state = optimizer.init(variables.params)
    return _copy_repeated(TrainState(jnp.zeros((), jnp.int32), *variables, opt_state))


def _copy_repeated(state: TrainState) -> TrainState:
    """Copies arrays that occur again: a state in which one occurs twice cannot be donated."""
    seen: set[int] = set()

    def copy_if_seen(x: Any) -> Any:
        if id(x) in seen and isinstance(x, jax.Array):
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(copy_if_seen, state)


def make_train_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    axis_name: str | None = None,
) -> TrainStep:
    """Makes the step: predict, differentiate, update.

    The step is pure and independent of devices and data. Under ``jax.pmap`` or ``jax.vmap``, each
    shard gets its part of the sample, and gradients and metrics are averaged over ``axis_name``.

    Args:
      apply: the network as a pure function, from :func:`split_network`.
      optimizer: an optax transformation. One that takes further arguments, as
        ``optax.contrib.reduce_on_plateau`` and ``optax.lbfgs`` do, receives the loss of the batch
        as ``value``, the gradients as ``grad``, and as ``value_fn`` the loss as a function of the
        parameters.
      objective: ``(prediction, target, images) -> losses``, one per example, such as
        :func:`paper_loss`. If it has a parameter ``step``, it receives the number of steps taken;
        evaluations do not pass it.
      axis_name: the mapped axis over which the batch is split; None if it is not.

    Returns:
      ``train_step(state, sample) -> (state, metrics)`` with a :class:`TrainState`, a
      :class:`capsjax.data.Sample` of B examples and :class:`StepMetrics`. The loss is NaN if a
      parameter or a pixel is NaN, or if a label is not from 0 to J - 1. For regression, labels are
      float32 ``[B, J]``.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: raised in tracing if the objective does not accept the target, or does not return
        one loss per example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import models
      >>> from capsjax.data import Batch, Sampler, Shifted
      >>> from capsjax.training import (
      ...     init_state, make_train_step, paper_loss, paper_optimizer, split_network)
      >>> from flax import nnx
      >>> apply, variables = split_network(models.create("small", rngs=nnx.Rngs(0)))
      >>> optimizer = paper_optimizer()
      >>> train_step = jax.jit(make_train_step(apply, optimizer, paper_loss))
      >>> digits = Batch(jnp.zeros((4, 28, 28, 1), jnp.uint8), jnp.arange(4))
      >>> sampler, four = Sampler(Shifted(2), num_classes=10), jnp.arange(4)
      >>> sample = sampler.train(digits, jax.random.key(0), four, indices=four)
      >>> state, metrics = train_step(init_state(variables, optimizer), sample)
      >>> int(state.step)
      1
    """
    check_callable(apply=apply, objective=objective)
    check_optimizer(optimizer)
    takes_step = "step" in inspect.signature(objective).parameters

    def train_step(state: TrainState, sample: Sample) -> tuple[TrainState, StepMetrics]:
        options = {"step": state.step} if takes_step else {}

        def loss_fn(
            params: chex.ArrayTree,
        ) -> tuple[jax.Array, tuple[StepMetrics, chex.ArrayTree]]:
            prediction, batch_stats = apply(
                Variables(params, state.batch_stats),
                sample.images,
                train=True,
                axis_name=axis_name,
                target=sample.masks,
                keys=sample.keys,
            )
            losses = objective(prediction, sample.target, sample.drawings, **options)
            check_per_example("objective", losses, sample)
            error = jnp.mean(is_wrong(prediction, sample), dtype=jnp.float32)
            metrics = StepMetrics(jnp.mean(_nan_if_unknown(losses, sample)), error)
            return jnp.mean(losses), (metrics, batch_stats)

        def differentiate(
            params: chex.ArrayTree,
        ) -> tuple[StepMetrics, chex.ArrayTree, chex.ArrayTree]:
            """Metrics, batch statistics and gradients, over all shards."""
            (_, (metrics, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            if axis_name is not None:
                grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
            return metrics, batch_stats, grads

        metrics, batch_stats, grads = differentiate(state.params)
        updates, opt_state = update_with(
            optimizer, grads, state.opt_state, state.params, metrics.loss, _loss_of(differentiate)
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return train_step


def _nan_if_unknown(losses: jax.Array, sample: Sample) -> jax.Array:
    """Losses ``[B]``, NaN where a label is no class, which tracing cannot refuse."""
    if not jnp.issubdtype(sample.labels.dtype, jnp.integer):
        return losses
    known = (sample.labels >= 0) & (sample.labels < sample.target.shape[-1])
    return jnp.where(jnp.all(known, axis=tuple(range(losses.ndim, known.ndim))), losses, jnp.nan)


def _loss_of(differentiate: Callable[[chex.ArrayTree], Any]) -> Callable[[Any], jax.Array]:
    """The loss as a function of the parameters, whose gradient is that of all shards, too."""

    @jax.custom_vjp
    def loss(params: chex.ArrayTree) -> jax.Array:
        metrics, _, _ = differentiate(params)
        return cast(jax.Array, metrics.loss)

    def forward(params: chex.ArrayTree) -> tuple[jax.Array, chex.ArrayTree]:
        metrics, _, grads = differentiate(params)
        return metrics.loss, grads

    loss.defvjp(forward, lambda grads, d: (jax.tree.map(lambda g: d * g, grads),))
    return cast(Callable[[Any], jax.Array], loss)


def update_with(
    optimizer: optax.GradientTransformation,
    grads: chex.ArrayTree,
    state: chex.ArrayTree,
    params: chex.ArrayTree,
    value: jax.Array,
    value_fn: Callable[[Any], jax.Array],
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Returns updates and next state; the optimizer receives those further arguments it takes."""
    given: dict[str, Any] = {"value": value, "grad": grads, "value_fn": value_fn}
    parameters = inspect.signature(optimizer.update).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        given = {name: given[name] for name in given if name in parameters}
    update: Callable[..., tuple[chex.ArrayTree, chex.ArrayTree]] = optimizer.update
    return update(grads, state, params, **given)


def is_part(name: str, parts: Sequence[str]) -> bool:
    """Whether a dotted name, such as conv.kernel, begins with one of these."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def is_wrong(prediction: models.Prediction, sample: Sample) -> jax.Array:
    """Whether predictions are wrong, bool ``[B]``; for regression NaN, float32 ``[B]``."""
    if sample.is_regression:
        return jnp.full(sample.labels.shape[:1], jnp.nan)
    return ~is_right(prediction.scores, sample.labels)


def check_per_example(name: str, values: Any, sample: Sample, *, floating: bool = True) -> None:
    """Raises a ValueError unless an objective or metric returned one real number per example."""
    expected, kind = sample.target.shape[:-1], "floating-point" if floating else "real"
    if not isinstance(values, jax.Array) or values.shape != expected:
        got = jnp.shape(values) if isinstance(values, jax.Array | np.ndarray) else repr(values)
        raise ValueError(f"{name} must return one value per example, shape {expected}, got {got}")
    fits = values.dtype == bool or jnp.issubdtype(values.dtype, jnp.integer)
    if not (jnp.issubdtype(values.dtype, jnp.floating) or (fits and not floating)):
        raise ValueError(f"{name} must return {kind} numbers, got dtype {values.dtype}")


def check_optimizer(optimizer: Any) -> None:
    """Raises a TypeError unless this is an optimizer."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}")
