"""Kernels for NVIDIA's Hopper GPUs, such as H100: where they run, and how they are lowered.

``lax.platform_dependent`` traces its branches for every platform. As a primitive, a kernel is
traced when a program for NVIDIA GPUs is lowered; other programs import nothing of Pallas.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

# The kernels' matrix instructions exist in no earlier and no later GPU.
_CAPABILITY = "9.0"

# Attribute of a kernel's call in the text of a program, see record_flops.
FLOPS = "capsjax_flops"

Function = Callable[..., Any]
_absent: jax.Device | None = None


def register(primitive: Primitive, choose: Callable[..., tuple[Function, Function | None]]) -> None:
    """Registers how a primitive is lowered.

    Args:
      primitive: with one or several results.
      choose: from the primitive's parameters, the kernel, and what takes its place where it does
        not run; None for a NotImplementedError there.
    """

    def lower(context: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
        kernel, otherwise = choose(**parameters)
        reason = _why_not(context)
        if reason is not None and otherwise is None:
            raise NotImplementedError(f"implementation 'mosaic_gpu' {reason}")
        function = kernel if reason is None or otherwise is None else otherwise
        # A kernel knows nothing of mesh axes over which its arguments vary.
        shapes = [_shape(x) for x in context.avals_in]
        rule = mlir.lower_fun(function, multiple_results=primitive.multiple_results)
        return rule(context.replace(avals_in=shapes), *operands)

    mlir.register_lowering(primitive, lower)
    # Programs for several platforms have one of each.
    mlir.register_lowering(primitive, lower, platform="cuda")


def why_not_here() -> str | None:
    """Why kernels do not run on this machine's GPU, or the absent one; None if they do."""
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or later, got {jax.__version__}"
    if jax.default_backend() == "gpu":
        return _why_not_on(jax.devices()[0])
    return _why_not_on(_absent) if _absent is not None else None


def record_flops(flops: float) -> AbstractContextManager[None]:
    """Within the context, the text of a program states how many operations a kernel's call takes.

    Args:
      flops: operations of its matrix products.
    """
    from jax.experimental.xla_metadata import set_xla_metadata

    context: AbstractContextManager[None] = set_xla_metadata(**{FLOPS: f"{flops:.6g}"})
    return context


def compile_for(device: jax.Device) -> None:
    """Tells for which absent GPU programs are compiled from now on; otherwise it is a Hopper GPU.

    The lowering of a program for one device does not know it.
    """
    global _absent
    _absent = device


def allows_tf32(precision: lax.PrecisionLike) -> bool:
    """Whether float32 factors of matrix products may be rounded to TF32."""
    if precision is None:
        precision = jax.config.values["jax_default_matmul_precision"]
    return precision in (None, "default", "fastest", "tensorfloat32", lax.Precision.DEFAULT)


def _shape(aval: Any) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(aval.shape, aval.dtype)


def _why_not(context: Any) -> str | None:
    """Why a program cannot have kernels, as far as its lowering tells; otherwise None."""
    platforms = context.platforms or context.module_context.platforms
    if tuple(platforms) != ("cuda",):
        return f"needs an NVIDIA GPU, but the program is compiled for {', '.join(platforms)}"
    if context.module_context.lowering_parameters.for_export:
        return "is for Hopper GPUs only, but an exported program runs on any GPU"
    axes = context.module_context.axis_context
    mesh = getattr(axes, "mesh", None)
    is_partitioned = mesh is not None and set(axes.manual_axes) != set(mesh.axis_names)
    if getattr(axes, "num_devices", 1) > 1 or is_partitioned:
        return "runs on several devices under shard_map or pmap only: XLA cannot partition it"
    if isinstance(mesh, jax.sharding.Mesh):
        return _why_not_on(mesh.devices.flat[0])
    return why_not_here()


def _why_not_on(device: jax.Device) -> str | None:
    capability = getattr(device, "compute_capability", _CAPABILITY)
    if capability == _CAPABILITY:
        return None
    return (
        f"needs compute capability {_CAPABILITY} (Hopper), got {capability} ({device.device_kind})"
    )
