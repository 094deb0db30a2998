"""Argument checks and numerics that the pure functions share; errors name the argument."""

import jax
import jax.numpy as jnp
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
