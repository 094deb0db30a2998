"""Sweeps over blocks of children, for CPUs."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from capsjax.ops._checks import zeros
from capsjax.routing.fused.recurrence import add_at, product

# Approximate numbers in an array of a block, J·B·K times its children: caches hold a few of them.
_BLOCK = 2**17
# Blocks are multiples of this: children lie along the last axis, which CPUs vectorise.
_LANES = 16
# Reductions over at most this many numbers are written out, because XLA:CPU then vectorises them.
_UNROLL = 32

Packed = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Blocks:
    r"""Sweeps that keep the product of weights and query for one block of children.

    With :math:`P_{ijk} = \sum_d W_{ikjd} V_{jd}`, logits are :math:`\sum_k u_{ik} P_{ijk}` and sums
    are :math:`\sum_{ik} (c_{ij} u_{ik}) W_{ikjd}`. Instead of the votes, D numbers per pair, these
    matrix products need K numbers per pair of a block.

    Attributes:
      children: I.
      parents: J.
      block: children per block; the last block is padded with children whose votes are zero.
      leaky: whether the softmax includes a logit of zero.
      stop_gradient: whether the coupling is treated as a constant.
      precision: precision of the matrix products; see :func:`capsjax.dense_capsules`.
    """

    children: int
    parents: int
    block: int
    leaky: bool
    stop_gradient: bool
    precision: lax.PrecisionLike

    unrolled = False

    @classmethod
    def of(cls, poses: jax.Array, weights: jax.Array, **options: Any) -> "Blocks":
        """Makes the sweeps for poses ``[B, I, K]`` and weights ``[I, K, J, D]``."""
        batch, children, in_features = poses.shape
        parents = weights.shape[2]
        # An exported function may have a symbolic batch size: assume a common one.
        batch = batch if isinstance(batch, int) else 128
        lanes = _BLOCK / (_LANES * max(1, batch * in_features * parents))
        block = min(children, _LANES * math.ceil(lanes))
        return cls(children, parents, max(1, block), **options)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.ceil(self.children / self.block)

    @property
    def share(self) -> float:
        """The coupling of every pair if all logits are zero."""
        return 1 / (self.parents + self.leaky)

    def pack(self, poses: jax.Array, weights: jax.Array) -> Packed:
        """Returns blocks of poses ``[N, B, K, block]`` and weights ``[N, J, D, K * block]``."""
        missing = self.count * self.block - self.children
        poses = jnp.pad(poses, ((0, 0), (0, missing), (0, 0)))
        weights = jnp.pad(weights, ((0, missing), (0, 0), (0, 0), (0, 0)))
        poses = poses.reshape(poses.shape[0], self.count, self.block, -1).transpose(1, 0, 3, 2)
        weights = weights.reshape(self.count, self.block, *weights.shape[1:])
        weights = weights.transpose(0, 3, 4, 2, 1)
        return poses, weights.reshape(*weights.shape[:3], -1)

    def unpack(self, grads: Packed, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inverts :meth:`pack`."""
        poses, weights = grads
        poses = poses.transpose(1, 0, 3, 2)
        poses = poses.reshape(poses.shape[0], -1, poses.shape[-1])
        weights = weights.reshape(*weights.shape[:3], -1, self.block).transpose(0, 4, 3, 1, 2)
        weights = weights.reshape(-1, *weights.shape[2:])
        return poses[:, : self.children], weights[: self.children]

    def forward(self, packed: Packed, query: jax.Array) -> jax.Array:
        """Returns the sums ``[J, B, D]`` for logits from the query."""
        dtype, wide = packed[0].dtype, query.dtype

        def block(n: jax.Array, sums: jax.Array) -> jax.Array:
            u, weights = packed[0][n].astype(wide), packed[1][n]
            projected = self._product("jbd,jdn->jbn", query.astype(dtype), weights)
            coupling = self._couple(_contract(projected.reshape(-1, *u.shape), u))
            weighed = (coupling[:, :, None] * u[None]).astype(dtype).reshape(projected.shape)
            return sums + self._product("jbn,jdn->jbd", weighed, weights)

        return lax.fori_loop(0, self.count, block, zeros(query.shape, wide, query, *packed))

    def backward(
        self, packed: Packed, query: jax.Array, d_sums: jax.Array, grads: Packed
    ) -> tuple[jax.Array, Packed]:
        """Returns the query's gradient, and adds those of poses and weights to `grads`."""
        dtype, wide = packed[0].dtype, query.dtype
        batch = query.shape[1]
        # Stacked, so that each pair of products becomes one.
        with_weights = jnp.concatenate([query, d_sums], axis=1).astype(dtype)
        with_poses = jnp.concatenate([d_sums, query], axis=1).astype(dtype)

        def block(
            n: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            d_query, d_poses, d_weights = carry
            u, weights = packed[0][n].astype(wide), packed[1][n]
            flat = self._product("jbd,jdn->jbn", with_weights, weights)
            projected = flat.reshape(-1, 2, *u.shape)
            coupling = self._couple(_contract(projected[:, 0], u))
            d_logits = self._d_logits(coupling, projected[:, 1], u)
            # A vote's gradient is c · d_sums + d_logits · query.
            d_u = _sum(
                coupling[:, :, None] * projected[:, 1] + d_logits[:, :, None] * projected[:, 0],
                axis=0,
            )
            factors = jnp.stack([coupling, d_logits], axis=1)
            weighed = (factors[:, :, :, None] * u[None, None]).astype(dtype).reshape(flat.shape)
            d_query = d_query + self._product("jbn,jdn->jbd", weighed[:, batch:], weights)
            d_w = self._product("jbd,jbn->jdn", with_poses, weighed)
            return d_query, add_at(d_poses, n, d_u), add_at(d_weights, n, d_w)

        first = zeros(query.shape, wide, query, d_sums, *packed)
        d_query, d_poses, d_weights = lax.fori_loop(0, self.count, block, (first, *grads))
        return d_query, (d_poses, d_weights)

    def _product(self, axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return product(axes, a, b, self.precision)

    def _couple(self, logits: jax.Array) -> jax.Array:
        """Softmax of ``[J, B, block]`` over the parents."""
        highest = _reduce(jnp.maximum, jnp.max, logits, axis=0)
        if self.leaky:
            highest = jnp.maximum(highest, 0)
        exponentials = jnp.exp(logits - highest[None])
        total = _sum(exponentials, axis=0)
        if self.leaky:
            total = total + jnp.exp(-highest)
        return _computed_once(exponentials / total[None])

    def _d_logits(self, coupling: jax.Array, projected: jax.Array, u: jax.Array) -> jax.Array:
        """Gradient of the logits ``[J, B, block]``, from the weights times the sums' gradient."""
        if self.stop_gradient:
            return jnp.zeros_like(coupling)
        d_coupling = _contract(projected, u)
        mean = _sum(coupling * d_coupling, axis=0)
        return _computed_once(coupling * (d_coupling - mean[None]))


def _contract(projected: jax.Array, u: jax.Array) -> jax.Array:
    """Scalar products over K of ``[J, B, K, block]`` and ``[B, K, block]``."""
    return _computed_once(_sum(projected * u[None], axis=2))


def _computed_once(x: jax.Array) -> jax.Array:
    # Otherwise XLA fuses the computation of x into each of its uses.
    return lax.optimization_barrier(x)


def _sum(x: jax.Array, axis: int) -> jax.Array:
    return _reduce(operator.add, jnp.sum, x, axis=axis)


def _reduce(
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    reduction: Callable[..., jax.Array],
    x: jax.Array,
    *,
    axis: int,
) -> jax.Array:
    if 0 < x.shape[axis] <= _UNROLL:
        return functools.reduce(combine, jnp.unstack(x, axis=axis))
    return reduction(x, axis=axis)
