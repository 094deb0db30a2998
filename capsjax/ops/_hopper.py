"""Whether a program that is being lowered can hold kernels for Hopper GPUs, such as H100."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

# Of chips with warp-group products: newer ones have others.
_CAPABILITY = 9.0

Function = Callable[..., Any]


def register(primitive: Primitive, kernel: Function, otherwise: Function) -> None:
    """Registers how a primitive is lowered: for NVIDIA GPUs, and not for other platforms.

    Nothing of it is traced, nor is Pallas imported, when a program is for another platform.

    Args:
      primitive: with one or several results.
      kernel: computes the results by a kernel for Hopper GPUs; takes arrays and the primitive's
        parameters.
      otherwise: the same by XLA alone, for other GPUs, and for programs that XLA divides among
        devices, as it cannot divide a kernel.
    """
    several = primitive.multiple_results
    rules = [mlir.lower_fun(f, multiple_results=several) for f in (kernel, otherwise)]

    def lower(context: mlir.LoweringRuleContext, *arguments: Any, **parameters: Any) -> Any:
        return rules[0 if _fits(context) else 1](context, *arguments, **parameters)

    def refuse(context: mlir.LoweringRuleContext, *_: Any, **parameters: Any) -> Any:
        raise NotImplementedError(
            "implementation 'mosaic_gpu' is for NVIDIA GPUs, the program is compiled for"
            f" {', '.join(context.module_context.platforms)}"
        )

    mlir.register_lowering(primitive, refuse)
    mlir.register_lowering(primitive, lower, platform="cuda")


def allows_tf32(precision: jax.lax.PrecisionLike) -> bool:
    """Whether float32 factors of a matrix product may be rounded to TF32."""
    if precision is None:
        precision = jax.config.values["jax_default_matmul_precision"]
    return precision in (None, "default", "tensorfloat32", jax.lax.Precision.DEFAULT)


def call(
    body: Function, out: Any, scratch: Sequence[Any], *, interpret: bool = False, **options: Any
) -> Function:
    """``pallas.mosaic_gpu.kernel``, whose arguments were renamed after jax 0.10.1."""
    from jax.experimental.pallas import mosaic_gpu

    names = ("out_type", "scratch_types")
    if names[0] not in inspect.signature(mosaic_gpu.kernel).parameters:
        names = ("out_shape", "scratch_shapes")
    if interpret:
        # jax 0.10.1 has no such simulation.
        options["interpret"] = mosaic_gpu.InterpretGPUParams()  # type: ignore[attr-defined]
    kernel: Function = mosaic_gpu.kernel(
        body, **dict(zip(names, (out, scratch), strict=True)), **options
    )
    return kernel


def transpose(reference: Any) -> Any:
    """A reference to a matrix in shared memory, transposed."""
    if hasattr(reference, "transpose"):
        return reference.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu  # jax 0.10.1

    return mosaic_gpu.transpose_ref(reference, (1, 0))


def _fits(context: mlir.LoweringRuleContext) -> bool:
    axes: Any = context.module_context.axis_context
    if getattr(axes, "num_devices", 1) > 1:
        return False
    mesh = getattr(axes, "mesh", None)
    if mesh is not None and set(axes.manual_axes) != set(mesh.axis_names):
        return False
    devices = getattr(axes, "device_assignment", None) or getattr(mesh, "devices", None)
    if devices is not None:
        first = devices[0] if isinstance(devices, tuple) else devices.flat[0]
        return _capability_of(first) == _CAPABILITY
    return _capability_here() == _CAPABILITY


def _capability_of(device: jax.Device) -> float:
    return float(getattr(device, "compute_capability", _CAPABILITY))


@functools.cache
def _capability_here() -> float:
    """Of this machine's GPUs; that of Hopper where it has none, and compiles for others."""
    if jax.default_backend() != "gpu":
        return _CAPABILITY
    return _capability_of(jax.local_devices()[0])
