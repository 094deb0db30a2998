"""The kernel behind :mod:`capsjax.ops.gathered`: matrix products whose blocks are gathered.

A program computes one tile. One of its three warp groups copies blocks to shared memory; the other
two multiply them, 64 rows each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu

from capsjax.ops import _hopper
from capsjax.ops.gathered import LINE, ROWS, Plan

mosaic_gpu: Any = _mosaic_gpu  # its types differ between releases

# Groups that multiply, each with its part of a tile's rows.
_WARP_GROUPS = 2
# Blocks in shared memory, of which some are copied while others are multiplied.
_STAGES = 4


class _Operand(NamedTuple):
    """A factor as a two-dimensional array of blocks.

    Attributes:
      array: what the blocks are of.
      block: their rows and columns.
      place: row and column of a block, from the number that the table has, the tile's number along
        the operand's own axis, and the number of the block along the axis of the sums.
      is_transposed: whether blocks have the axis of the sums where a product would not have it.
    """

    array: jax.Array
    block: tuple[int, int]
    place: Callable[[Any, Any, Any], tuple[Any, Any]]
    is_transposed: bool


def gathered_product(plan: Plan, x: jax.Array, y: jax.Array, *, interpret: bool) -> jax.Array:
    """Computes the plan's result.

    Args:
      plan: which blocks are multiplied.
      x: images or features, ``[B, numbers, channels]``, in whole blocks.
      y: the kernel ``[taps, C, O]``, or features.
      interpret: whether the kernel is simulated on a CPU.

    Returns:
      Images or features ``[B, numbers * channels]``, or the kernel ``[taps * C, O]``.
    """
    left, right = _operands(plan, x, y)
    numbers = int(plan.tasks[:, 3].max()) + 1
    if plan.result == "kernel":
        shape = (numbers * x.shape[2], y.shape[2])
    else:
        shape = (x.shape[0], numbers * y.shape[1 if plan.result == "images" else 2])
    dtype = x.dtype if plan.parts == 1 else jnp.dtype(jnp.float32)
    rows, written = ROWS // _WARP_GROUPS, LINE // dtype.itemsize
    across, down = shape[1] // numbers // plan.columns, shape[0] // numbers // ROWS

    def program(left_ref: Any, right_ref: Any, tasks: Any, pairs: Any, out: Any, tile: Any) -> None:
        group, number = lax.axis_index("group"), lax.axis_index("program")
        part, row, column, target, first, count = (tasks[number, n] for n in range(6))

        def index(operand: _Operand, factor: int, tile_number: Any) -> Callable[[Any], Any]:
            def of(step: Any) -> tuple[Any, Any]:
                blocks = jnp.int32(plan.blocks)
                pair, block = lax.div(step, blocks), lax.rem(step, blocks)
                return operand.place(pairs[first + pair, factor], tile_number, block)

            return of

        def step(_: Any, left_block: Any, right_block: Any, sums: Any) -> Any:
            own = pl.ds(group * rows, rows)
            a = left_block.at[:, own] if left.is_transposed else left_block.at[own]
            mosaic_gpu.wgmma(
                sums,
                a.transpose((1, 0)) if left.is_transposed else a,
                right_block.transpose((1, 0)) if right.is_transposed else right_block,
            )
            mosaic_gpu.wgmma_wait(1)
            return sums

        def compute(pipeline: Callable[[Any], None]) -> None:
            def scope(sums: Any) -> None:
                pipeline(sums)
                values = sums[...].astype(dtype)
                if plan.result == "kernel":
                    top, side = (target * down + row) * ROWS, column * plan.columns
                else:
                    top, side = row * ROWS, (target * across + column) * plan.columns
                for n in range(plan.columns // written):
                    slot = n % 2
                    mosaic_gpu.wait_smem_to_gmem(1, wait_read_only=True)
                    tile[group, slot] = values[:, n * written : (n + 1) * written]
                    mosaic_gpu.commit_smem()
                    place = (
                        pl.ds(top + group * rows, rows),
                        pl.ds(side + n * written, written),
                    )
                    mosaic_gpu.copy_smem_to_gmem(tile.at[group, slot], out.at[part, *place])

            pl.run_scoped(scope, mosaic_gpu.ACC((rows, plan.columns), jnp.float32))

        mosaic_gpu.emit_pipeline_warp_specialized(
            step,
            grid=(count * plan.blocks,),
            memory_registers=40,
            in_specs=[
                _spec(left, index(left, 0, row)),
                _spec(right, index(right, 1, column)),
            ],
            wg_axis="group",
            num_compute_wgs=_WARP_GROUPS,
            max_concurrent_steps=_STAGES,
            compute_context=compute,
        )(left_ref, right_ref)
        mosaic_gpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = mosaic_gpu.SMEM(
        (_WARP_GROUPS, 2, rows, written), dtype, transforms=_swizzled(written, dtype)
    )
    call = mosaic_gpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((plan.parts, *shape), dtype),
        scratch_types=[scratch],
        grid=(len(plan.tasks),),
        grid_names=("program",),
        num_threads=_WARP_GROUPS + 1,
        thread_name="group",
        kernel_name=f"capsjax_conv_{plan.result}",
        interpret=mosaic_gpu.InterpretGPUParams() if interpret else None,
    )
    products = int(plan.tasks[:, 5].sum()) * plan.blocks
    with _hopper.record_flops(2 * products * ROWS * plan.inner * plan.columns):
        parts = call(left.array, right.array, jnp.asarray(plan.tasks), jnp.asarray(plan.pairs))
    result: jax.Array = parts[0] if plan.parts == 1 else jnp.sum(parts, axis=0)
    return result.astype(x.dtype)


def _operands(plan: Plan, x: jax.Array, y: jax.Array) -> tuple[_Operand, _Operand]:
    """Blocks of both factors. Those of float32 must have the axis of the sums last."""
    columns, inner, blocks = plan.columns, plan.inner, plan.blocks
    is_wide = x.dtype == jnp.float32
    flat = x.reshape(x.shape[0], -1)
    if plan.result == "kernel":
        x_tiles, y_tiles = x.shape[2] // ROWS, y.shape[2] // columns
        features = y.reshape(y.shape[0], -1)
        if is_wide:
            return (
                _Operand(flat.T, (ROWS, inner), lambda n, t, k: (n * x_tiles + t, k), False),
                _Operand(features.T, (columns, inner), lambda n, t, k: (n * y_tiles + t, k), True),
            )
        return (
            _Operand(flat, (inner, ROWS), lambda n, t, k: (k, n * x_tiles + t), True),
            _Operand(features, (inner, columns), lambda n, t, k: (k, n * y_tiles + t), False),
        )
    left = _Operand(flat, (ROWS, inner), lambda n, t, k: (t, n * blocks + k), False)
    if plan.result == "features" and not is_wide:
        kernel = y.reshape(-1, y.shape[2])
        return left, _Operand(kernel, (inner, columns), lambda n, t, k: (n * blocks + k, t), False)
    if plan.result == "features":
        y = y.transpose(0, 2, 1)
    tiles = y.shape[1] // columns
    kernel = y.reshape(-1, y.shape[2])
    return left, _Operand(kernel, (columns, inner), lambda n, t, k: (n * tiles + t, k), True)


def _spec(operand: _Operand, index: Callable[[Any], Any]) -> Any:
    return mosaic_gpu.BlockSpec(
        operand.block,
        index,
        transforms=_swizzled(operand.block[1], operand.array.dtype),
        memory_space=mosaic_gpu.SMEM,
        delay_release=1,
    )


def _swizzled(columns: int, dtype: jnp.dtype) -> tuple[Any, ...]:
    """The layout in shared memory that matrix units read without conflicts."""
    line = min(LINE, columns * dtype.itemsize)
    return (
        mosaic_gpu.TilingTransform((8, line // dtype.itemsize)),
        mosaic_gpu.SwizzleTransform(line),
    )
