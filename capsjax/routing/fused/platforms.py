"""Kernels that are for one kind of accelerator only."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from capsjax.ops._checks import zeros

_unavailable = Primitive("capsjax_unavailable")
_unavailable.multiple_results = True


def only_on(
    platform: str, name: str, kernel: Callable[..., tuple[jax.Array, ...]]
) -> Callable[..., tuple[jax.Array, ...]]:
    """A kernel that a program may hold only if it is compiled for one platform.

    Args:
      platform: such as ``"tpu"``.
      name: of the implementation, for the message.
      kernel: from arrays to a tuple of arrays.

    Returns:
      A function like the kernel. Which platform a program is compiled for is known only when it is
      lowered: then, not while it is traced, another one raises a NotImplementedError.
    """

    def without(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        like = jax.eval_shape(kernel, *arguments)
        shapes = tuple((x.shape, x.dtype) for x in like)
        found: list[jax.Array] = _unavailable.bind(
            *arguments, shapes=shapes, name=name, platform=platform
        )
        # Under shard_map the branches have to differ on the same axes of the mesh.
        return tuple(x + zeros((), x.dtype, *arguments) for x in found)

    return lambda *arguments: lax.platform_dependent(
        *arguments, **{platform: kernel}, default=without
    )


def _shapes(*arguments: Any, shapes: Any, name: str, platform: str) -> Any:
    del arguments, name, platform
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes]


def _raise(context: Any, *arguments: Any, shapes: Any, name: str, platform: str) -> Any:
    del arguments, shapes
    compiled_for = ", ".join(context.module_context.platforms)
    raise NotImplementedError(
        f"implementation {name!r} is for {platform} only, the program is compiled for"
        f" {compiled_for}"
    )


def _batched(arguments: Any, axes: Any, *, shapes: Any, **options: Any) -> Any:
    size = next(x.shape[a] for x, a in zip(arguments, axes, strict=True) if a is not None)
    shapes = tuple(((size, *shape), dtype) for shape, dtype in shapes)
    return _unavailable.bind(*arguments, shapes=shapes, **options), [0] * len(shapes)


_unavailable.def_abstract_eval(_shapes)
mlir.register_lowering(_unavailable, _raise)
batching.primitive_batchers[_unavailable] = _batched
