"""Colours, type and images of every figure, light and dark."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

ThemeName = Literal["light", "dark"]
_FONT = "DejaVu Sans"
_CHARACTERS_PER_INCH = 11  # of labels, with space between them


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
      paper: background.
      ink: main text and marks.
      soft: secondary text.
      faint: rules and frames.
      accents: colours of the classes or runs that are compared, in order.
      sequential: colour map for positive values.
    """

    paper: str
    ink: str
    soft: str
    faint: str
    accents: tuple[str, ...]
    sequential: str


# Accents follow the order of Okabe and Ito's palette, which is safe for colour-blind readers.
THEMES = {
    "light": Theme(
        "#ffffff",
        "#17202a",
        "#5d6975",
        "#d5dbe1",
        ("#0069b4", "#c94f00", "#00805e", "#a8447f", "#7a6a00", "#3f88a8"),
        "Blues",
    ),
    "dark": Theme(
        "#0d1117",
        "#e8edf2",
        "#9aa6b2",
        "#333c47",
        ("#62b6f7", "#ff9d4d", "#3ecf9f", "#e794c4", "#e0cf4f", "#9fd3e8"),
        "cividis",
    ),
}


def theme_of(name: ThemeName) -> Theme:
    """Returns the theme with this name, or raises a ValueError."""
    if name not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(THEMES)}, got {name!r}")
    return THEMES[name]


def drawable(text: str) -> str:
    """Returns the text, escaped if the figures' font lacks one of its characters."""
    font = get_font(findfont(_FONT))
    if all(font.get_char_index(ord(character)) for character in text):
        return text
    return text.encode("ascii", "backslashreplace").decode()


def fitted(text: str, width: int) -> str:
    """Breaks lines that have more than this number of characters."""
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def growth(classes: int, fit: int) -> float:
    """Returns how much larger a figure has to be for more classes than fit; four times at most."""
    return min(4.0, max(1.0, classes / fit))


def label_classes(ax: Axes, names: Sequence[str]) -> None:
    """Writes the names of classes below the axes of a new figure, slanted if they would overlap."""
    figure = ax.get_figure(root=True)
    assert figure is not None  # axes always belong to a figure
    ax.set_xticks(range(len(names)), names)
    inches = ax.get_window_extent().width / figure.dpi
    if len(names) * max(map(len, names), default=0) > _CHARACTERS_PER_INCH * inches:
        for label in ax.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")


@contextlib.contextmanager
def themed(name: ThemeName) -> Iterator[Theme]:
    """Applies a theme's matplotlib settings within the context."""
    theme = theme_of(name)
    settings: Any = {
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.grid": False,
        "axes.labelcolor": theme.soft,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.soft,
        "ytick.color": theme.soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "font.family": _FONT,
        "mathtext.fontset": "cm",
        # Names of classes and runs are plain text; formulas enable parsing themselves.
        "text.parse_math": False,
        "axes.prop_cycle": cycler(color=theme.accents),
    }
    with mpl.rc_context(settings):
        yield theme


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure of this size in inches, independent of pyplot's global state."""
    return Figure(figsize=(width, height), layout="constrained")


def show_image(ax: Axes, image: npt.NDArray[np.float64], **options: Any) -> None:
    """Draws an image in [0, 1], ``[H, W, C]``, without ticks or frame.

    Three channels are RGB and four RGBA; otherwise the first channel is drawn in gray.
    """
    image = image[..., 0] if image.ndim == 3 and image.shape[-1] not in (3, 4) else image
    ax.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest", **options)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
