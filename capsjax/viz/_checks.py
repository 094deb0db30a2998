"""Checks of arguments that several figures take; their errors name the argument."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from capsjax.routing import RoutingTrace
from capsjax.viz.theme import drawable

Array = npt.NDArray[np.float64]
_LONGEST_NAME = 24


def check_one_example(trace: RoutingTrace) -> None:
    """Raises a ValueError if the trace has leading axes."""
    if trace.coupling.ndim != 3:
        raise ValueError(
            f"trace must be of one example, coupling [r, I, J], got shape {trace.coupling.shape}"
        )


def as_array(name: str, value: ArrayLike, *axes: int | str) -> Array:
    """Returns `value` as float64, or raises a ValueError if an axis does not have the given size.

    Args:
      name: of the argument.
      value: the argument.
      *axes: a size, or a letter for an axis of any size.
    """
    array = np.asarray(value, np.float64)
    if array.ndim != len(axes) or any(
        isinstance(axis, int) and axis != size for axis, size in zip(axes, array.shape, strict=True)
    ):
        expected = ", ".join(map(str, axes))
        raise ValueError(f"{name} must have shape [{expected}], got shape {array.shape}")
    return array


def as_names(name: str, names: Sequence[str] | None, count: int) -> list[str]:
    """Returns `count` names as a list, numbers when None; raises if there are more or fewer.

    Names that the font of the figures cannot show are escaped, after their number, and long ones
    are cut.
    """
    if names is None:
        return [str(n) for n in range(count)]
    if len(names) != count:
        raise ValueError(f"{name} must be {count} names, got {len(names)}")
    shown = [drawable(text) for text in names]
    numbered = [
        text if text == name else f"{n} ({text})"
        for n, (name, text) in enumerate(zip(names, shown, strict=True))
    ]
    return [
        text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…" for text in numbered
    ]


def as_indices(name: str, values: Sequence[int], low: int, high: int) -> list[int]:
    """Returns the indices as a list, or raises unless there is one and all are from low to high."""
    if not len(values):
        raise ValueError(f"{name} must not be empty")
    for value in values:
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    return [int(value) for value in values]
