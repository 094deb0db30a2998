"""The train step: one pure function of state and sample."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from capsjax.data import Sample, is_right
from capsjax.models import Network, Prediction
from capsjax.ops._checks import check_callable, check_number
from capsjax.training.objectives import Objective


class Variables(NamedTuple):
    """The arrays of a network, nested dicts of float32 arrays.

    Attributes:
      params: what is learned by gradients.
      batch_stats: running means and variances of batch normalisation; empty without any.
    """

    params: chex.ArrayTree
    batch_stats: chex.ArrayTree


class TrainState(NamedTuple):
    """Everything that a step changes.

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
      error: share of wrong predictions.
    """

    loss: jax.Array
    error: jax.Array


TrainStep = Callable[[TrainState, Sample], tuple[TrainState, StepMetrics]]
Apply = Callable[..., tuple[Prediction, chex.ArrayTree]]


def split_network(network: Network) -> tuple[Apply, Variables]:
    """Splits a network into a pure function and its arrays.

    Returns:
      ``apply(variables, images, *, train=False, axis_name=None, **options)``, which returns the
      network's prediction and its batch statistics, and the :class:`Variables`. A network that
      normalises over the batch uses the statistics of the batch in training, over all shards of
      ``axis_name``, and returns updated running ones; otherwise it uses the running ones.

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
    ) -> tuple[Prediction, chex.ArrayTree]:
        network = nnx.merge(graphdef, variables.params, variables.batch_stats)
        network.set_attributes(
            nnx.BatchNorm,
            use_running_average=not train,
            axis_name=axis_name,
            raise_if_not_found=False,
        )
        prediction: Prediction = network(images, **options)
        return prediction, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    return apply, Variables(*map(nnx.to_pure_dict, states))


def paper_optimizer(
    learning_rate: float = 1e-3,
    *,
    decay_rate: float = 0.96,
    decay_steps: int = 2000,
    floor: float = 1e-6,
) -> optax.GradientTransformation:
    r"""Adam with an exponentially decaying learning rate.

    .. math::
      \eta_t = \max(\eta_0 \, \gamma^{t / T}, \eta_\mathrm{floor})

    Args:
      learning_rate: :math:`\eta_0`.
      decay_rate: :math:`\gamma`.
      decay_steps: :math:`T`; the decay is continuous.
      floor: the learning rate never falls below it.

    Returns:
      An optax transformation.

    Example:
      >>> from capsjax.training import paper_optimizer
      >>> optimizer = paper_optimizer(1e-3)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 4; the
      constants are those of the authors' code.
    """
    check_number("learning_rate", learning_rate, least=0)
    check_number("decay_rate", decay_rate, least=0)
    check_number("decay_steps", decay_steps, least=1)
    check_number("floor", floor, least=0)

    def schedule(count: chex.Numeric) -> jax.Array:
        # Not optax.exponential_decay, which takes the floor for a ceiling at a decay rate of 1.
        steps = jnp.asarray(count, jnp.float32)
        return jnp.maximum(learning_rate * decay_rate ** (steps / decay_steps), floor)

    return optax.adam(schedule)


def init_state(variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    if not isinstance(variables, Variables):
        raise TypeError(f"variables must be Variables, as of split_network, got {variables!r}")
    _check_optimizer(optimizer)
    return TrainState(
        jnp.zeros((), jnp.int32),
        variables.params,
        variables.batch_stats,
        optimizer.init(variables.params),
    )


def make_train_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    axis_name: str | None = None,
) -> TrainStep:
    """Makes the step: predict, differentiate, update.

    The step is pure and independent of devices and data. Under ``jax.pmap`` or ``jax.vmap`` each
    shard gets its part of the sample; gradients and metrics are averaged over ``axis_name``.

    Args:
      apply: the network as a pure function, from :func:`split_network`.
      optimizer: an optax transformation.
      objective: loss per example, such as :func:`paper_loss`; one with a parameter ``step`` is
        given the number of steps taken.
      axis_name: the mapped axis over which the batch is split; None if it is not.

    Returns:
      ``train_step(state, sample) -> (state, metrics)`` with a :class:`TrainState`, a
      :class:`capsjax.data.Sample` of B examples and :class:`StepMetrics`. With NaN
      among the parameters or the pixels, or a label that is not from 0 to J - 1, the loss is NaN.

    Raises:
      TypeError: an argument is not what it should be; or, when the step is traced, the labels are
        not integers.
      ValueError: when the step is traced, the target is not one-hot or multi-hot.

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
    _check_optimizer(optimizer)
    takes_step = "step" in inspect.signature(objective).parameters

    def train_step(state: TrainState, sample: Sample) -> tuple[TrainState, StepMetrics]:
        options = {"step": state.step} if takes_step else {}

        def loss_fn(params: chex.ArrayTree) -> tuple[jax.Array, tuple[jax.Array, chex.ArrayTree]]:
            prediction, batch_stats = apply(
                Variables(params, state.batch_stats),
                sample.images,
                train=True,
                axis_name=axis_name,
                target=sample.masks,
                keys=sample.keys,
            )
            losses = objective(prediction, sample.target, sample.drawings, **options)
            wrong = ~is_right(prediction.scores, sample.labels)
            return jnp.mean(losses), (jnp.mean(wrong, dtype=jnp.float32), batch_stats)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (error, batch_stats)), grads = grad_fn(state.params)
        # Labels cannot be checked while tracing; their targets would be those of no class.
        known = (sample.labels >= 0) & (sample.labels < sample.target.shape[-1])
        metrics = StepMetrics(jnp.where(jnp.all(known), loss, jnp.nan), error)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return train_step


def _check_optimizer(optimizer: Any) -> None:
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}")
