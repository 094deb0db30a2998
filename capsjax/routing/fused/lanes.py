"""Sweeps over tiles of children, for accelerators: the batch is last, and sums are products."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from capsjax.ops._checks import selection_precision, zeros
from capsjax.routing.fused.recurrence import add_at, product

# A tile has about _ROWS rows, children times dimensions, and a multiple of _SUBLANES children.
_ROWS, _SUBLANES = 128, 8
# Approximate numbers in an array of a block, J·K·B times its children: they fit on the chip.
_BLOCK = 6 * 2**20

Packed = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Lanes:
    r"""Sweeps over blocks of tiles. A tile has a few children with all their dimensions.

    As in :class:`Blocks`, logits are :math:`\sum_k u_{ik} P_{ijk}` with
    :math:`P_{ijk} = \sum_d W_{ikjd} V_{jd}`, without votes. Matrix units multiply faster than the
    other units add. Sums over dimensions and parents are therefore products with matrices of zeros
    and ones.

    Attributes:
      children: I.
      in_features: K.
      parents: J.
      group: children per tile; its rows are ordered by dimension first and child second.
      tiles: tiles per block; the last block is padded with children whose votes are zero.
      leaky: whether the softmax includes a logit of zero.
      stop_gradient: whether the coupling is treated as a constant.
      precision: precision of the matrix products; see :func:`capsjax.dense_capsules`.
    """

    children: int
    in_features: int
    parents: int
    group: int
    tiles: int
    leaky: bool
    stop_gradient: bool
    precision: lax.PrecisionLike

    unrolled = False

    @classmethod
    def of(cls, poses: jax.Array, weights: jax.Array, **options: Any) -> "Lanes":
        """Makes the sweeps for poses ``[B, I, K]`` and weights ``[I, K, J, D]``."""
        batch, children, in_features = poses.shape
        parents = weights.shape[2]
        # An exported function may have a symbolic batch size: assume a common one.
        batch = batch if isinstance(batch, int) else 128
        group = _SUBLANES * max(1, round(_ROWS / (in_features * _SUBLANES)))
        tiles = math.ceil(children / group)
        most = max(1, _BLOCK // (parents * in_features * group * max(1, batch)))
        blocks = math.ceil(tiles / most)
        return cls(children, in_features, parents, group, math.ceil(tiles / blocks), **options)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.ceil(self.children / (self.group * self.tiles))

    @property
    def share(self) -> float:
        """The coupling of every pair if all logits are zero."""
        return 1 / (self.parents + self.leaky)

    def pack(self, poses: jax.Array, weights: jax.Array) -> Packed:
        """Returns poses ``[N, tiles, rows, B]`` and weights ``[N, J, tiles, rows, D]``."""
        missing = self.count * self.tiles * self.group - self.children
        # Without a barrier, XLA would compute the poses once more in this layout.
        poses = jnp.pad(lax.optimization_barrier(poses), ((0, 0), (0, missing), (0, 0)))
        weights = jnp.pad(weights, ((0, missing), (0, 0), (0, 0), (0, 0)))
        tiles = (self.count, self.tiles, self.group)
        poses = poses.reshape(poses.shape[0], *tiles, -1).transpose(1, 2, 4, 3, 0)
        weights = weights.reshape(*tiles, *weights.shape[1:]).transpose(0, 4, 1, 3, 2, 5)
        return (
            poses.reshape(*poses.shape[:2], -1, poses.shape[-1]),
            weights.reshape(*weights.shape[:3], -1, weights.shape[-1]),
        )

    def unpack(self, grads: Packed, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inverts :meth:`pack`."""
        poses, weights = grads
        rows = (self.in_features, self.group)
        poses = poses.reshape(*poses.shape[:2], *rows, -1).transpose(4, 0, 1, 3, 2)
        poses = poses.reshape(poses.shape[0], -1, self.in_features)
        weights = weights.reshape(*weights.shape[:3], *rows, -1).transpose(0, 2, 4, 3, 1, 5)
        weights = weights.reshape(-1, *weights.shape[3:])
        return poses[:, : self.children], weights[: self.children]

    def forward(self, packed: Packed, query: jax.Array) -> jax.Array:
        """Returns the sums ``[J, B, D]`` for logits from the query."""
        dtype = packed[0].dtype
        query = query.transpose(0, 2, 1)

        def block(n: jax.Array | int, sums: jax.Array) -> jax.Array:
            u, weights = packed[0][n], packed[1][n]
            projected = self._product("jtrd,jdb->jtrb", weights, query.astype(dtype))
            coupling = self._couple(self._contract(projected, u), dtype)
            weighed = self._weigh(coupling, u)
            return sums + self._sums(weights, weighed)

        first = zeros(query.shape, query.dtype, query, *packed)
        return lax.fori_loop(0, self.count, block, first).transpose(0, 2, 1)

    def backward(
        self, packed: Packed, query: jax.Array, d_sums: jax.Array, grads: Packed
    ) -> tuple[jax.Array, Packed]:
        """Returns the query's gradient, and adds those of poses and weights to `grads`."""
        dtype = packed[0].dtype
        query, d_sums = query.transpose(0, 2, 1), d_sums.transpose(0, 2, 1)
        factors = query.astype(dtype), d_sums.astype(dtype)

        def block(
            n: jax.Array | int, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            d_query, d_poses, d_weights = carry
            u, weights = packed[0][n], packed[1][n]
            from_query, from_sums = (
                self._product("jtrd,jdb->jtrb", weights, factor) for factor in factors
            )
            coupling = self._couple(self._contract(from_query, u), dtype)
            # A vote's gradient is c · d_sums + d_logits · query.
            d_u = self._rows(coupling) * from_sums
            d_w = self._product("jtrb,jdb->jtrd", self._weigh(coupling, u), factors[1])
            if not self.stop_gradient:
                d_coupling = self._contract(from_sums, u)
                mean = jnp.sum(coupling * d_coupling, axis=0)
                d_logits = coupling * (d_coupling - mean[None])
                weighed = self._weigh(d_logits, u)
                d_query = d_query + self._sums(weights, weighed)
                d_u = d_u + self._rows(d_logits) * from_query
                d_w = d_w + self._product("jtrb,jdb->jtrd", weighed, factors[0])
            d_u = self._over_parents(d_u.astype(_wide(dtype)), self.precision)
            return d_query, add_at(d_poses, n, d_u), add_at(d_weights, n, d_w)

        first = zeros(query.shape, query.dtype, query, d_sums, *packed)
        d_query, *d_arguments = lax.fori_loop(0, self.count, block, (first, *grads))
        return d_query.transpose(0, 2, 1), (d_arguments[0], d_arguments[1])

    def _product(self, axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return product(axes, a, b, self.precision)

    def _sums(self, weights: jax.Array, weighed: jax.Array) -> jax.Array:
        """Sums of the votes, of which ``[J, tiles, rows, B]`` are the factors of the weights."""

        def sums(weights: jax.Array, weighed: jax.Array) -> jax.Array:
            return self._product("jtrd,jtrb->jdb", weights, weighed)

        def on_cpu(weights: jax.Array, weighed: jax.Array) -> jax.Array:
            # XLA:CPU accepts this product of bfloat16 factors, but cannot run it.
            return sums(weights.astype(jnp.float32), weighed.astype(jnp.float32))

        if weights.dtype != jnp.bfloat16:
            return sums(weights, weighed)
        return lax.platform_dependent(weights, weighed, cpu=on_cpu, default=sums)

    def _contract(self, projected: jax.Array, u: jax.Array) -> jax.Array:
        """Scalar products over K of ``[J, tiles, rows, B]`` and ``[tiles, rows, B]``."""
        terms = (projected * u[None].astype(projected.dtype)).astype(_wide(u.dtype))
        same_child = np.tile(np.eye(self.group), (1, self.in_features))
        return self._product("gr,jtrb->jtgb", jnp.asarray(same_child, terms.dtype), terms)

    def _over_parents(self, terms: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
        """Sums of ``[J, tiles, rows, B]`` over the parents."""
        size = terms.shape[2]
        same_row = np.broadcast_to(np.eye(size)[:, None], (size, self.parents, size))
        return product("pjr,jtrb->tpb", jnp.asarray(same_row, terms.dtype), terms, precision)

    def _rows(self, x: jax.Array) -> jax.Array:
        """Repeats ``[J, tiles, group, B]`` for each dimension: ``[J, tiles, rows, B]``."""
        parents, tiles, group, batch = x.shape
        shape = (parents, tiles, self.in_features, group, batch)
        return jnp.broadcast_to(x[:, :, None], shape).reshape(parents, tiles, -1, batch)

    def _weigh(self, factors: jax.Array, u: jax.Array) -> jax.Array:
        return (self._rows(factors) * u[None].astype(factors.dtype)).astype(_wide(u.dtype))

    def _couple(self, logits: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Softmax over the parents, the first axis, of logits from poses of a dtype."""
        highest = jnp.max(logits, axis=0)
        if self.leaky:
            highest = jnp.maximum(highest, 0)
        exponentials = jnp.exp(logits - highest[None])
        total = self._over_parents(exponentials, selection_precision(dtype))
        if self.leaky:
            total = total + jnp.exp(-highest)
        return exponentials * (1 / total)[None]


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of products of two numbers, which may exceed the range of float16."""
    return jnp.promote_types(dtype, jnp.bfloat16)
