"""Arguments, sums and iterations that the routing functions share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax.ops._checks import (
    accumulator,
    as_floating,
    as_integer,
    broadcast,
    taking_part,
    zeros_of,
)
from capsjax.routing.routed import Routed


class Inputs(NamedTuple):
    """Checked arguments.

    Attributes:
      votes: ``[..., I, J, D]`` in their own dtype, zero for children that are masked out.
      bias: added to the parents' sums, ``[..., J, D]`` in the dtype of the sums, or None.
      where: children that take part, ``[..., I, 1]``, or None for all.
    """

    votes: jax.Array
    bias: jax.Array | None
    where: jax.Array | None

    @property
    def wide(self) -> jnp.dtype:
        """The dtype of sums, norms and softmaxes."""
        return accumulator(self.votes.dtype)

    def coupled(self, coupling: jax.Array) -> jax.Array:
        """The coupling ``[..., I, J]``, zero for children that are masked out."""
        return coupling if self.where is None else jnp.where(self.where, coupling, 0)

    def gather(self, coupling: jax.Array) -> jax.Array:
        """Sums of the votes weighted by the coupling, plus the bias: s, ``[..., J, D]``."""
        # Not an einsum: accelerators would round its float32 factors to bfloat16 or TF32.
        s = jnp.sum(coupling[..., None] * self.votes.astype(self.wide), axis=-3)
        return s if self.bias is None else s + self.bias

    def agreement(self, poses: jax.Array) -> jax.Array:
        """Scalar products of votes and parent poses, ``[..., I, J]``."""
        return jnp.sum(self.votes.astype(self.wide) * poses[..., None, :, :], axis=-1)

    def zeros(self) -> jax.Array:
        """Logits of zero, ``[..., I, J]``, usable as the initial carry of a loop."""
        return zeros_of(jnp.sum(self.votes, axis=-1), self.wide, self.bias, self.where)

    def routed(self, poses: jax.Array, activations: jax.Array, coupling: jax.Array) -> Routed:
        """The result, in the dtype of the votes."""
        dtype = self.votes.dtype
        return Routed(poses.astype(dtype), activations.astype(dtype), coupling.astype(dtype))


def inputs(
    votes: ArrayLike, *, bias: ArrayLike | None = None, where: ArrayLike | None = None
) -> Inputs:
    """Checks the arguments common to the routing functions."""
    votes = as_floating("votes", votes)
    if votes.ndim < 3:
        raise ValueError(f"votes must have shape [..., I, J, D], got shape {votes.shape}")
    if where is not None:
        mask, votes = taking_part(where, votes, features=2)
        where = mask[..., 0]
    if bias is not None:
        bias = as_floating("bias", bias).astype(accumulator(votes.dtype))
        if bias.shape != votes.shape[-2:]:
            raise ValueError(f"bias must have shape [J, D] = {votes.shape[-2:]}, got {bias.shape}")
        bias = jnp.broadcast_to(bias, (*votes.shape[:-3], *bias.shape))
    return Inputs(votes, bias, where)


def as_logits(name: str, value: ArrayLike, given: Inputs) -> jax.Array:
    """Checks logits and broadcasts them to ``[..., I, J]``; zero for children masked out."""
    array = as_floating(name, value).astype(given.wide)
    array = broadcast(name, array, given.votes.shape[:-1])
    return given.coupled(array)


def as_parameter(
    name: str, value: ArrayLike, axes: str, shape: tuple[int, ...], given: Inputs
) -> jax.Array:
    """Checks the shape of a learned argument, and casts it to the dtype of the sums."""
    array = as_floating(name, value).astype(given.wide)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {axes} = {shape}, got {array.shape}")
    return array


def as_activations(value: ArrayLike, given: Inputs) -> jax.Array:
    """Checks the children's activations, ``[..., I]``; zero for children masked out."""
    array = as_floating("activations", value).astype(given.wide)
    array = broadcast("activations", array, given.votes.shape[:-2])
    return array if given.where is None else jnp.where(given.where[..., 0], array, 0)


def layer_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """Subtracts the mean over the last axis and divides by the standard deviation."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * lax.rsqrt(variance + epsilon)


def not_folded(logits: jax.Array) -> jax.Array:
    """Hides constant logits from XLA, which would evaluate their softmax while it compiles."""
    return lax.optimization_barrier(logits)


class Passes(NamedTuple):
    """An iterative algorithm, as passes over the votes that share a carry.

    Attributes:
      votes: ``[..., I, J, D]``, zero for children that are masked out.
      first: the initial carry, ``[..., I, J]``.
      update: maps the number of a pass, from 0, and its carry to the next carry.
      finish: maps the number of the last pass and its carry to the result and the logits, whose
        softmax over the parents is the coupling.
    """

    votes: jax.Array
    first: jax.Array
    update: Callable[[jax.Array, jax.Array], jax.Array]
    finish: Callable[[ArrayLike, jax.Array], tuple[Routed, jax.Array]]

    def run(self, num_iterations: int) -> Routed:
        """Updates the carry ``num_iterations - 1`` times and returns the last pass' result."""
        last = as_integer("num_iterations", num_iterations) - 1
        carry = lax.fori_loop(0, last, self.update, self.first)
        return self.finish(last, carry)[0]


def per_mass(numerator: jax.Array, mass: jax.Array) -> jax.Array:
    """Divides by a parent's mass, the sum of its shares of children.

    The result and its gradient are zero if the mass is below 1e-6: gradients grow with its inverse,
    and would overflow for parents that die in training.
    """
    mass = jnp.broadcast_to(mass, numerator.shape)
    empty = mass <= 1e-6  # False for NaN
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, mass))
