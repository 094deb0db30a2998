"""Which classes, children and iterations a routing diagram shows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from capsjax.routing import RoutingTrace
from capsjax.viz._checks import as_indices, check_one_example


class Selection(NamedTuple):
    """The part of a routing trace that a diagram shows.

    Attributes:
      classes: one or two parents.
      children: the children that are drawn individually, in the order of the rows.
      rest: the children that the last row summarises.
      iterations: the iterations that have a column, counted from 0.
    """

    classes: tuple[int, ...]
    children: npt.NDArray[np.intp]
    rest: npt.NDArray[np.intp]
    iterations: tuple[int, ...]


def select(
    trace: RoutingTrace,
    *,
    classes: Sequence[int] | None = None,
    children: Sequence[int] | None = None,
    num_children: int = 8,
    iterations: Sequence[int] | None = None,
) -> Selection:
    """Selects the part of a trace that a diagram shows.

    Classes take turns in choosing the children with the largest coupling in the last iteration
    shown.

    Args:
      trace: trace of one example, without leading axes.
      classes: one or two parents; the two with the largest activations when None.
      children: children to choose from; all when None.
      num_children: number of children to choose.
      iterations: iterations to show, counted from 1; all when None.

    Returns:
      :class:`Selection`.

    Raises:
      ValueError: the trace has leading axes, or an index is out of range.
    """
    check_one_example(trace)
    r, i, j = trace.coupling.shape
    if classes is None:
        classes = np.argsort(-np.asarray(trace.activations[-1]), kind="stable")[:2].tolist()
    if not 1 <= len(classes) <= 2 or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be one class or two different ones, got {list(classes)}")
    shown = as_indices("classes", classes, 0, j - 1)
    among = np.unique(as_indices("children", range(i) if children is None else children, 0, i - 1))
    columns = as_indices("iterations", range(1, r + 1) if iterations is None else iterations, 1, r)
    if num_children < 1:
        raise ValueError(f"num_children must be at least 1, got {num_children}")
    coupling = np.asarray(trace.coupling[columns[-1] - 1])
    ranked = [among[np.argsort(-coupling[among, parent], kind="stable")] for parent in shown]
    merged = dict.fromkeys(int(child) for turn in zip(*ranked, strict=True) for child in turn)
    chosen = list(merged)[:num_children]
    # Children of the first class are drawn above those of the second.
    chosen.sort(key=lambda child: -coupling[child, shown[0]] + coupling[child, shown[-1]])
    return Selection(
        tuple(shown),
        np.array(chosen, np.intp),
        np.setdiff1d(np.arange(i), chosen),
        tuple(column - 1 for column in columns),
    )
