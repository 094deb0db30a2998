"""Figures of evaluation and training: confusion, the worst errors, learning curves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from capsjax.viz._checks import Array, as_array, as_names
from capsjax.viz.theme import (
    THEMES,
    ThemeName,
    drawable,
    fitted,
    growth,
    label_classes,
    new_figure,
    show_image,
    themed,
)


def confusion(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    images: ArrayLike | None = None,
    num_worst: int = 12,
    class_names: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws the confusion matrix and the worst errors.

    The worst errors are those whose predicted class scores highest above the true class.

    Args:
      labels: true classes, integers ``[N]``.
      scores: ``[N, J]``; the largest score is the prediction.
      images: images of the worst errors are taken from these, ``[N, H, W, C]`` in [0, 1]; no errors
        are drawn when None.
      num_worst: how many errors to draw.
      class_names: names of the classes; their numbers when None.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure.

    Raises:
      ValueError: the shapes do not match.
    """
    values = as_array("scores", scores, "N", "J")
    truth = np.asarray(labels)
    if truth.shape != values.shape[:1] or truth.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be {len(values)} integers, got {truth.dtype} of shape {truth.shape}"
        )
    names = as_names("class_names", class_names, values.shape[1])
    counts = confusion_matrix(truth, values)
    larger = growth(len(counts), 16)
    with themed(theme):
        if images is None:
            figure = new_figure(4.8 * larger, 4.4 * larger)
            _draw_counts(figure.add_subplot(), counts, names, theme)
            return figure
        shown = as_array("images", images, "N", "H", "W", "C")
        figure = new_figure(5.0 * larger + 4.6, 4.4 * larger)
        left, right = cast(Any, figure.subfigures(1, 2, width_ratios=(5.0 * larger, 4.6)))
        if larger > 1:
            right = right.subfigures(2, 1, height_ratios=(1, larger - 1))[0]
        _draw_counts(left.add_subplot(), counts, names, theme)
        right.suptitle("worst errors: true → predicted, scores", fontsize=10, weight="bold")
        worst = worst_errors(truth, values)[:num_worst]
        axes = right.subplots(-(-max(1, len(worst)) // 4), 4, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for ax, n in zip(axes, worst, strict=False):
            t, p = truth[n], int(np.argmax(values[n]))
            ax.set_axis_on()
            show_image(ax, shown[n])
            ax.set_title(
                f"{fitted(f'{names[t]} → {names[p]}', 16)}\n{values[n, t]:.2f}  {values[n, p]:.2f}",
                fontsize=8,
                weight="normal",
                pad=3,
            )
        return figure


def _draw_counts(
    ax: Axes, counts: npt.NDArray[np.int64], names: Sequence[str], theme: ThemeName
) -> None:
    """Draws a confusion matrix; the colour map shows the errors only."""
    colours, dark = THEMES[theme], theme == "dark"
    number, total = len(counts), int(counts.sum())
    wrong = counts * (1 - np.eye(number, dtype=int))
    ax.imshow(
        np.ma.masked_equal(wrong, 0),
        cmap="inferno" if dark else "Oranges",
        vmin=0,
        vmax=max(1, wrong.max()) * 1.25,
        gid="confusion",
    )
    for t, p in zip(*np.nonzero(counts), strict=True):
        on_dark = dark or wrong[t, p] > 0.75 * wrong.max()
        colour = colours.accents[0] if t == p else ("#ffffff" if on_dark else "#17202a")
        ax.text(
            p,
            t,
            f"{counts[t, p]:,}",
            ha="center",
            va="center",
            fontsize=7.5 * min(1, 64 / number),
            color=colour,
            weight="bold" if t == p else "normal",
        )
    label_classes(ax, names)
    ax.set_yticks(range(number), names)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    errors = int(wrong.sum())
    ax.set_title(f"{errors:,} of {total:,} wrong ({errors / max(1, total):.2%})", loc="left")


def confusion_matrix(labels: npt.NDArray[Any], scores: Array) -> npt.NDArray[np.int64]:
    """Counts of true classes (rows) and predicted classes (columns), ``[J, J]``."""
    counts = np.zeros((scores.shape[1], scores.shape[1]), np.int64)
    np.add.at(counts, (labels, np.argmax(scores, axis=1)), 1)
    return counts


def worst_errors(labels: npt.NDArray[Any], scores: Array) -> npt.NDArray[np.int64]:
    """Indices of wrong predictions, sorted by how far the wrong score exceeds the true one."""
    margin = scores.max(axis=1) - scores[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(np.argmax(scores, axis=1) != labels)
    return wrong[np.argsort(-margin[wrong], kind="stable")].astype(np.int64)


def _set_log_scale(ax: Axes, values: Sequence[float]) -> None:
    """Makes the vertical axis logarithmic, and linear near zero if some values are not positive."""
    values = [value for value in values if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    if values and not positive and min(values) < 0:
        return
    if len(positive) == len(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        least = min(positive, default=1.0)
        ax.set_yscale("symlog", linthresh=least, linscale=0.5)
        ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=least, subs=(1, 2, 5)))
        if min(values) == 0:  # so that markers at zero are not cut off
            ax.set_ylim(bottom=-0.2 * least)
    ax.yaxis.set_minor_locator(NullLocator())


def training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, theme: ThemeName = "light"
) -> Figure:
    """Draws the loss, the error and other metrics of one or several runs over their steps.

    Training is drawn as lines, validation as dots, and the test as stars.

    Args:
      runs: records of ``metrics.jsonl`` by name of the run, such as
        ``{"split": "train", "step": 50, "loss": 0.1, "error": 0.02}``.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure of axes for the loss, the error, and each metric that the records hold.

    Raises:
      ValueError: there are no runs, or a run has no records.
    """
    if not runs or not all(runs.values()):
        empty = [name for name, records in runs.items() if not records]
        raise ValueError(f"runs must have records, got none of {', '.join(empty) or 'any run'}")
    flat = {name: [{**x, **x.get("metrics", {})} for x in runs[name]] for name in runs}
    records = [x for each in flat.values() for x in each]
    others = {name: None for x in records for name in x.get("metrics", {})}
    measured = [k for k in ("error", *others) if any(x.get(k) is not None for x in records)]
    keys = ["loss", *measured]
    with themed(theme) as colours:
        figure = new_figure(4.8 * len(keys), 3.2)
        for ax, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            for n, (name, records) in enumerate(flat.items()):
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
                    if len(points) == 1 and "marker" not in style:
                        style = {"marker": ".", **style}
                    if points:
                        label = f"{drawable(name)}, {split}" if len(runs) > 1 else split
                        ax.plot(
                            *zip(*points, strict=True),
                            color=colour,
                            label=label,
                            gid=f"{name}-{split}-{key}",
                            **style,
                        )
            ax.set_title(key, loc="left")
            ax.set_xlabel("step")
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            ax.xaxis.set_major_formatter("{x:,.0f}")
            if key in ("loss", "error"):
                values = (x.get(key) for each in flat.values() for x in each)
                _set_log_scale(ax, [value for value in values if value is not None])
                ax.yaxis.set_major_formatter(
                    (lambda value, _: f"{100 * value:g} %") if key == "error" else "{x:g}"
                )
        # Beside the axes, where no curve can cross it.
        handles = {h.get_label(): h for a in figure.axes for h in a.get_legend_handles_labels()[0]}
        figure.axes[-1].legend(
            handles=handles.values(), loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0
        )
        return figure
