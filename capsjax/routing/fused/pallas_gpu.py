"""Sweeps as kernels for Hopper GPUs and newer: a thread for each example."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from capsjax.ops._checks import zeros
from capsjax.routing.fused.platforms import only_on
from capsjax.routing.fused.tiles import (
    LANES,
    Kernel,
    Packed,
    backward_tiles,
    forward_tiles,
    to_lanes,
)

# Bytes of a program's shared memory, such that two run on a multiprocessor, and the most there is
# on chips for data centres and on others.
_SHARED, _MOST_SHARED, _MOST_SHARED_ELSEWHERE = 96 * 2**10, 220 * 2**10, 96 * 2**10
# Children of a block, and programs of a kernel: two for each multiprocessor.
_BLOCK, _PROGRAMS = 8, 264
# Dimensions of a parent, which are written out and held in registers.
_MOST_FEATURES = 64


@dataclasses.dataclass(frozen=True)
class GpuKernels:
    r"""Sweeps in which every thread has one example, and nothing is shared but weights.

    A program takes some blocks of children. For each parent, V is in registers, and the logits
    :math:`\sum_k u_{ik} \sum_d W_{ikjd} V_{jd}` of a block go to shared memory; with their softmax
    the sums of the block are made in registers too. Each program adds up its own, and XLA those of
    all. All arithmetic is float32 on the cores, as matrix units would round factors to TF32.

    Beside packed arguments and results, a pass needs ``[programs, J, D, 128]`` for the programs'
    sums, of at most 264 programs.

    Attributes:
      batch: B.
      children: I.
      block: children in a block.
      blocks: number of blocks of a program; the last program is filled up with children whose
        votes are zero.
      leaky: whether a logit of zero takes part in the softmax.
      stop_gradient: whether the coupling counts as a constant.
      precision: of the matrix products beside the kernels; see :func:`capsjax.dense_capsules`.
      parents: J.
      interpret: whether XLA computes what the kernels say, on any platform, for tests.
    """

    batch: int
    children: int
    parents: int
    block: int
    blocks: int
    leaky: bool
    stop_gradient: bool
    precision: lax.PrecisionLike
    interpret: bool = False

    @classmethod
    def of(cls, poses: jax.Array, weights: jax.Array, **options: Any) -> "GpuKernels":
        """Sweeps for poses ``[B, I, K]`` and weights ``[I, K, J, D]`` with these options."""
        children, _, parents, features = weights.shape
        capability = _compute_capability()
        if capability < 9:
            raise NotImplementedError(
                "implementation 'pallas_gpu' needs a GPU of compute capability 9.0 or more, got"
                f" {capability}"
            )
        if not isinstance(poses.shape[0], int):
            raise NotImplementedError(
                f"implementation 'pallas_gpu' needs poses of known size, got shape {poses.shape}"
            )
        if poses.dtype == jnp.float64:
            raise NotImplementedError(
                "implementation 'pallas_gpu' computes in float32, got poses or weights of float64"
            )
        if features > _MOST_FEATURES:
            raise NotImplementedError(
                f"implementation 'pallas_gpu' needs parents of at most {_MOST_FEATURES} dimensions,"
                f" got weights of shape {weights.shape}"
            )
        # Coupling and the gradient of logits, of one child.
        child = 2 * parents * LANES * 4
        most = _MOST_SHARED_ELSEWHERE if 12 <= capability < math.inf else _MOST_SHARED
        if child > most:
            raise NotImplementedError(
                f"implementation 'pallas_gpu' needs the logits of a child to fit into"
                f" {most >> 10} KiB, got weights of shape {weights.shape}"
            )
        # As many children for every program, in blocks as large as may be.
        share = math.ceil(children / _PROGRAMS)
        blocks = math.ceil(share / min(max(_SHARED // child, 1), _BLOCK))
        block = math.ceil(share / blocks)
        return cls(poses.shape[0], children, parents, block, blocks, **options)

    @property
    def programs(self) -> int:
        """Number of programs."""
        return math.ceil(self.children / (self.block * self.blocks))

    @property
    def share(self) -> float:
        """Coupling of every pair where all logits are zero."""
        return 1 / (self.parents + self.leaky)

    def pack(self, poses: jax.Array, weights: jax.Array) -> Packed:
        """Poses ``[tiles, I, K, lanes]`` and weights ``[I, K, J, D]``, both float32."""
        missing = self.programs * self.blocks * self.block - self.children
        poses = jnp.pad(poses, ((0, -self.batch % LANES), (0, missing), (0, 0)))
        poses = poses.reshape(-1, LANES, *poses.shape[1:]).transpose(0, 2, 3, 1)
        weights = jnp.pad(weights, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return poses.astype(jnp.float32), weights.astype(jnp.float32)

    def unpack(self, grads: Packed) -> tuple[jax.Array, jax.Array]:
        """The inverse of :meth:`pack`."""
        poses, weights = grads
        poses = poses.transpose(0, 3, 1, 2)
        poses = poses.reshape(-1, *poses.shape[2:])
        return poses[: self.batch, : self.children], weights[: self.children]

    def forward(self, packed: Packed, query: jax.Array) -> jax.Array:
        """The sums with logits from the query, ``[J, B, D]``."""
        queries = to_lanes(query)
        one = queries[0]
        call = self._call(_forward_kernel, out=[], summed=[one], scratch=1)
        return forward_tiles(call, packed, queries, self.batch)

    def backward(
        self, packed: Packed, query: jax.Array, d_sums: jax.Array, grads: Packed
    ) -> tuple[jax.Array, Packed]:
        """The query's gradient, ``[J, B, D]``, and `grads` with those of the arguments added."""
        poses, weights = packed
        queries = to_lanes(query)
        one = queries[0]
        call = self._call(_backward_kernel, out=[poses[0], weights], summed=[one], scratch=2)
        return backward_tiles(call, packed, queries, to_lanes(d_sums), grads, self.batch)

    def _call(
        self,
        kernel: Callable[..., None],
        *,
        out: Sequence[jax.Array],
        summed: Sequence[jax.Array],
        scratch: int,
    ) -> Kernel:
        """The kernel over all programs.

        Args:
          kernel: takes these sweeps, its number and references to what follows, in this order.
          out: like results of which each program writes a part.
          summed: like results of which each program has its own; they are added up.
          scratch: numbers of arrays ``[J, block, lanes]`` of its own.
        """
        memory = [plgpu.SMEM((self.parents, self.block, LANES), jnp.float32)] * scratch
        name = kernel.__name__.strip("_")

        def results_like(*arguments: jax.Array) -> list[jax.ShapeDtypeStruct]:
            shapes = [x.shape for x in out] + [(self.programs, *x.shape) for x in summed]
            # Under shard_map results differ on the axes of the mesh on which an argument does.
            like: list[jax.ShapeDtypeStruct] = jax.eval_shape(
                lambda: [zeros(s, jnp.float32, *arguments) for s in shapes]
            )
            return like

        def call(*arguments: jax.Array) -> tuple[jax.Array, ...]:
            results = plgpu.kernel(
                lambda *refs: kernel(self, lax.axis_index("program"), *refs),
                grid=(self.programs,),
                grid_names=("program",),
                kernel_name=name,
                **_memory(results_like(*arguments), memory),
            )(*arguments)
            # A kernel of this kind does not say itself on which axes of a mesh its numbers differ.
            return tuple(x + zeros((), x.dtype, *arguments) for x in results)

        def interpreted(*arguments: jax.Array) -> tuple[jax.Array, ...]:
            results = pl.pallas_call(
                lambda *refs: kernel(self, pl.program_id(0), *refs),
                out_shape=results_like(*arguments),
                scratch_shapes=memory,
                grid=(self.programs,),
                name=name,
                interpret=True,
            )(*arguments)
            return tuple(results)

        run = interpreted if self.interpret else only_on("cuda", "pallas_gpu", call)

        def added(*arguments: jax.Array) -> tuple[jax.Array, ...]:
            results = run(*arguments)
            return *results[: len(out)], *(x.sum(0) for x in results[len(out) :])

        return added


def _memory(results: Sequence[jax.ShapeDtypeStruct], scratch: Sequence[Any]) -> dict[str, Any]:
    """Arguments of ``plgpu.kernel``, which were renamed in jax 0.10.2."""
    if "out_type" in inspect.signature(plgpu.kernel).parameters:
        return {"out_type": results, "scratch_types": scratch}
    return {"out_shape": results, "scratch_shapes": scratch}


def _compute_capability() -> float:
    """Of this machine's GPUs; infinite where it has none, and compiles for others."""
    if jax.default_backend() != "gpu":
        return math.inf
    return float(jax.devices()[0].compute_capability)


def _forward_kernel(
    sweeps: GpuKernels,
    program: jax.Array,
    u: Any,
    weights: Any,
    query: Any,
    sums: Any,
    logits: Any,
) -> None:
    _clear(sweeps, sums.at[program])

    @_for_each_block(sweeps, program)
    def _(first: jax.Array) -> None:
        @_for_each(sweeps.parents)
        def _(j: jax.Array) -> None:
            _contract(sweeps, u, weights, _vectors(query, j), first, j, logits)

        _softmax(sweeps, logits)

        @_for_each(sweeps.parents)
        def _(j: jax.Array) -> None:
            def child(i: jax.Array, total: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                return _weigh(u, weights, first + i, j, logits[j, i], total)

            total = lax.fori_loop(0, sweeps.block, child, _vectors(sums.at[program], j))
            for d, x in enumerate(total):
                sums[program, j, d] = x


def _backward_kernel(
    sweeps: GpuKernels,
    program: jax.Array,
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
    _clear(sweeps, d_query.at[program])

    @_for_each_block(sweeps, program)
    def _(first: jax.Array) -> None:
        @_for_each(sweeps.parents)
        def _(j: jax.Array) -> None:
            _contract(sweeps, u, weights, _vectors(query, j), first, j, coupling)
            _contract(sweeps, u, weights, _vectors(d_sums, j), first, j, d_logits)

        _softmax(sweeps, coupling)

        @_for_each(sweeps.block)
        def _(i: jax.Array) -> None:
            mean = lax.fori_loop(
                0, sweeps.parents, lambda j, x: x + coupling[j, i] * d_logits[j, i], _zero(sweeps)
            )

            @_for_each(sweeps.parents)
            def _(j: jax.Array) -> None:
                d_logits[j, i] = coupling[j, i] * (d_logits[j, i] - mean)

            @_for_each(u.shape[1])
            def _(k: jax.Array) -> None:
                d_u[first + i, k] = _zero(sweeps)

        @_for_each(sweeps.parents)
        def _(j: jax.Array) -> None:
            v, d_s = _vectors(query, j), _vectors(d_sums, j)

            def child(i: jax.Array, total: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                c, d_l = coupling[j, i], d_logits[j, i]
                d_vote = tuple(c * x for x in d_s)
                if not sweeps.stop_gradient:
                    d_vote = tuple(x + d_l * y for x, y in zip(d_vote, v, strict=True))
                    total = _weigh(u, weights, first + i, j, d_l, total)

                @_for_each(u.shape[1])
                def _(k: jax.Array) -> None:
                    pose = u[first + i, k]
                    d_u[first + i, k] += _dot(weights, first + i, k, j, d_vote)
                    for d, x in enumerate(d_vote):
                        d_weights[first + i, k, j, d] = jnp.sum(pose * x)

                return total

            total = lax.fori_loop(0, sweeps.block, child, _vectors(d_query.at[program], j))
            for d, x in enumerate(total):
                d_query[program, j, d] = x


def _for_each(number: int) -> Callable[[Callable[[jax.Array], None]], None]:
    def run(body: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(0, number, lambda n, _: body(n), None)

    return run


def _for_each_block(
    sweeps: GpuKernels, program: jax.Array
) -> Callable[[Callable[[jax.Array], None]], None]:
    """Of one program, by the first child."""
    start = program * sweeps.blocks

    def run(body: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(0, sweeps.blocks, lambda n, _: body((start + n) * sweeps.block), None)

    return run


def _zero(sweeps: GpuKernels) -> jax.Array:
    """A vector of zeros, laid out as what it is added to."""
    none = jnp.zeros(LANES, jnp.float32)
    if sweeps.interpret:
        return none
    laid_out: jax.Array = plgpu.layout_cast(none, plgpu.Layout.WG_STRIDED((LANES,), vec_size=1))
    return laid_out


def _clear(sweeps: GpuKernels, sums: Any) -> None:
    @_for_each(sweeps.parents)
    def _(j: jax.Array) -> None:
        for d in range(sums.shape[1]):
            sums[j, d] = _zero(sweeps)


def _vectors(x: Any, j: jax.Array) -> tuple[jax.Array, ...]:
    """One parent's components, each ``[lanes]``."""
    return tuple(x[j, d] for d in range(x.shape[1]))


def _dot(
    weights: Any, child: jax.Array, k: jax.Array, j: jax.Array, vector: tuple[jax.Array, ...]
) -> jax.Array:
    """Scalar products over D."""
    total = weights[child, k, j, 0] * vector[0]
    for d, x in enumerate(vector[1:], 1):
        total += weights[child, k, j, d] * x
    return total


def _contract(
    sweeps: GpuKernels,
    u: Any,
    weights: Any,
    vector: tuple[jax.Array, ...],
    first: jax.Array,
    j: jax.Array,
    out: Any,
) -> None:
    """Scalar products of a block's votes with a vector, to ``out[j]``."""

    @_for_each(sweeps.block)
    def _(i: jax.Array) -> None:
        def feature(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + u[first + i, k] * _dot(weights, first + i, k, j, vector)

        out[j, i] = lax.fori_loop(0, u.shape[1], feature, _zero(sweeps))


def _weigh(
    u: Any,
    weights: Any,
    child: jax.Array,
    j: jax.Array,
    factor: jax.Array,
    total: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Adds a child's vote times a factor."""

    def feature(k: jax.Array, total: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weighed = factor * u[child, k]
        return tuple(x + weights[child, k, j, d] * weighed for d, x in enumerate(total))

    result: tuple[jax.Array, ...] = lax.fori_loop(0, u.shape[1], feature, total)
    return result


def _softmax(sweeps: GpuKernels, x: Any) -> None:
    """Replaces ``[J, block, lanes]`` by its softmax over the parents."""

    @_for_each(sweeps.block)
    def _(i: jax.Array) -> None:
        lowest = _zero(sweeps) if sweeps.leaky else x[0, i]
        highest = lax.fori_loop(0, sweeps.parents, lambda j, m: jnp.maximum(m, x[j, i]), lowest)

        def exponential(j: jax.Array, total: jax.Array) -> jax.Array:
            x[j, i] = jnp.exp(x[j, i] - highest)
            return total + x[j, i]

        none = jnp.exp(-highest) if sweeps.leaky else _zero(sweeps)
        total = lax.fori_loop(0, sweeps.parents, exponential, none)

        @_for_each(sweeps.parents)
        def _(j: jax.Array) -> None:
            x[j, i] = x[j, i] / total
