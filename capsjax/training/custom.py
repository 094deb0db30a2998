"""Objectives, optimizers and metrics that are given in Python, and how they are tried."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax

from capsjax.data import Batch, Sampler
from capsjax.data.dataset import AnySplit
from capsjax.errors import ConfigError
from capsjax.ops._checks import check_callable
from capsjax.options import check_default
from capsjax.training.config import OF_OPTIMIZER, TrainConfig
from capsjax.training.objectives import Metric, Objective
from capsjax.training.programs import measure
from capsjax.training.step import Apply, Variables, check_optimizer, update_with


class Custom(NamedTuple):
    """What is given in Python, replacing what the options choose.

    Attributes:
      objective: loss per example; see :func:`make_train_step`.
      optimizer: an optax transformation.
      metrics: other values per example, by name; see :func:`make_evaluate`.
    """

    objective: Objective | None = None
    optimizer: optax.GradientTransformation | None = None
    metrics: Mapping[str, Metric] | None = None

    def check(self, config: TrainConfig) -> None:
        """Raises a TypeError or ConfigError if it is unusable, or an option has no effect."""
        if self.objective is not None:
            check_callable(objective=self.objective)
            check_default(config, "when an objective is given", "loss", "class_weights")
        if self.optimizer is not None:
            check_optimizer(self.optimizer)
            check_default(config, "when an optimizer is given", *OF_OPTIMIZER)

    @property
    def shaping(self) -> tuple[str, ...]:
        """Names of the given parts that affect the parameters."""
        given = {"objective": self.objective, "optimizer": self.optimizer}
        return tuple(name for name, value in given.items() if value is not None)


def try_evaluation(
    apply: Apply,
    variables: Variables,
    objective: Objective,
    metrics: Mapping[str, Metric],
    sampler: Sampler,
    train: AnySplit,
) -> None:
    """Traces the objective and metrics given in Python, to find errors before the run begins."""

    def evaluate(variables: Variables, batch: Batch) -> object:
        sample = sampler.test(batch, jnp.arange(2))
        prediction, _ = apply(variables, sample.images, target=sample.masks)
        return measure(prediction, sample, objective, metrics)

    shapes: Any = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (train.images, train.labels))
    jax.eval_shape(evaluate, variables, Batch(*shapes))


def try_optimizer(
    optimizer: optax.GradientTransformation, params: chex.ArrayTree, axis_name: str | None
) -> None:
    """Traces an update, to find errors before the run begins.

    Raises:
      ConfigError: the state cannot be stored or carried from step to step.
    """

    def update(params: chex.ArrayTree, state: chex.ArrayTree) -> chex.ArrayTree:
        value = jnp.zeros(())
        return update_with(optimizer, params, state, params, value, lambda _: value)[1]

    state = jax.eval_shape(optimizer.init, params)
    if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state)):
        raise ConfigError("optimizer must not keep a random key, which checkpoints do not store")
    if axis_name is None:
        after = jax.eval_shape(update, params, state)
    else:  # on one of the devices; all results have its axis in front
        several = jax.vmap(update, in_axes=None, axis_name=axis_name, axis_size=1)
        after = jax.eval_shape(lambda *x: jax.tree.map(lambda y: y[0], several(*x)), params, state)
    if cast(Any, jax.tree.structure(after)) != jax.tree.structure(state):
        raise ConfigError("optimizer must keep the structure of its state, but update changes it")
    before = jax.tree_util.tree_leaves_with_path(state)
    for (path, old), new in zip(before, jax.tree.leaves(after), strict=True):
        # Loops promote numbers of Python.
        if old.shape != new.shape or (old.dtype != new.dtype and not old.weak_type):
            raise ConfigError(
                "optimizer must keep the shapes and dtypes of its state, but update changes"
                f" {jax.tree_util.keystr(path)} from {old.dtype} {list(old.shape)} to"
                f" {new.dtype} {list(new.shape)}"
            )
