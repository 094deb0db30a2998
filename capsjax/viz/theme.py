"""Colours and type of every figure, light and dark."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure

ThemeName = Literal["light", "dark"]


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
      paper: background.
      ink: text and what matters.
      soft: secondary text.
      faint: rules and frames.
      accents: of the first class, the second class and others that are compared.
      sequential: colour map of what is positive.
      diverging: colour map of what has a sign.
    """

    paper: str
    ink: str
    soft: str
    faint: str
    accents: tuple[str, ...]
    sequential: str
    diverging: str


# Accents in the order of Okabe and Ito's palette, which colour-blind readers can tell apart.
THEMES = {
    "light": Theme(
        "#ffffff",
        "#17202a",
        "#5d6975",
        "#d5dbe1",
        ("#0069b4", "#c94f00", "#00805e", "#a8447f", "#7a6a00", "#3f88a8"),
        "Blues",
        "RdBu_r",
    ),
    "dark": Theme(
        "#0d1117",
        "#e8edf2",
        "#9aa6b2",
        "#333c47",
        ("#62b6f7", "#ff9d4d", "#3ecf9f", "#e794c4", "#e0cf4f", "#9fd3e8"),
        "cividis",
        "RdBu_r",
    ),
}


def theme_of(name: ThemeName) -> Theme:
    """The theme of this name; a ValueError if there is none."""
    if name not in get_args(ThemeName):
        raise ValueError(f"theme must be one of {', '.join(THEMES)}, got {name!r}")
    return THEMES[name]


@contextlib.contextmanager
def themed(name: ThemeName) -> Iterator[Theme]:
    """Matplotlib's settings in this theme, for as long as the context lasts."""
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
        "font.family": "DejaVu Sans",
        "mathtext.fontset": "cm",
        "axes.prop_cycle": cycler(color=theme.accents),
    }
    with mpl.rc_context(settings):
        yield theme


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that no window and no global state knows of."""
    return Figure(figsize=(width, height), layout="constrained")
