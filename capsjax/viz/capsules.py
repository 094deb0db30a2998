"""Figures of routing, of class capsules and of their reconstructions."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from capsjax.routing import RoutingTrace
from capsjax.viz._checks import Array, as_array, as_indices, as_names, check_one_example
from capsjax.viz.theme import (
    ThemeName,
    fitted,
    growth,
    label_classes,
    new_figure,
    show_image,
    themed,
)


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
    """Draws the couplings of each type of child with a class as maps over the grid.

    There is one row per class and iteration, and one map per type. All maps share one scale, which
    starts at 0.

    Args:
      trace: trace of one example; the children are ordered by row, column and type.
      grid: rows and columns of the grid of children.
      classes: classes to show; the one with the largest activation when None.
      types: types of children to show, counted from 0; all when None.
      iterations: iterations to show, counted from 1; all when None.
      class_names: names of the parents; their numbers when None.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure; the images of its axes hold the couplings.

    Raises:
      ValueError: the children do not fill the grid, or an index is out of range.
    """
    check_one_example(trace)
    r, i, j = trace.coupling.shape
    rows, columns = grid
    if min(grid) < 1 or i % (rows * columns):
        raise ValueError(f"grid must divide the {i} children into types, got {rows} x {columns}")
    maps = np.asarray(trace.coupling, np.float64).reshape(r, rows, columns, -1, j)
    if classes is None:
        classes = [int(np.argmax(trace.activations[-1]))]
    parents = as_indices("classes", classes, 0, j - 1)
    number = maps.shape[3]
    kinds = as_indices("types", range(number) if types is None else types, 0, number - 1)
    numbers = range(1, r + 1) if iterations is None else iterations
    passes = [t - 1 for t in as_indices("iterations", numbers, 1, r)]
    names = as_names("class_names", class_names, j)
    largest = max(maps[t][:, :, kinds][..., parents].max() for t in passes)
    # More than 16 maps in a line would be too small to read.
    lines = -(-len(kinds) // 16)
    wide = -(-len(kinds) // lines)
    height = len(parents) * len(passes) * lines
    with themed(theme) as colours:
        side = max(0.55, min(1.5, 8 / wide))
        figure = new_figure(1.2 + wide * side, 0.5 + height * side * rows / columns)
        axes = figure.subplots(height, wide, squeeze=False)
        drawn = None
        for row, (parent, t, line) in enumerate(
            (c, t, line) for c in parents for t in passes for line in range(lines)
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
        bar.set_label("coupling $c_{ij}$", parse_math=True)
        bar.outline.set_visible(False)
        return figure


def agreement(
    trace: RoutingTrace,
    *,
    classes: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    r"""Draws the agreement and the entropy of the couplings over the iterations.

    The left axes show, for each class, the mean agreement of the votes with the parent, weighted by
    the coupling: :math:`\sum_i c_{ij} a_{ij} / \sum_i c_{ij}`. The right axes show the mean over
    the children of :math:`H_i = -\sum_j c_{ij} \log_2 c_{ij}` in bits, and the entropy of equal
    couplings.

    Args:
      trace: trace of one example.
      classes: classes to colour; the three with the largest activations when None.
      class_names: names of the parents; their numbers when None.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure of two axes.

    Raises:
      ValueError: the trace has leading axes, or a class is out of range.
    """
    check_one_example(trace)
    means, entropy = agreement_and_entropy(trace)
    r, j = means.shape
    names = as_names("class_names", class_names, j)
    if classes is None:
        classes = np.argsort(-np.asarray(trace.activations[-1]))[:3].tolist()
    coloured = as_indices("classes", classes, 0, j - 1)
    with themed(theme) as colours:
        figure = new_figure(8, 3.1)
        left, right = figure.subplots(1, 2)
        at = np.arange(1, r + 1)
        for n in range(j):
            if n not in coloured:
                left.plot(at, means[:, n], color=colours.faint, lw=1.2, zorder=1)
        for n, parent in enumerate(coloured):
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
        left.set_title(
            "agreement $\\hat{u}_{j|i}\\cdot v_j$, weighted by coupling",
            loc="left",
            parse_math=True,
        )
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
        # A tenth of a bit at least: what differs by less, such as rounding, looks equal.
        low, high = min(entropy.min(), np.log2(j) - 0.1), max(entropy.max(), np.log2(j))
        right.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))
        for ax in (left, right):
            ax.set_xticks(at)
            ax.set_xlabel("iteration")
        return figure


def agreement_and_entropy(trace: RoutingTrace) -> tuple[Array, Array]:
    """Returns the numbers that :func:`agreement` draws: agreement ``[r, J]`` and bits ``[r]``."""
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
    """Draws the lengths of the class capsules: the probabilities that the classes are present.

    Args:
      activations: lengths of the class capsules, ``[J]``.
      class_names: names of the classes; their numbers when None.
      label: the true class, which is marked.
      ax: axes to draw on; the axes of a new figure when None.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      The figure of the axes.

    Raises:
      ValueError: a shape is wrong.
    """
    values = as_array("activations", activations, "J")
    names = as_names("class_names", class_names, len(values))
    with themed(theme) as colours:
        if ax is None:
            ax = new_figure(4.6 * growth(len(values), 12), 2.8).add_subplot()
            label_classes(ax, names)
        else:  # text on the caller's axes is parsed as formulas by default
            ax.set_xticks(range(len(values)), names, parse_math=False)
        figure = ax.get_figure(root=True)
        assert figure is not None  # axes always belong to a figure
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
        if label is not None:
            ax.get_xticklabels()[label].set(weight="bold", color=colours.ink)
        ax.set_ylim(0, 1.05)
        title = r"length $\|v_j\|$: probability that the class is present"
        ax.set_title(title, loc="left", parse_math=True)
        truth = f" (true: {names[label]})" if label is not None else ""
        ax.set_xlabel(f"class{truth}", parse_math=False)
        return figure


def reconstructions(
    images: ArrayLike,
    reconstructed: ArrayLike,
    *,
    titles: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws images above their reconstructions.

    Args:
      images: ``[N, H, W, C]`` in [0, 1].
      reconstructed: reconstructions of the images, of the same shape.
      titles: one above each image.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure.

    Raises:
      ValueError: the shapes differ.
    """
    above = as_array("images", images, "N", "H", "W", "C")
    below = as_array("reconstructed", reconstructed, *above.shape)
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
      images: reconstructions with offset n added to dimension d, ``[D, N, H, W, C]``, from
        :func:`capsjax.viz.vary_dimensions`.
      offsets: the N offsets.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure with a row per dimension.

    Raises:
      ValueError: the shapes do not match.
    """
    tiles = as_array("images", images, "D", "N", "H", "W", "C")
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
    """Draws overlapping digits above the reconstructions from two of their capsules.

    The second row shows both reconstructions in one image, the first in blue and the second in
    orange, much as in figure 5 of Sabour et al. 2017. The last two rows show them one by one.

    Args:
      images: ``[N, H, W, 1]`` in [0, 1].
      parts: the two reconstructions of each image, ``[N, 2, H, W, 1]``.
      titles: one above each image.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure with four rows.

    Raises:
      ValueError: the shapes do not match.
    """
    above = as_array("images", images, "N", "H", "W", 1)
    two = as_array("parts", parts, len(above), 2, *above.shape[1:])
    colours = np.array([[0.2, 0.62, 1.0], [1.0, 0.5, 0.12]])
    tinted = two * colours[None, :, None, None]
    both = np.clip(tinted.sum(axis=1), 0, 1)
    rows = np.stack([np.repeat(above, 3, -1), both, tinted[:, 0], tinted[:, 1]])
    labels = ("overlaid", "both", "first", "second")
    return _grid(rows, labels, titles or [""] * len(above), theme, size=0.9)


def _grid(
    tiles: Array, rows: Sequence[str], titles: Sequence[str], theme: ThemeName, size: float = 0.8
) -> Figure:
    """Draws images ``[R, N, H, W, C]`` as a grid with a name per row and a title per column."""
    number, many, height, width, _ = tiles.shape
    if len(titles) != many:
        raise ValueError(f"titles must be {many} texts, got {len(titles)}")
    texts = [fitted(title, round(14 * size)) for title in titles]
    top = 0.45 + 0.13 * max((text.count("\n") for text in texts), default=0)
    with themed(theme) as colours:
        figure = new_figure(1.1 + many * size, top + number * size * height / width)
        figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
        axes = figure.subplots(number, many, squeeze=False)
        for r in range(number):
            for n in range(many):
                show_image(axes[r, n], tiles[r, n], gid=f"tile-{r}-{n}")
            axes[r, 0].set_ylabel(rows[r], rotation=0, ha="right", va="center", fontsize=8)
        for ax, text in zip(axes[0], texts, strict=True):
            ax.set_title(text, fontsize=8, weight="normal", color=colours.soft, pad=3)
        return figure
