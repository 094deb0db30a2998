"""Argument checks shared by the layers; errors name the argument."""

from typing import Any


def check_rngs(rngs: Any) -> None:
    """Raises a TypeError unless `rngs` has a stream for parameters."""
    if not callable(getattr(rngs, "params", None)):
        raise TypeError(
            "rngs must be an nnx.Rngs with a stream for params, such as nnx.Rngs(0), got"
            f" {type(rngs).__name__}"
        )
