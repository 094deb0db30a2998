"""Optimizers, from optax."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from capsjax.ops._checks import as_number
from capsjax.training.config import TrainConfig
from capsjax.training.step import is_part


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
      floor: lower bound of the learning rate.

    Returns:
      An optax transformation.

    Example:
      >>> from capsjax.training import paper_optimizer
      >>> optimizer = paper_optimizer(1e-3)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 4; the
      constants are those of the authors' code.
    """
    as_number("learning_rate", learning_rate, least=0)
    as_number("decay_rate", decay_rate, least=0)
    as_number("decay_steps", decay_steps, least=1)
    as_number("floor", floor, least=0)

    return optax.adam(exponential_schedule(learning_rate, decay_rate, decay_steps, floor))


def exponential_schedule(
    learning_rate: float, decay_rate: float, decay_steps: int, floor: float
) -> optax.Schedule:
    """The schedule of :func:`paper_optimizer`."""

    def schedule(count: chex.Numeric) -> jax.Array:
        # Not optax.exponential_decay, which treats the floor as a ceiling at a decay rate of 1.
        steps = jnp.asarray(count, jnp.float32)
        return jnp.maximum(learning_rate * decay_rate ** (steps / decay_steps), floor)

    return schedule


def make_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Returns the schedule that the options choose for a run of this many steps."""
    first, least, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if config.schedule == "exponential":
        schedule = exponential_schedule(first, config.decay_rate, config.decay_steps, least)
    elif config.schedule == "cosine":
        # The rate reaches its minimum at the last step, whose number is one less than their count.
        length = max(total_steps - 1 - warmup, 1)
        schedule = optax.cosine_decay_schedule(first, length, alpha=least / first)
    else:
        schedule = optax.constant_schedule(first)
    if not warmup:
        return schedule
    # The first step uses a fraction of the learning rate, not zero.
    rising = optax.linear_schedule(first / (warmup + 1), first, warmup)
    return optax.join_schedules([rising, schedule], [warmup])


def make_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer that the options choose for a run of this many steps."""
    schedule = make_schedule(config, total_steps)
    optimizer = optax.adam(schedule)
    if config.weight_decay:
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=_are_kernels)
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer


def _are_kernels(params: chex.ArrayTree) -> chex.ArrayTree:
    """Marks kernels: not biases, scales, gates or priors."""

    def is_kernel(path: tuple[Any, ...], _: jax.Array) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True).endswith("kernel")

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def freeze(
    optimizer: optax.GradientTransformation, params: chex.ArrayTree, parts: Sequence[str]
) -> optax.GradientTransformation:
    """Returns an optimizer that leaves these parts of a network unchanged.

    Args:
      optimizer: optimizer of the other parameters.
      params: nested dicts of arrays, as from :func:`split_network`.
      parts: beginnings of dotted names such as ``decoder.layers.0.kernel``, in whole words.

    Raises:
      ValueError: the network has no such part, or nothing is left to train.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from capsjax.training.optimizers import freeze
      >>> params = {"conv": {"kernel": jnp.ones(2)}, "classes": {"kernel": jnp.ones(2)}}
      >>> optimizer = freeze(optax.sgd(0.5), params, ["conv"])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> print(updates["conv"]["kernel"], updates["classes"]["kernel"])
      [0. 0.] [-0.5 -0.5]
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    for part in parts:
        if not any(is_part(name, [part]) for name in names):
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(f"freeze must name parts of the network, {known}, got {part!r}")
    frozen = [is_part(name, parts) for name in names]
    if all(frozen):
        raise ValueError(f"freeze must leave something to train, got {', '.join(parts)}")
    labels = jax.tree.unflatten(structure, ["frozen" if f else "trained" for f in frozen])
    both = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)

    def update(
        updates: chex.ArrayTree,
        state: chex.ArrayTree,
        params: chex.ArrayTree | None = None,
        **given: Any,
    ) -> Any:
        """Hides the frozen parts in further arguments as well, which partition does not."""
        if "grad" in given:
            given["grad"] = jax.tree.map(
                lambda x, label: optax.MaskedNode() if label == "frozen" else x,
                given["grad"],
                labels,
            )
        if (value_fn := given.get("value_fn")) is not None:
            given["value_fn"] = lambda masked: value_fn(_filled(masked, params))
        return both.update(updates, state, params, **given)

    return optax.GradientTransformationExtraArgs(both.init, update)


def _filled(masked: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """Parameters, where they are not masked those of the first tree."""

    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    return jax.tree.map(lambda x, p: p if is_masked(x) else x, masked, params, is_leaf=is_masked)
