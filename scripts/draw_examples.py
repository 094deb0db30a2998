"""Runs the examples for docs/examples: ``python scripts/draw_examples.py [NAME ...]``.

Stores each example's output, and a picture of its final variables.
"""

import contextlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from capsjax.viz.draw import save
from capsjax.viz.theme import Theme, ThemeName, new_figure, show_image, themed

ROOT = Path(__file__).parents[1]
PAGES, IMAGES = ROOT / "docs" / "examples", ROOT / "docs" / "images"
SHOWN = 8  # test images in a picture


def draw_vit_pooling(left: dict[str, Any], theme: Theme) -> Figure:
    """The first test digit of each class, and each token's coupling to that class."""
    images, labels = np.asarray(left["test"].images)[..., 0] / 255, np.asarray(left["test"].labels)
    first = [int(np.argmax(labels == digit)) for digit in range(SHOWN)]
    couplings = [np.asarray(left["found"].coupling)[n, :, labels[n]] for n in first]
    figure = new_figure(8, 2.3)
    axes = figure.subplots(2, SHOWN)
    for (top, bottom), n, coupling in zip(axes.T, first, couplings, strict=True):
        show_image(top, images[n])
        drawn = bottom.imshow(coupling.reshape(4, 4), cmap=theme.sequential, vmin=0, vmax=1)
        bottom.set(xticks=[], yticks=[])
        bottom.set_title(f"{coupling.sum():.1f}", fontweight="normal", fontsize=8)
    figure.colorbar(drawn, ax=axes[1], label="coupling", fraction=0.02)
    return figure


def draw_object_discovery(left: dict[str, Any], theme: Theme) -> Figure:
    """The first pictures, and what each of the two slots draws of them."""
    rows = {
        "picture": left["pictures"],
        "slot 1": left["drawings"][:, 0],
        "slot 2": left["drawings"][:, 1],
    }
    figure = new_figure(8, 3.2)
    for axes, (name, images) in zip(figure.subplots(3, SHOWN), rows.items(), strict=True):
        for ax, image in zip(axes, images, strict=False):
            show_image(ax, np.asarray(image))
        axes[0].set_ylabel(name)
    return figure


def draw_text_classification(left: dict[str, Any], theme: Theme) -> Figure:
    """For each library, the words that support it most."""
    coupling, words, ids = np.asarray(left["coupling"]), left["words"], left["ids"][left["test"]]
    figure = new_figure(8, 2.4)
    axes = figure.subplots(1, len(left["MODULES"]))
    for j, (ax, library) in enumerate(zip(axes, left["MODULES"], strict=True)):
        share = (coupling[..., j] - coupling.mean(-1)).ravel()
        support = np.bincount(ids.ravel(), share)
        top = support.argsort()[:-7:-1]
        ax.barh([words[i] for i in top], support[top], color=theme.accents[j])
        ax.invert_yaxis()
        ax.set_title(library)
        ax.tick_params(left=False)
    figure.supxlabel("coupling above the mean of the libraries, summed over the test set", size=9)
    return figure


DRAW: dict[str, Callable[[dict[str, Any], Theme], Figure]] = {
    "vit_pooling": draw_vit_pooling,
    "text_classification": draw_text_classification,
    "object_discovery": draw_object_discovery,
}


def main() -> None:
    """Runs and draws the named examples, or all of them."""
    names = sys.argv[1:] or list(DRAW)
    for name in names:
        sys.argv = [f"{name}.py"]
        path = PAGES / f"{name}.txt"
        with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            left = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        themes: tuple[ThemeName, ...] = ("light", "dark")
        for theme in themes:
            with themed(theme) as colours:
                save(DRAW[name](left, colours), IMAGES / f"{name}-{theme}.svg")
        print(path.read_text("utf-8"), end="")


if __name__ == "__main__":
    main()
