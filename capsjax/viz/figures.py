"""Figures of capsule papers: numbers in, a matplotlib figure out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from capsjax.routing import RoutingTrace
from capsjax.viz.theme import Theme, ThemeName, new_figure, themed

Array = npt.NDArray[np.float64]


class _Canvas(NamedTuple):
    figure: Figure
    ax: Axes
    theme: Theme


@contextmanager
def _canvas(ax: Axes | None, theme: ThemeName, width: float, height: float) -> Iterator[_Canvas]:
    """The axes that were given, or those of a new figure."""
    with themed(theme) as colours:
        if ax is None:
            ax = new_figure(width, height).add_subplot()
        figure = ax.get_figure(root=True)
        assert figure is not None  # axes that were given belong to a figure
        yield _Canvas(figure, ax, colours)


def _checked(name: str, given: ArrayLike, axes: str, *sizes: int | None) -> Array:
    array = np.asarray(given, np.float64)
    expected = sizes or (None,) * len(axes.split(","))
    if array.ndim != len(expected) or any(
        n not in (None, m) for n, m in zip(expected, array.shape, strict=True)
    ):
        wanted = axes if not any(sizes) else f"{axes} = {list(sizes)}"
        raise ValueError(f"{name} must have shape [{wanted}], got shape {array.shape}")
    return array


def _names(names: Sequence[str] | None, number: int) -> list[str]:
    if names is not None and len(names) != number:
        raise ValueError(f"class_names must be {number} names, got {len(names)}")
    return [str(n) for n in names or range(number)]


def _one(trace: RoutingTrace) -> None:
    if trace.coupling.ndim != 3:
        raise ValueError(
            f"trace must be of one example, coupling [r, I, J], got shape {trace.coupling.shape}"
        )


def _show(ax: Axes, image: Array, **options: Any) -> None:
    """An image without ticks, in grey unless it has colours."""
    image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    ax.imshow(
        image, **{"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest", **options}
    )
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def coupling_maps(
    trace: RoutingTrace,
    grid: tuple[int, int],
    *,
    classes: Sequence[int] | None = None,
    types: Sequence[int] | None = None,
    iterations: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws where on the grid the children of each type couple to a class, for every iteration.

    One row per class and iteration, one map of ``grid`` per type, all to one scale from 0.

    Args:
      trace: of one example; children ordered by row, column and type.
      grid: rows and columns.
      classes: the one with the largest activation when None.
      types: all when None.
      iterations: counted from 1; all when None.
      class_names: of the parents.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure; the images of its axes hold the couplings.

    Raises:
      ValueError: the children do not fill the grid, or an index is out of range.
    """
    _one(trace)
    r, i, j = trace.coupling.shape
    rows, columns = grid
    if min(grid) < 1 or i % (rows * columns):
        raise ValueError(f"grid must divide the {i} children into types, got {rows} x {columns}")
    maps = np.asarray(trace.coupling, np.float64).reshape(r, rows, columns, -1, j)
    if classes is None:
        classes = [int(np.argmax(trace.activations[-1]))]
    kinds = list(range(maps.shape[3]) if types is None else types)
    passes = [t - 1 for t in (range(1, r + 1) if iterations is None else iterations)]
    for name, values, limit in (
        ("classes", classes, j),
        ("types", kinds, maps.shape[3]),
        ("iterations", passes, r),
    ):
        if not values or not all(0 <= value < limit for value in values):
            raise ValueError(f"{name} must be among the {limit} of the trace")
    names = _names(class_names, j)
    largest = max(maps[t][:, :, kinds][..., list(classes)].max() for t in passes)
    # As many maps in a line as can be seen.
    lines = -(-len(kinds) // 16)
    wide = -(-len(kinds) // lines)
    height = len(classes) * len(passes) * lines
    with themed(theme) as colours:
        side = max(0.55, min(1.5, 8 / wide))
        figure = new_figure(1.2 + wide * side, 0.5 + height * side * rows / columns)
        axes = figure.subplots(height, wide, squeeze=False)
        drawn = None
        for row, (parent, t, line) in enumerate(
            (c, t, line) for c in classes for t in passes for line in range(lines)
        ):
            for ax in axes[row]:
                ax.set_axis_off()
            for ax, kind in zip(axes[row], kinds[line * wide : (line + 1) * wide], strict=False):
                ax.set_axis_on()
                drawn = ax.imshow(
                    maps[t, :, :, kind, parent],
                    cmap=colours.sequential,
                    vmin=0,
                    vmax=largest,
                    gid=f"coupling-{t + 1}-{kind}-{parent}",
                )
                ax.set_xticks([])
                ax.set_yticks([])
                for spine in ax.spines.values():
                    spine.set_visible(True)
                if not row % (lines * len(passes)) or lines > 1:
                    ax.set_title(f"type {kind + 1}", fontsize=7.5, weight="normal", pad=2)
            if not line:
                axes[row][0].set_ylabel(
                    f"class {names[parent]}\niteration {t + 1}",
                    fontsize=7.5,
                    rotation=0,
                    ha="right",
                    va="center",
                )
        assert drawn is not None
        bar = figure.colorbar(drawn, ax=axes, fraction=0.025, pad=0.02)
        bar.set_label("coupling $c_{ij}$")
        bar.outline.set_visible(False)
        return figure


def agreement(
    trace: RoutingTrace,
    *,
    classes: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    r"""Draws agreement and the couplings' entropy over the iterations.

    On the left the mean agreement of votes and parent, weighted by the coupling,
    :math:`\sum_i c_{ij} a_{ij} / \sum_i c_{ij}`, for each class; on the right the mean over the
    children of :math:`H_i = -\sum_j c_{ij} \log_2 c_{ij}` in bits, and that of equal couplings.

    Args:
      trace: of one example.
      classes: that are told apart by colour; the three with the largest activations when None.
      class_names: of the parents.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure of two axes.

    Raises:
      ValueError: the trace has leading axes, or there are not so many classes.
    """
    _one(trace)
    means, entropy = agreement_and_entropy(trace)
    r, j = means.shape
    names = _names(class_names, j)
    if classes is None:
        classes = np.argsort(-np.asarray(trace.activations[-1]))[:3].tolist()
    with themed(theme) as colours:
        figure = new_figure(8, 3.1)
        left, right = figure.subplots(1, 2)
        at = np.arange(1, r + 1)
        for n in range(j):
            if n not in classes:
                left.plot(at, means[:, n], color=colours.faint, lw=1.2, zorder=1)
        for n, parent in enumerate(classes):
            colour = colours.accents[n % len(colours.accents)]
            left.plot(
                at,
                means[:, parent],
                color=colour,
                marker="o",
                ms=4,
                lw=2,
                label=f"class {names[parent]}",
                gid=f"agreement-{parent}",
            )
        left.set_title("agreement $\\hat{u}_{j|i}\\cdot v_j$, weighted by coupling", loc="left")
        left.legend()
        right.plot(at, entropy, color=colours.accents[0], marker="o", ms=4, lw=2, gid="entropy")
        right.axhline(np.log2(j), color=colours.soft, lw=1, ls=(0, (4, 3)))
        right.annotate(
            f"equal couplings: {np.log2(j):.2f} bits",
            (r, np.log2(j)),
            (0, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=colours.soft,
        )
        right.set_title("entropy of a child's coupling, bits", loc="left")
        right.margins(y=0.15)
        for ax in (left, right):
            ax.set_xticks(at)
            ax.set_xlabel("iteration")
        return figure


def agreement_and_entropy(trace: RoutingTrace) -> tuple[Array, Array]:
    """The numbers of :func:`agreement`: ``[r, J]``, and bits ``[r]``."""
    coupling = np.asarray(trace.coupling, np.float64)
    agreed = np.asarray(trace.agreement, np.float64)
    total = np.maximum(coupling.sum(axis=1), np.finfo(np.float64).tiny)
    means = (coupling * agreed).sum(axis=1) / total
    logs = np.log2(np.where(coupling > 0, coupling, 1))
    return means, -(coupling * logs).sum(axis=2).mean(axis=1)


def lengths(
    activations: ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    label: int | None = None,
    ax: Axes | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws the lengths of the class capsules, the probabilities that the classes are present.

    Args:
      activations: ``[J]``.
      class_names: of the classes.
      label: the true class, which is marked.
      ax: to draw on; those of a new figure when None.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      The figure.

    Raises:
      ValueError: a shape is wrong.
    """
    values = _checked("activations", activations, "J")
    names = _names(class_names, len(values))
    with _canvas(ax, theme, 4.6, 2.8) as (figure, ax, colours):
        bars = ax.bar(range(len(values)), values, 0.72, color=colours.accents[0], alpha=0.45)
        bars[int(np.argmax(values))].set_alpha(1)
        for at, value in enumerate(values):
            ax.annotate(
                f"{value:.2f}",
                (at, value),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=colours.soft,
            )
        ax.set_xticks(range(len(values)), names)
        if label is not None:
            ax.get_xticklabels()[label].set(weight="bold", color=colours.ink)
        ax.set_ylim(0, 1.05)
        ax.set_title(r"length $\|v_j\|$: probability that the class is present", loc="left")
        truth = f" (true: {names[label]})" if label is not None else ""
        ax.set_xlabel(f"class{truth}")
        return figure


def reconstructions(
    images: ArrayLike,
    reconstructed: ArrayLike,
    *,
    titles: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws images over their reconstructions.

    Args:
      images: ``[N, H, W, C]`` in [0, 1].
      reconstructed: of the same shape.
      titles: one above each image.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure.

    Raises:
      ValueError: the shapes are not the same.
    """
    above = _checked("images", images, "N, H, W, C")
    below = _checked("reconstructed", reconstructed, "N, H, W, C", *above.shape)
    labels = ("image", "reconstruction")
    return _grid(np.stack([above, below]), labels, titles or [""] * len(above), theme)


def dimensions(
    images: ArrayLike,
    offsets: Sequence[float],
    *,
    theme: ThemeName = "light",
) -> Figure:
    """Draws what each dimension of a class capsule does to the reconstruction.

    Args:
      images: ``[D, N, H, W, C]``: of dimension d with the n-th offset added, from
        :func:`capsjax.viz.vary_dimensions`.
      offsets: N numbers.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure with a row per dimension.

    Raises:
      ValueError: the shapes do not go together.
    """
    tiles = _checked("images", images, "D, N, H, W, C")
    if tiles.shape[1] != len(offsets):
        raise ValueError(f"offsets must be {tiles.shape[1]} numbers, got {len(offsets)}")
    rows = [f"{d + 1}" for d in range(len(tiles))]
    figure = _grid(tiles, rows, [f"{o:+.2f}" if o else "0" for o in offsets], theme, size=0.5)
    with themed(theme) as colours:
        figure.supylabel("dimension", fontsize=9, color=colours.soft)
        figure.suptitle("added to this dimension", fontsize=9, color=colours.soft)
    return figure


def overlaps(
    images: ArrayLike,
    parts: ArrayLike,
    *,
    titles: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws overlapping digits over the reconstructions of two of their capsules.

    The second row shows both: the first in the theme's first colour, the second in its second, as
    in figure 5 of the paper.

    Args:
      images: ``[N, H, W, 1]`` in [0, 1].
      parts: reconstructions ``[N, 2, H, W, 1]``.
      titles: one above each image.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure with four rows.

    Raises:
      ValueError: the shapes do not go together.
    """
    above = _checked("images", images, "N, H, W, C", None, None, None, 1)
    two = _checked("parts", parts, "N, 2, H, W, C", len(above), 2, *above.shape[1:])
    colours = np.array([[0.2, 0.62, 1.0], [1.0, 0.5, 0.12]])
    tinted = two * colours[None, :, None, None]
    both = np.clip(tinted.sum(axis=1), 0, 1)
    rows = np.stack([np.repeat(above, 3, -1), both, tinted[:, 0], tinted[:, 1]])
    labels = ("overlaid", "both", "first", "second")
    return _grid(rows, labels, titles or [""] * len(above), theme, size=0.9)


def _grid(
    tiles: Array, rows: Sequence[str], titles: Sequence[str], theme: ThemeName, size: float = 0.8
) -> Figure:
    """Images ``[R, N, H, W, C]`` in rows with names, under titles."""
    number, many, height, width, _ = tiles.shape
    if len(titles) != many:
        raise ValueError(f"titles must be {many}, got {len(titles)}")
    with themed(theme) as colours:
        figure = new_figure(1.1 + many * size, 0.45 + number * size * height / width)
        figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
        axes = figure.subplots(number, many, squeeze=False)
        for r in range(number):
            for n in range(many):
                _show(axes[r, n], tiles[r, n], gid=f"tile-{r}-{n}")
            axes[r, 0].set_ylabel(rows[r], rotation=0, ha="right", va="center", fontsize=8)
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title, fontsize=8, weight="normal", color=colours.soft, pad=3)
        return figure


def confusion(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    images: ArrayLike | None = None,
    num_worst: int = 12,
    class_names: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws which classes are taken for which, and the worst errors.

    Worst is where the predicted class's score exceeds the true one's most.

    Args:
      labels: true classes, integers ``[N]``.
      scores: ``[N, J]``; the largest is the prediction.
      images: ``[N, H, W, C]`` in [0, 1], for the worst errors; without them none is drawn.
      num_worst: how many.
      class_names: of the classes.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure.

    Raises:
      ValueError: the shapes do not go together.
    """
    values = _checked("scores", scores, "N, J")
    truth = np.asarray(labels)
    if truth.shape != values.shape[:1] or truth.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be {len(values)} integers, got {truth.dtype} of shape {truth.shape}"
        )
    number = values.shape[1]
    names = _names(class_names, number)
    counts, worst = confusion_matrix(truth, values), worst_errors(truth, values)[:num_worst]
    shown = None if images is None else _checked("images", images, "N, H, W, C")
    with themed(theme) as colours:
        figure = new_figure(9.6 if shown is not None else 4.8, 4.4)
        left: Any = figure
        if shown is not None:
            halves: Any = figure.subfigures(1, 2, width_ratios=(1.1, 1))
            left, right = halves
        ax = left.add_subplot()
        wrong = counts * (1 - np.eye(number, dtype=int))
        colour_map = "Oranges" if theme == "light" else "inferno"
        ax.imshow(
            np.ma.masked_equal(wrong, 0),
            cmap=colour_map,
            vmin=0,
            vmax=max(1, wrong.max()) * 1.25,
            gid="confusion",
        )
        for t in range(number):
            for p in range(number):
                if counts[t, p]:
                    dark = wrong[t, p] > 0.75 * wrong.max() or theme == "dark"
                    colour = colours.accents[0] if t == p else ("#ffffff" if dark else "#17202a")
                    ax.text(
                        p,
                        t,
                        f"{counts[t, p]:,}",
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color=colour,
                        weight="bold" if t == p else "normal",
                    )
        ax.set_xticks(range(number), names)
        ax.set_yticks(range(number), names)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
        total = int(wrong.sum())
        ax.set_title(
            f"{total:,} of {len(truth):,} wrong ({total / max(1, len(truth)):.2%})", loc="left"
        )
        if shown is not None:
            right.suptitle("worst errors: true → predicted, lengths", fontsize=10, weight="bold")
            axes = right.subplots(-(-max(1, len(worst)) // 4), 4, squeeze=False).ravel()
            for panel in axes:
                panel.set_axis_off()
            for panel, n in zip(axes, worst, strict=False):
                t, p = truth[n], int(np.argmax(values[n]))
                panel.set_axis_on()
                _show(panel, shown[n])
                panel.set_title(
                    f"{names[t]} → {names[p]}\n{values[n, t]:.2f}  {values[n, p]:.2f}",
                    fontsize=8,
                    weight="normal",
                    pad=3,
                )
        return figure


def confusion_matrix(labels: npt.NDArray[Any], scores: Array) -> npt.NDArray[np.int64]:
    """Counts ``[J, J]`` of true classes (rows) and predicted ones (columns)."""
    counts = np.zeros((scores.shape[1], scores.shape[1]), np.int64)
    np.add.at(counts, (labels, np.argmax(scores, axis=1)), 1)
    return counts


def worst_errors(labels: npt.NDArray[Any], scores: Array) -> npt.NDArray[np.int64]:
    """Indices of wrong predictions, the most mistaken first."""
    margin = scores.max(axis=1) - scores[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(np.argmax(scores, axis=1) != labels)
    return wrong[np.argsort(-margin[wrong], kind="stable")].astype(np.int64)


def training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, theme: ThemeName = "light"
) -> Figure:
    """Draws loss and error of one or several runs over their steps.

    Args:
      runs: by name, the records of ``metrics.jsonl``:
        ``{"split": "train", "step": 50, "loss": 0.1, "error": 0.02}`` and so on.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure of two axes. Lines are of training, dots of validation, stars of the test.

    Raises:
      ValueError: there are no runs, or a run has no records.
    """
    if not runs or not all(runs.values()):
        empty = [name for name, records in runs.items() if not records]
        raise ValueError(f"runs must have records to draw, got none of {', '.join(empty) or 'any'}")
    with themed(theme) as colours:
        figure = new_figure(9.6, 3.2)
        for ax, key in zip(figure.subplots(1, 2), ("loss", "error"), strict=True):
            for n, (name, records) in enumerate(runs.items()):
                colour = colours.accents[n % len(colours.accents)]
                for split, style in (
                    ("train", {"lw": 1.6}),
                    ("validation", {"marker": "o", "ms": 3.5, "lw": 0}),
                    ("test", {"marker": "*", "ms": 10, "lw": 0}),
                ):
                    points = [
                        (x["step"], x[key])
                        for x in records
                        if x["split"] == split and x.get(key) is not None
                    ]
                    if points:
                        label = f"{name}, {split}" if len(runs) > 1 else split
                        ax.plot(
                            *zip(*points, strict=True),
                            color=colour,
                            label=label,
                            gid=f"{name}-{split}-{key}",
                            **style,
                        )
            ax.set_yscale("log")
            ax.set_title(key, loc="left")
            ax.set_xlabel("step")
        # The last one, of errors.
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        ax.yaxis.set_minor_locator(NullLocator())
        # Beside the axes: curves cross all of them.
        ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
        return figure
