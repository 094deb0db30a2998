"""Sweeps as kernels for TPUs: one pass over poses and weights, the batch in lanes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from capsjax.ops._checks import zeros
from capsjax.routing.fused.platforms import only_on
from capsjax.routing.fused.recurrence import product
from capsjax.routing.fused.tiles import LANES, Packed, backward_tiles, forward_tiles, to_lanes

# Children of a block come in multiples of a tile's rows.
_SUBLANES = 16
# Bytes that one block may take of the memory beside the units.
_VMEM = 12 * 2**20


@dataclasses.dataclass(frozen=True)
class TpuKernels:
    r"""Sweeps that read every pose and weight once and write only results.

    A block of children stays beside the matrix units. Of each parent in turn they make
    :math:`P_{ijk} = \sum_d W_{ikjd} V_{jd}`, of which the logits :math:`\sum_k u_{ik} P_{ijk}` are
    kept; with the softmax of these the sums :math:`\sum_{ik} W_{ikjd} (c_{ij} u_{ik})` grow from
    block to block. Backwards P and its counterpart of the sums' gradient are made twice.

    Attributes:
      batch: B.
      children: I.
      in_features: K.
      parents: J.
      block: children in a block; the last one is filled up with children whose votes are zero.
      leaky: whether a logit of zero takes part in the softmax.
      stop_gradient: whether the coupling counts as a constant.
      precision: of the matrix products; see :func:`capsjax.dense_capsules`.
      interpret: whether XLA computes what the kernels say, on any platform, for tests.
    """

    batch: int
    children: int
    in_features: int
    parents: int
    block: int
    leaky: bool
    stop_gradient: bool
    precision: lax.PrecisionLike
    interpret: bool = False

    @classmethod
    def of(cls, poses: jax.Array, weights: jax.Array, **options: Any) -> "TpuKernels":
        """Sweeps for poses ``[B, I, K]`` and weights ``[I, K, J, D]`` with these options."""
        children, in_features, parents, features = weights.shape
        if not isinstance(poses.shape[0], int):
            raise NotImplementedError(
                f"implementation 'pallas_tpu' needs poses of known size, got shape {poses.shape}"
            )
        # Of one child: logits, their gradients, poses and what they are multiplied with; weights
        # and their gradient, each twice, as the next block is fetched while one is used.
        rows = 2 * parents + 8 * in_features
        child = 4 * (rows * LANES + 3 * in_features * parents * max(features, _SUBLANES))
        if child * _SUBLANES > _VMEM:
            raise NotImplementedError(
                f"implementation 'pallas_tpu' needs {_SUBLANES} children to fit into"
                f" {_VMEM >> 20} MiB, got weights of shape {weights.shape}"
            )
        most = _VMEM // child // _SUBLANES * _SUBLANES
        blocks = math.ceil(children / most)
        block = _SUBLANES * math.ceil(children / (blocks * _SUBLANES))
        return cls(poses.shape[0], children, in_features, parents, block, **options)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.ceil(self.children / self.block)

    @property
    def share(self) -> float:
        """Coupling of every pair where all logits are zero."""
        return 1 / (self.parents + self.leaky)

    def pack(self, poses: jax.Array, weights: jax.Array) -> Packed:
        """Poses ``[tiles, N, K, block, lanes]`` and weights ``[N, J, D, K * block]``."""
        missing = self.count * self.block - self.children
        poses = jnp.pad(poses, ((0, -self.batch % LANES), (0, missing), (0, 0)))
        poses = poses.reshape(-1, LANES, self.count, self.block, poses.shape[-1])
        weights = jnp.pad(weights, ((0, missing), (0, 0), (0, 0), (0, 0)))
        weights = weights.reshape(self.count, self.block, *weights.shape[1:])
        weights = weights.transpose(0, 3, 4, 2, 1)
        return poses.transpose(0, 2, 4, 3, 1), weights.reshape(*weights.shape[:3], -1)

    def unpack(self, grads: Packed) -> tuple[jax.Array, jax.Array]:
        """The inverse of :meth:`pack`."""
        poses, weights = grads
        poses = poses.transpose(0, 4, 1, 3, 2)
        poses = poses.reshape(poses.shape[0] * poses.shape[1], -1, self.in_features)
        weights = weights.reshape(*weights.shape[:3], self.in_features, self.block)
        weights = weights.transpose(0, 4, 3, 1, 2)
        weights = weights.reshape(-1, *weights.shape[2:])
        return poses[: self.batch, : self.children], weights[: self.children]

    def forward(self, packed: Packed, query: jax.Array) -> jax.Array:
        """The sums with logits from the query, ``[J, B, D]``."""
        poses, weights = packed
        queries = to_lanes(query)
        one = queries[0]
        call = self._call(
            _forward_kernel, [poses[0], weights], [one], out=[], summed=[one], scratch=1
        )
        return forward_tiles(call, packed, queries, self.batch)

    def backward(
        self, packed: Packed, query: jax.Array, d_sums: jax.Array, grads: Packed
    ) -> tuple[jax.Array, Packed]:
        """The query's gradient, ``[J, B, D]``, and `grads` with those of the arguments added."""
        poses, weights = packed
        queries = to_lanes(query)
        one = queries[0]
        call = self._call(
            _backward_kernel,
            [poses[0], weights],
            [one, one],
            out=[grads[0][0], grads[1]],
            summed=[one],
            scratch=2,
        )
        return backward_tiles(call, packed, queries, to_lanes(d_sums), grads, self.batch)

    def _call(
        self,
        kernel: Callable[..., None],
        blocked: Sequence[jax.Array],
        whole: Sequence[jax.Array],
        *,
        out: Sequence[jax.Array],
        summed: Sequence[jax.Array],
        scratch: int,
    ) -> Callable[..., tuple[jax.Array, ...]]:
        """The kernel over all blocks in turn.

        Args:
          kernel: takes these sweeps and references to what follows, in this order.
          blocked: like arguments of which it sees block after block, along their first axis.
          whole: like arguments that it sees whole.
          out: like results of which it writes block after block.
          summed: like results that it adds to.
          scratch: numbers of arrays ``[J, block, lanes]`` of its own.
        """

        def spec(x: jax.Array, by_block: bool) -> pl.BlockSpec:
            others = (0,) * (x.ndim - 1)
            if by_block:
                return pl.BlockSpec((None, *x.shape[1:]), lambda n: (n, *others))
            return pl.BlockSpec(x.shape, lambda n: (0, *others))

        arrays = pltpu.VMEM((self.parents, self.block, LANES), summed[0].dtype)
        # Under shard_map results differ on the axes of the mesh on which an argument does.
        shapes = jax.eval_shape(
            lambda: [zeros(x.shape, x.dtype, *blocked, *whole) for x in (*out, *summed)]
        )
        call: Callable[..., tuple[jax.Array, ...]] = pl.pallas_call(
            functools.partial(kernel, self),
            grid=(self.count,),
            in_specs=[spec(x, True) for x in blocked] + [spec(x, False) for x in whole],
            out_specs=[spec(x, True) for x in out] + [spec(x, False) for x in summed],
            out_shape=shapes,
            scratch_shapes=[arrays] * scratch,
            interpret=self.interpret,
            name=kernel.__name__.strip("_"),
        )
        return call if self.interpret else only_on("tpu", "pallas_tpu", call)


def _forward_kernel(
    sweeps: TpuKernels, u: Any, weights: Any, query: Any, sums: Any, logits: Any
) -> None:
    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    @_for_each_parent(sweeps)
    def _(j: jax.Array) -> None:
        logits[j] = _contract(_project(sweeps, weights[j], query[j]), u[...])

    _softmax(sweeps, logits)

    @_for_each_parent(sweeps)
    def _(j: jax.Array) -> None:
        weighed = _weigh(logits[j], u[...])
        sums[j] += _dot(sweeps, weights[j], weighed, (1, 0))


def _backward_kernel(
    sweeps: TpuKernels,
    u: Any,
    weights: Any,
    query: Any,
    d_sums: Any,
    d_u: Any,
    d_weights: Any,
    d_query: Any,
    coupling: Any,
    d_logits: Any,
) -> None:
    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        d_query[...] = jnp.zeros_like(d_query)

    @_for_each_parent(sweeps)
    def _(j: jax.Array) -> None:
        coupling[j] = _contract(_project(sweeps, weights[j], query[j]), u[...])
        d_logits[j] = _contract(_project(sweeps, weights[j], d_sums[j]), u[...])

    _softmax(sweeps, coupling)
    mean = lax.fori_loop(
        0,
        sweeps.parents,
        lambda j, total: total + coupling[j] * d_logits[j],
        jnp.zeros(coupling.shape[1:], coupling.dtype),
    )
    d_u[...] = jnp.zeros_like(d_u)

    # A vote's gradient is c · d_sums + d_logits · query.
    @_for_each_parent(sweeps)
    def _(j: jax.Array) -> None:
        c = coupling[j]
        from_sums = _project(sweeps, weights[j], d_sums[j]).reshape(u.shape)
        d_w = _dot(sweeps, d_sums[j].astype(u.dtype), _weigh(c, u[...]), (1, 1))
        if sweeps.stop_gradient:
            d_u[...] += c[None] * from_sums
        else:
            d_l = c * (d_logits[j] - mean)
            from_query = _project(sweeps, weights[j], query[j]).reshape(u.shape)
            d_u[...] += c[None] * from_sums + d_l[None] * from_query
            weighed = _weigh(d_l, u[...])
            d_w += _dot(sweeps, query[j].astype(u.dtype), weighed, (1, 1))
            d_query[j] += _dot(sweeps, weights[j], weighed, (1, 0))
        d_weights[j] = d_w


def _for_each_parent(sweeps: TpuKernels) -> Callable[[Callable[[jax.Array], None]], None]:
    def run(body: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(0, sweeps.parents, lambda j, _: body(j), None)

    return run


def _softmax(sweeps: TpuKernels, x: Any) -> None:
    """Replaces ``[J, block, lanes]`` by its softmax over the parents."""
    lowest = 0.0 if sweeps.leaky else -jnp.inf
    highest = lax.fori_loop(
        0,
        sweeps.parents,
        lambda j, most: jnp.maximum(most, x[j]),
        jnp.full(x.shape[1:], lowest, x.dtype),
    )

    def exponential(j: jax.Array, total: jax.Array) -> jax.Array:
        x[j] = jnp.exp(x[j] - highest)
        return total + x[j]

    none = jnp.exp(-highest) if sweeps.leaky else jnp.zeros_like(highest)
    total = lax.fori_loop(0, sweeps.parents, exponential, none)

    @_for_each_parent(sweeps)
    def _(j: jax.Array) -> None:
        x[j] = x[j] / total


def _project(sweeps: TpuKernels, weights: jax.Array, query: jax.Array) -> jax.Array:
    """P of one parent, ``[K * block, lanes]``."""
    return _dot(sweeps, weights, query.astype(weights.dtype), (0, 0))


def _contract(projected: jax.Array, u: jax.Array) -> jax.Array:
    """Scalar products over K, ``[block, lanes]``."""
    return jnp.sum(projected.reshape(u.shape) * u.astype(projected.dtype), axis=0)


def _weigh(factors: jax.Array, u: jax.Array) -> jax.Array:
    """Poses times a factor each, ``[K * block, lanes]``."""
    weighed = (factors[None] * u.astype(factors.dtype)).astype(u.dtype)
    return weighed.reshape(-1, weighed.shape[-1])


def _dot(sweeps: TpuKernels, a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    equation = {(0, 0): "km,kn->mn", (1, 0): "mk,kn->mn", (1, 1): "mk,nk->mn"}[axes]
    return product(equation, a, b, sweeps.precision)
