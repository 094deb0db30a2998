"""Argument checks that the layers share; errors name the argument."""

from typing import Any


def check_rngs(rngs: Any) -> None:
    """Raises a TypeError unless these are random streams for parameters."""
    if not callable(getattr(rngs, "params", None)):
        raise TypeError(f"rngs must be an nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}")
