"""Calls of pure functions outside of ``jax.jit``."""

import enum
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

P = ParamSpec("P")
T = TypeVar("T")

_OPTIONS = (bool, int, float, str, enum.Enum, np.bool_, np.number)


def compiled_outside_jit(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function with loops, so that calls outside of ``jax.jit`` compile it once.

    JAX otherwise compiles a loop in every such call, because its body is a new function each time.
    Calls with arrays of the same shapes, and equal options, share a program, and so do their
    gradients. Within ``jit`` or ``vmap``, with arguments of other kinds, and after an error, the
    function itself is called.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def program(fixed: tuple[Any, ...], arrays: list[jax.Array]) -> Any:
        tree, options = fixed
        remaining = iter(arrays)
        leaves = [next(remaining) if kind is None else value for kind, value in options]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return function(*args, **kwargs)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: isinstance(x, list))
        pairs = [(x, _is_array(x)) for x in leaves]
        arrays = [x for x, is_array in pairs if is_array]
        if arrays and all(is_array or _is_option(x) for x, is_array in pairs):
            # With their types, because 1, 1.0 and True are equal.
            options = tuple((None, None) if is_array else (type(x), x) for x, is_array in pairs)
            try:
                result: T = program((tree, options), arrays)
                return result
            except Exception:
                pass  # The function's own error speaks of its own arguments.
        return function(*args, **kwargs)

    return call


def _is_array(value: Any) -> bool:
    """Whether a value is an array whose elements are known, also where it is differentiated.

    Numbers that are stored as arrays may be options, which the function has to see.
    """
    if isinstance(value, Tracer):
        # Not `concrete_or_error`, whose error searches the program that is being traced.
        return value.ndim > 0 and value.to_concrete_value() is not None
    if type(value) is np.ndarray:  # not a subclass, of which JAX would drop what it adds
        known = value.dtype == bool or jnp.issubdtype(value.dtype, np.number)
        return value.ndim > 0 and value.dtype.isnative and known
    return isinstance(value, jax.Array) and value.ndim > 0


def _is_option(value: Any) -> bool:
    """Whether a value can be a constant of a program; XLA computes wrongly with a constant NaN."""
    return isinstance(value, _OPTIONS) and value == value
