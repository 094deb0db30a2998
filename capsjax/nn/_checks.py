"""Argument checks shared by the layers; errors name the argument."""

from typing import Any


def check_rngs(rngs: Any) -> None:
    """Raises a TypeError unless `rngs` has a stream for parameters."""
    if not callable(getattr(rngs, "params", None)):
        raise TypeError(
            "rngs must be an nnx.Rngs with a stream for params, such as nnx.Rngs(0), got"
            f" {type(rngs).__name__}"
        )


def as_constant(name: str, value: Any) -> Any:
    """Returns an option with a scalar array as a Python number, or raises unless it is hashable."""
    try:
        constant = value.item() if getattr(value, "ndim", None) == 0 else value
        hash(constant)
    except (TypeError, NotImplementedError):  # the latter for random keys
        what = type(value).__name__
        raise TypeError(f"{name} must be a number or hashable, got {what}") from None
    return constant
