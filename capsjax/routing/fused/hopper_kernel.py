"""The Pallas kernel of :mod:`capsjax.routing.fused.mosaic_gpu`.

It is imported when a program is lowered for an NVIDIA GPU, and only then.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from capsjax.ops import _hopper
from capsjax.routing.fused.hopper_sizes import STAGES, TILE, WARPGROUPS, Sizes

plgpu: Any = mosaic_gpu  # its types differ between releases
_WGMMA = plgpu.Layout.WGMMA


# Compiled as one function, so that the sweeps of all iterations share one kernel.
@functools.partial(jax.jit, static_argnames=("leaky", "interpret"))
def sweep(
    poses: jax.Array,
    weights: jax.Array,
    *queries: jax.Array,
    leaky: bool,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Does the same as :func:`capsjax.routing.fused.sweep_primitive.plain`."""
    number, children, batch, _ = poses.shape
    parents, features = weights.shape[2:4]
    sizes = Sizes.of(poses.shape, weights.shape, len(queries))
    columns = parents * sizes.features
    poses = _padded(poses, (number, sizes.children, sizes.batch, sizes.in_features))
    weights = _padded(weights, (number, sizes.children, parents, sizes.features, sizes.in_features))
    tiles = [_padded(x, (number, sizes.batch, parents, sizes.features)) for x in queries]
    backward = len(tiles) == 2

    def program(*refs: Any) -> None:
        inputs, refs = refs[: 2 + len(tiles)], refs[2 + len(tiles) :]
        sums_ref, *pair_refs = refs[: 3 if backward else 1]
        *shared, tile_barrier, barriers = refs[3 if backward else 1 :]
        tile, group, warpgroup = (lax.axis_index(name) for name in ("tile", "group", "warpgroup"))
        rows = pl.ds(TILE * tile, TILE)
        # Each warpgroup copies its part of the queries, and its own children.
        part = TILE // WARPGROUPS
        here = pl.ds(part * warpgroup, part)
        there = pl.ds(sizes.batch * (group // sizes.groups) + TILE * tile + part * warpgroup, part)
        for source, target in zip(inputs[2:], shared[2:], strict=True):
            plgpu.copy_gmem_to_smem(source.at[there], target.at[here], tile_barrier)
        first = sizes.group // WARPGROUPS * warpgroup
        stage = sizes.group // (WARPGROUPS * STAGES)
        for n in range(STAGES):
            at, barrier = first + stage * n, barriers.at[STAGES * warpgroup + n]
            here, there = pl.ds(at, stage), pl.ds(sizes.group * group + at, stage)
            plgpu.copy_gmem_to_smem(inputs[0].at[there, rows], shared[0].at[here], barrier)
            plgpu.copy_gmem_to_smem(inputs[1].at[there], shared[1].at[here], barrier)
        plgpu.barrier_wait(tile_barrier)

        def child(i: jax.Array, total: jax.Array) -> jax.Array:
            votes = _votes(shared[0].at[i], shared[1].at[i], columns)
            along = [_dots(votes * _load(x), parents) for x in shared[2:]]
            coupling = factors = _softmax(along[0], leaky)
            if backward:
                mean = _total([c * d for c, d in zip(coupling, along[1], strict=True)])
                factors = [c * (d - mean) for c, d in zip(coupling, along[1], strict=True)]
                for ref, pairs in zip(pair_refs, (coupling, factors), strict=True):
                    ref[sizes.group * group + i, rows] = _columns(pairs, ref.shape[-1])
            return total + _spread(factors, sizes.features) * votes

        def copied(n: jax.Array, total: jax.Array) -> jax.Array:
            plgpu.barrier_wait(barriers.at[STAGES * warpgroup + n])
            at = first + stage * n
            return lax.fori_loop(at, at + stage, child, total)

        none = plgpu.layout_cast(jnp.full((TILE, columns), 0, jnp.float32), _WGMMA)
        sums_ref[WARPGROUPS * group + warpgroup, rows] = lax.fori_loop(0, STAGES, copied, none)

    pairs = (number * sizes.children, sizes.batch, 8 * math.ceil(parents / 8))
    partial_sums = (number * sizes.groups * WARPGROUPS, sizes.batch, columns)
    call = plgpu.kernel(
        program,
        out_type=[
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in (partial_sums, *[pairs] * (2 * backward))
        ],
        scratch_types=[
            _operand(sizes.group, TILE, sizes.in_features),
            _operand(sizes.group, columns, sizes.in_features),
            *[_tile(columns)] * len(tiles),
            plgpu.Barrier(num_arrivals=WARPGROUPS * len(tiles)),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS * STAGES),
        ],
        grid=(sizes.batch // TILE, number * sizes.groups),
        grid_names=("tile", "group"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        kernel_name="routing_backward" if backward else "routing_forward",
        interpret=interpret,
    )
    with _hopper.record_flops(2 * poses.size * columns):
        sums, *others = call(
            poses.reshape(-1, *poses.shape[2:]),
            weights.reshape(-1, columns, sizes.in_features),
            *(x.reshape(-1, columns) for x in tiles),
        )
    sums = jnp.sum(sums.reshape(number, -1, sizes.batch, parents, sizes.features), axis=1)
    others = [x.reshape(number, -1, *pairs[1:])[:, :children, :batch, :parents] for x in others]
    return sums[:, :batch, :, :features], *others


def _padded(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, size - have) for size, have in zip(shape, x.shape, strict=True)])


def _operand(children: int, rows: int, in_features: int) -> Any:
    """Factors of the votes in shared memory, in the layout that matrix instructions read."""
    transforms = plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32)
    return plgpu.SMEM((children, rows, in_features), jnp.float32, transforms=transforms)


def _tile(columns: int) -> Any:
    """A tile of queries in shared memory."""
    width = next(n for n in (32, 16, 8) if columns % n == 0)
    transforms = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(4 * width)
    return plgpu.SMEM((TILE, columns), jnp.float32, transforms=transforms)


def _votes(poses: Any, weights: Any, columns: int) -> jax.Array:
    """Votes ``[TILE, J * D]`` of one child, of factors rounded to TF32."""

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, poses, weights.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC((TILE, columns), jnp.float32))


def _load(ref: Any) -> jax.Array:
    return plgpu.layout_cast(ref[...], _WGMMA)


def _dots(products: jax.Array, parents: int) -> list[jax.Array]:
    """Sums over the dimensions of each parent."""
    size = products.shape[1] // parents
    return [
        jnp.sum(lax.slice(products, (0, size * j), (TILE, size * (j + 1))), axis=1)
        for j in range(parents)
    ]


def _spread(factors: Sequence[jax.Array], features: int) -> jax.Array:
    """Repeats the factor of each parent over its dimensions."""
    shape = (TILE, features)
    return lax.concatenate([lax.broadcast_in_dim(x, shape, [0]) for x in factors], 1)


def _columns(factors: Sequence[jax.Array], width: int) -> jax.Array:
    """Puts the factor of each parent into its column, so that stores are contiguous."""
    shape = (TILE, width)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_WGMMA)
    result = plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), _WGMMA)
    for j, x in enumerate(factors):
        result = jnp.where(column == j, lax.broadcast_in_dim(x, shape, [0]), result)
    return result


def _softmax(logits: Sequence[jax.Array], leaky: bool) -> list[jax.Array]:
    highest = functools.reduce(jnp.maximum, logits)
    if leaky:
        highest = jnp.maximum(highest, 0.0)
    exponentials = [jnp.exp(x - highest) for x in logits]
    total = _total(exponentials)
    if leaky:
        total = total + jnp.exp(-highest)
    inverse = 1.0 / total
    return [x * inverse for x in exponentials]


def _total(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)
