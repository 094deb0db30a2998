"""Rows on a terminal: a growing table with a progress bar below it."""

import math
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from capsjax.bench.results import estimates
from capsjax.bench.results.columns import COLUMNS
from capsjax.bench.results.comparison import TIMES, Comparison, Ratio
from capsjax.bench.results.rows import Row
from capsjax.bench.scaling import Scaling

_STAGED = (
    "trace",
    "lower",
    "compile",
    "load",
    "run ms",
    "instr.",
    "MB",
    "Mcycles",
    "kernels",
    "est. ms",
)
# Columns for programs on several absent devices.
_PLANNED = ("compile", "args MB", "MB", "Mcycles", "kernels", "est. ms", "collectives")
_COMPARED = (
    "compile",
    "run ms",
    "range ms",
    "Mcycles",
    "est. ms",
    "ratio",
    "MB",
    "MB ratio",
    "GFLOP",
    "GB",
)


def console() -> Console:
    """Returns a console for standard output, wide if that is a file."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


class Display:
    """Shows rows as they come.

    Args:
      total: number of cells that will be measured.
      rows: rows from an earlier run.
    """

    def __init__(self, total: int, rows: Sequence[Row] = ()):
        self._console = console()
        self._rows = list(rows)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=total)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Display":
        """Starts the display."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the whole table on the terminal."""
        if self._console.is_terminal:
            self._live.stop()
        self._console.print(rows_table(self._rows))

    def start(self, description: str) -> None:
        """Called when a process begins."""
        self._progress.update(self._task, description=description)
        self._refresh()

    def row(self, row: Row) -> None:
        """Called when a cell is finished."""
        self._rows.append(row)
        self._progress.advance(self._task)
        if not self._console.is_terminal:
            error = f": {row.error.message}" if row.error else ""
            print(f"{row.status:6} {row.cell}{error}", flush=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._console.is_terminal:
            # Only the last rows fit on the screen; all are printed at the end.
            fitting = self._rows[-max(3, self._console.height - 8) :]
            self._live.update(Group(rows_table(fitting), self._progress))


def rows_table(rows: Sequence[Row]) -> Table:
    """Returns a table of rows, with medians over the repetitions."""
    names = list(_STAGED)
    if any(row.alternation for row in rows):
        names = list(_COMPARED)
    elif any(COLUMNS["collectives"](row) for row in rows) and not any(row.run for row in rows):
        names = list(_PLANNED)
    # Nothing runs on absent targets, and only their compilers give estimates.
    names = [name for name in names if any(COLUMNS[name](row) for row in rows)]
    table = Table(caption_justify="left")
    if "est. ms" in names:
        table.caption = "est. ms: an untuned estimate, often too short"
    table.add_column("seconds unless stated", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=name != "collectives")
    for row in rows:
        if row.error:
            reason = escape(f"{row.error.stage}: {row.error.message}")
            table.add_row(f"{escape(row.cell)}\n[red]{reason}[/red]")
        else:
            table.add_row(escape(row.cell), *(COLUMNS[name](row) for name in names))
    return table


def scaling_table(scaling: Scaling) -> Table:
    """Returns a table of estimated scaling."""
    table = Table(
        title=escape(estimates.title(scaling)),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )
    for heading in estimates.headings(scaling):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in scaling.steps:
        table.add_row(*estimates.cells(scaling, step))
    return table


def comparison_table(ratios: Sequence[Ratio], threshold: float) -> Table:
    """Returns a table of ratios, with those above the threshold marked."""
    table = Table()
    table.add_column("cell", overflow="fold")
    for column in ("measure", "old", "new", "new / old", "95 % interval", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for each in ratios:
        interval = "one repetition" if each.low is None else f"{each.low:.3f} to {each.high:.3f}"
        if each.low == each.high and each.low is not None:
            interval = "exact"
        table.add_row(
            each.cell,
            each.measure,
            _value(each, each.old),
            _value(each, each.new),
            f"{each.ratio:.3f}",
            interval,
            "worse" if each.is_worse(threshold) else "",
        )
    return table


def is_telling(ratio: Ratio) -> bool:
    """Whether a ratio shows a change."""
    if ratio.low is None or ratio.high is None:
        return False
    return not (ratio.low <= 1 <= ratio.high) and not math.isclose(ratio.ratio, 1, rel_tol=0.02)


def summary(comparison: Comparison, threshold: float) -> str:
    """Summarises a comparison in one line."""
    worse, pairs = comparison.worse(threshold), {r.cell for r in comparison.ratios}
    unsure = sum(ratio.low is None for ratio in comparison.ratios)
    parts = [f"{len(pairs)} cells in both", f"{len(worse)} measures worse than {threshold:g}"]
    if comparison.broken:
        parts.append(f"{len(comparison.broken)} cells now fail")
    for name, cells in (("old", comparison.only_old), ("new", comparison.only_new)):
        if cells:
            parts.append(f"{len(cells)} only in the {name} file")
    if unsure:
        parts.append(f"{unsure} times not judged: a single repetition")
    return "; ".join(parts)


def _value(ratio: Ratio, value: float) -> str:
    if ratio.measure == "estimate":
        return f"{1e3 * value:,.3f} ms"
    return f"{value:.4g} s" if ratio.measure in TIMES else f"{value:,.0f}"
