"""Argument checks shared by the layers; errors name the argument."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from capsjax.ops._checks import check_callable


def check_rngs(rngs: Any) -> None:
    """Raises a TypeError unless `rngs` has a stream for parameters."""
    if not callable(getattr(rngs, "params", None)):
        raise TypeError(
            "rngs must be an nnx.Rngs with a stream for params, such as nnx.Rngs(0), got"
            f" {type(rngs).__name__}"
        )


def check_numerics(dtype: Dtype | None, param_dtype: Dtype, precision: PrecisionLike) -> None:
    """Raises unless the dtypes are floating point and XLA knows the precision."""
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if name == "dtype" and value is None:
            continue
        try:
            is_floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
        except TypeError:
            is_floating = False
        if value is None or not is_floating:
            raise TypeError(f"{name} must be a floating-point dtype, got {value!r}")
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(functools.partial(jnp.matmul, precision=precision), x, x)
    except (TypeError, ValueError):
        raise ValueError(
            f"precision must be None or a precision of JAX's products, such as 'highest', got"
            f" {precision!r}"
        ) from None


def named_inits(**inits: Any) -> list[Initializer]:
    """Returns initialisers that raise an error with their name unless their result fits."""
    check_callable(**inits)
    return [functools.partial(_initialise, name, init) for name, init in inits.items()]


def _initialise(
    name: str, init: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Dtype
) -> Any:
    result = init(key, shape, dtype)
    # Metadata, such as a sharding, may come with the array.
    array = getattr(result, "raw_value", result)
    found = getattr(array, "dtype", type(array).__name__)
    if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must return a floating-point array, got {found}")
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must return an array of shape {tuple(shape)}, got {array.shape}")
    return result


def as_constant(name: str, value: Any) -> Any:
    """Returns an option with a scalar array as a Python number, or raises unless it is hashable."""
    try:
        constant = value.item() if getattr(value, "ndim", None) == 0 else value
        hash(constant)
    except (TypeError, NotImplementedError):  # the latter for random keys
        what = type(value).__name__
        raise TypeError(f"{name} must be a number or hashable, got {what}") from None
    return constant
