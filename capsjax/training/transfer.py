"""Transfers parameters from another network."""

from typing import Any

import jax

from capsjax.training.step import Variables


def transfer(variables: Variables, source: Variables) -> tuple[Variables, tuple[str, ...]]:
    """Replaces arrays by those of another network with the same name and shape.

    Args:
      variables: the arrays of a network.
      source: the arrays of the other network.

    Returns:
      The arrays, and the names of the parameters that were not replaced.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.training import Variables
      >>> from capsjax.training.transfer import transfer
      >>> few = Variables({"conv": jnp.zeros(2), "classes": jnp.zeros(3)}, {})
      >>> many = Variables({"conv": jnp.ones(2), "classes": jnp.ones(10)}, {})
      >>> variables, new = transfer(few, many)
      >>> print(variables.params["conv"], new)
      [1. 1.] ('classes',)
    """
    found = dict(jax.tree_util.tree_leaves_with_path(source))
    new: list[str] = []

    def replaced(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        other = found.get(path)
        if other is not None and other.shape == leaf.shape:
            return other
        kind, *rest = path
        if kind.name == "params":
            new.append(jax.tree_util.keystr(tuple(rest), simple=True, separator="."))
        return leaf

    return jax.tree_util.tree_map_with_path(replaced, variables), tuple(new)
