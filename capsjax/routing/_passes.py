"""What the routing functions share: their arguments, and a pass to the parents."""

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
    zeros,
)
from capsjax.routing.routed import Routed


class Inputs(NamedTuple):
    """Checked arguments: votes in their own dtype, the rest in that of the sums.

    Attributes:
      votes: ``[..., I, J, D]``, zero for children that take no part.
      bias: added to the parents' sums, ``[..., J, D]``, or None.
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
        """The coupling ``[..., I, J]`` with zeros for children that take no part."""
        return coupling if self.where is None else jnp.where(self.where, coupling, 0)

    def gather(self, coupling: jax.Array) -> jax.Array:
        """Sums of votes weighted by coupling, with the bias: s, ``[..., J, D]``."""
        # Not an einsum, whose float32 factors accelerators round to bfloat16 or TF32.
        s = jnp.sum(coupling[..., None] * self.votes.astype(self.wide), axis=-3)
        return s if self.bias is None else s + self.bias

    def agreement(self, poses: jax.Array) -> jax.Array:
        """Scalar products of votes and parent poses, ``[..., I, J]``."""
        return jnp.sum(self.votes.astype(self.wide) * poses[..., None, :, :], axis=-1)

    def zeros(self) -> jax.Array:
        """Logits of zero, ``[..., I, J]``, fit to be the first carry of a loop."""
        return zeros(self.votes.shape[:-1], self.wide, *self)

    def routed(self, poses: jax.Array, activations: jax.Array, coupling: jax.Array) -> Routed:
        """The result, in the dtype of the votes."""
        dtype = self.votes.dtype
        return Routed(poses.astype(dtype), activations.astype(dtype), coupling.astype(dtype))


def inputs(
    votes: ArrayLike, *, bias: ArrayLike | None = None, where: ArrayLike | None = None
) -> Inputs:
    """Checks the arguments that all routing functions take."""
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
    """Checks an argument that broadcasts to ``[..., I, J]``, in the dtype of the sums.

    Children that take no part get zero.
    """
    array = as_floating(name, value).astype(given.wide)
    array = broadcast(name, array, given.votes.shape[:-1])
    return given.coupled(array)


def as_parameter(
    name: str, value: ArrayLike, axes: str, shape: tuple[int, ...], given: Inputs
) -> jax.Array:
    """Checks a learned argument of exactly this shape, and casts it to the dtype of the sums."""
    array = as_floating(name, value).astype(given.wide)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {axes} = {shape}, got {array.shape}")
    return array


def as_activations(value: ArrayLike, given: Inputs) -> jax.Array:
    """Checks the children's activations, ``[..., I]``; those that take no part get zero."""
    array = as_floating("activations", value).astype(given.wide)
    array = broadcast("activations", array, given.votes.shape[:-2])
    return array if given.where is None else jnp.where(given.where[..., 0], array, 0)


def layer_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """Subtracts the mean over the last axis and divides by the standard deviation."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * lax.rsqrt(variance + epsilon)


class Passes(NamedTuple):
    """An iterative algorithm as a carry that one pass hands to the next.

    Attributes:
      votes: ``[..., I, J, D]``, zero for children that take no part.
      first: the carry of the first pass, ``[..., I, J]``.
      update: makes the carry of the next pass out of the number of this one, from 0, and its carry.
      finish: what a pass finds, if it is the last: its number and its carry go in; the result and
        the logits, whose softmax over the parents is the coupling, come out.
    """

    votes: jax.Array
    first: jax.Array
    update: Callable[[jax.Array, jax.Array], jax.Array]
    finish: Callable[[ArrayLike, jax.Array], tuple[Routed, jax.Array]]

    def run(self, num_iterations: int) -> Routed:
        """Updates the carry before each pass but the first, and returns what the last one finds."""
        last = as_integer("num_iterations", num_iterations) - 1
        carry = lax.fori_loop(0, last, self.update, self.first)
        return self.finish(last, carry)[0]


def per_mass(numerator: jax.Array, mass: jax.Array) -> jax.Array:
    """Divides by the sum of children that a parent gets; zero, with zero gradients, if it is empty.

    That is, if it gets less than a millionth of a child: gradients grow with the inverse of the
    mass, and overflow for parents that die in training.
    """
    mass = jnp.broadcast_to(mass, numerator.shape)
    empty = mass <= 1e-6  # a NaN is not
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, mass))
