"""Argument checks and numerics shared by the pure functions; errors name the argument."""

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_MOST = 2**31 - 1


def as_array(name: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as an array, or raises a TypeError."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        if isinstance(value, np.ndarray):
            message = f"{name} must be an array of numbers or bools, got dtype {value.dtype}"
        else:
            what = "None" if value is None else type(value).__name__
            message = f"{name} must be an array, got {what}"
        raise TypeError(message) from None


def as_floating(name: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as an array, or raises a TypeError if it is not floating point."""
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got dtype {array.dtype}")
    return array


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype for norms, sums and softmaxes over `dtype`: float32 or wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def selection_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Returns the precision of products of a matrix of zeros and ones with float32 numbers.

    The numbers were computed from numbers of `dtype`. On TPUs HIGHEST takes six passes; the three
    of HIGH keep 16 bits of each number, twice those of bfloat16. On GPUs HIGH is TF32, with 11.
    """
    narrow = jnp.finfo(dtype).nmant <= jnp.finfo(jnp.bfloat16).nmant
    return jax.lax.Precision.HIGH if narrow else jax.lax.Precision.HIGHEST


def safe_sqrt(squared: jax.Array) -> jax.Array:
    """Square root of a sum of squares, with value and gradient zero where the sum underflows."""
    # False for NaN, which is thus passed on.
    zero = squared < jnp.finfo(squared.dtype).tiny
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def broadcast(name: str, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns `array` broadcast to `shape`, or raises a ValueError that names the argument."""
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to {shape}, got shape {array.shape}") from None


def as_mask(name: str, value: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns `value` as a bool array broadcast to `shape`, or raises."""
    mask = as_array(name, value)
    if mask.dtype != bool:
        raise TypeError(f"{name} must be a bool array, got dtype {mask.dtype}")
    return broadcast(name, mask, shape)


def taking_part(
    where: ArrayLike, children: jax.Array, features: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Checks a mask of children, and zeroes the children that are masked out.

    Masking results later is not enough: the gradient of a product with NaN is NaN.

    Args:
      where: broadcastable to ``[..., I]``.
      children: ``[..., I, ...]``.
      features: number of axes after I.

    Returns:
      The mask with `features` trailing axes of size 1, and the children.
    """
    mask = as_mask("where", where, children.shape[: children.ndim - features])
    mask = mask.reshape(*mask.shape, *[1] * features)
    return mask, jnp.where(mask, children, 0)


def as_one_hot(name: str, value: ArrayLike, scores_name: str, shape: tuple[int, ...]) -> jax.Array:
    """Returns one-hot or multi-hot labels as an array, or raises."""
    labels = as_array(name, value)
    if labels.shape != shape:
        raise ValueError(
            f"{name} must be one-hot or multi-hot with the shape of {scores_name}, {shape}, got"
            f" shape {labels.shape}; for class numbers use jax.nn.one_hot({name}, num_classes)"
        )
    if labels.dtype != bool and not is_real(labels.dtype):
        raise TypeError(f"{name} must be real numbers or bool, got dtype {labels.dtype}")
    return labels


def as_integer(name: str, value: Any, *, least: int = 1, most: int = _MOST) -> int:
    """Returns an option as an int, or raises unless it is an integer from `least` to `most`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a Python integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return number


def as_integers(name: str, values: Any) -> tuple[int, ...]:
    """Returns an option as a tuple of positive integers, or raises."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of positive integers, got {values!r}")
    return tuple(as_integer(f"{name}[{n}]", value) for n, value in enumerate(values))


def as_axis(axis: Any) -> int:
    """Returns an axis as an int, or raises a TypeError."""
    return as_integer("axis", axis, least=-_MOST)


def as_sizes(**sizes: Any) -> tuple[int, ...]:
    """Returns these options as ints, in their order, or raises unless they are positive."""
    return tuple(as_integer(name, value) for name, value in sizes.items())


def as_number(name: str, value: Any, *, least: float = -math.inf) -> Any:
    """Returns an option as a number, or raises unless it is finite and at least `least`.

    A scalar array becomes a Python number, unless it is traced: then it is not checked.
    """
    if (convert := getattr(value, "__jax_array__", None)) is not None:  # a variable of a module
        value = convert()
    if isinstance(value, jax.Array | np.ndarray):
        if not is_real(value.dtype):
            raise TypeError(f"{name} must be a number, got an array of dtype {value.dtype}")
        if value.ndim:
            raise ValueError(f"{name} must be one number, got shape {value.shape}")
        if is_traced(value):
            return value
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        is_finite = False
    if not is_finite:
        raise ValueError(f"{name} must be finite, got {value}")
    if value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
    return value


def check_key(name: str, key: Any) -> None:
    """Raises a TypeError unless the argument is a typed key, or an array of them."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name} must be typed as by jax.random.key, got {dtype or type(key).__name__}"
        )


def check_flags(**flags: Any) -> None:
    """Raises a TypeError unless these options are bools, which are not traced."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises a ValueError unless an option is one of these names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_callable(**functions: Any) -> None:
    """Raises a TypeError unless these options can be called."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {function!r}")


def is_traced(value: Any) -> bool:
    """Whether a value is only known when the program runs."""
    return isinstance(value, jax.core.Tracer)


def is_real(dtype: Any) -> bool:
    """Whether a dtype is one of real numbers, and not bool."""
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, *like: jax.Array | None) -> jax.Array:
    """Returns zeros that vary over the same mesh axes as the arrays.

    Under ``shard_map``, the initial carry of a loop must have the type that its body returns.
    """
    result = jnp.zeros(shape, dtype)
    for array in like:
        if array is not None:
            result = result + jnp.zeros_like(array, dtype, shape)
    return result


def zeros_of(array: jax.Array, dtype: jnp.dtype, *like: jax.Array | None) -> jax.Array:
    """Returns zeros of the shape of an array, divided among devices as its type says.

    Like :func:`zeros`, they vary over the mesh axes of all the arrays.
    """
    return jnp.zeros_like(array, dtype) + zeros((), dtype, *like)


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """Returns the arrays, all varying over every mesh axis over which one of them varies.

    Under ``shard_map`` a derivative must return gradients of the type of its arguments. The
    transpose of this function sums them over the axes that it added.
    """
    return [array + zeros((), array.dtype, *arrays) for array in arrays]


def is_constant(shape: tuple[Any, ...]) -> bool:
    """Whether all sizes are constant; those of an exported function may be symbolic."""
    return all(isinstance(size, int) for size in shape)


def is_sharded(*arrays: jax.Array) -> bool:
    """Whether the type of an array says how it is divided among devices."""
    return any(any(jax.typeof(array).sharding.spec) for array in arrays)


def is_integer(value: Any) -> bool:
    """Whether `value` is a Python or NumPy integer, and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def spatial_sizes(
    name: str, value: int | Sequence[int], kernel_size: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Returns one positive integer per spatial axis.

    A single integer applies to all axes of `kernel_size`, or to two axes if that is None.
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
    """Returns the name of a padding, or (low, high) per axis of the kernel."""
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
    """Returns names of the spatial axes for error messages."""
    names = {1: "L", 2: "H, W", 3: "Z, H, W"}
    return names.get(num_spatial_dims, f"{num_spatial_dims} spatial axes")
