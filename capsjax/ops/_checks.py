"""Argument checks and numerics that the pure functions share; errors name the argument."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def as_floating(name: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as an array, or raises a TypeError if it is not floating point."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got dtype {array.dtype}")
    return array


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype for norms, sums and softmaxes over `dtype`: float32 or wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def safe_sqrt(squared: jax.Array) -> jax.Array:
    """Square root of a sum of squares, with value and gradient zero where the sum underflows."""
    positive = squared >= jnp.finfo(squared.dtype).tiny
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def broadcast(name: str, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns `array` broadcast to `shape`, or raises a ValueError that names the argument."""
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to {shape}, got shape {array.shape}") from None


def as_mask(name: str, value: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns `value` as a bool array broadcast to `shape`, or raises."""
    mask = jnp.asarray(value)
    if mask.dtype != bool:
        raise TypeError(f"{name} must be a bool array, got dtype {mask.dtype}")
    return broadcast(name, mask, shape)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, *like: jax.Array | None) -> jax.Array:
    """Returns zeros that vary over every mesh axis over which one of the arrays varies.

    A loop under ``shard_map`` needs an initial carry of the type that its body returns.
    """
    result = jnp.zeros(shape, dtype)
    for array in like:
        if array is not None:
            result = result + jnp.zeros_like(array, dtype, shape)
    return result


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def spatial_sizes(
    name: str, value: int | Sequence[int], kernel_size: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Returns a positive integer for each axis of a kernel, whose own sizes need no `kernel_size`.

    One integer is meant for all axes, of which a kernel without other sizes has two.
    """
    rank = 2 if kernel_size is None else len(kernel_size)
    sizes = tuple(value) if isinstance(value, Sequence | np.ndarray) else (value,) * rank
    fits = kernel_size is None or len(sizes) == rank
    if not fits or not sizes or not all(is_integer(size) and size > 0 for size in sizes):
        axis = "spatial axis" if kernel_size is None else f"axis of kernel_size {kernel_size}"
        raise ValueError(
            f"{name} must be a positive integer or a sequence of one for each {axis}, got {value!r}"
        )
    return tuple(map(int, sizes))


def spatial_padding(
    padding: Any, kernel_size: Sequence[int], names: Sequence[str]
) -> str | tuple[tuple[int, int], ...]:
    """Returns the name of a padding, or (low, high) for each axis of a kernel."""
    if isinstance(padding, str):
        if padding.upper() in names:
            return padding.upper()
    else:
        each = padding if isinstance(padding, Sequence) else [padding] * len(kernel_size)
        pairs = [tuple(p) if isinstance(p, Sequence) else (p, p) for p in each]
        if len(pairs) == len(kernel_size) and all(
            len(pair) == 2 and all(map(is_integer, pair)) for pair in pairs
        ):
            return tuple((int(low), int(high)) for low, high in pairs)
    raise ValueError(
        f"padding must be one of {', '.join(names)}, an integer, or a sequence of integers or (low,"
        f" high), one for each axis of kernel_size {kernel_size}, got {padding!r}"
    )


def spatial_axes(num_spatial_dims: int) -> str:
    """Names the spatial axes in shapes that messages give."""
    names = {1: "L", 2: "H, W", 3: "Z, H, W"}
    return names.get(num_spatial_dims, f"{num_spatial_dims} spatial axes")
