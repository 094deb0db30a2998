"""Rows on a terminal: a table that grows, a bar below it."""

import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from capsjax.bench.cells import Cell
from capsjax.bench.compare import Comparison, Ratio
from capsjax.bench.rows import Row

_COLUMNS = ("trace", "lower", "compile", "load", "run ms", "instr.", "MB", "cycles")


def console() -> Console:
    """Of the standard output; where that is a file there is no width to keep to."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


class Display:
    """Shows rows while they come.

    Args:
      total: number of processes that will be started.
      rows: that are there already.
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
        self._started = -1

    def __enter__(self) -> "Display":
        """Begins to show."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the whole table on the terminal."""
        if self._console.is_terminal:
            self._live.stop()
        self._console.print(rows_table(self._rows))

    def start(self, cell: Cell, repetition: int) -> None:
        """A process begins."""
        if cell.workload != "roofline":
            self._started += 1
        self._progress.update(self._task, completed=max(0, self._started), description=cell.key)
        self._refresh()

    def row(self, row: Row, done: int) -> None:
        """A cell is finished, and so many processes."""
        self._rows.append(row)
        self._started = done - 1
        self._progress.update(self._task, completed=done)
        if not self._console.is_terminal:
            error = f": {row['error']['message']}" if row["error"] else ""
            print(f"{row['status']:6} {row['cell']}{error}", flush=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._console.is_terminal:
            # What does not fit on the screen scrolls away; all of it is printed at the end.
            fitting = self._rows[-max(3, self._console.height - 8) :]
            self._live.update(Group(rows_table(fitting), self._progress))


def rows_table(rows: Sequence[Row]) -> Table:
    """A table of rows: medians over the repetitions."""
    table = Table()
    table.add_column("seconds unless stated", overflow="fold")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["status"] != "ok":
            error = row["error"]
            table.add_row(f"{row['cell']}\n[red]{error['stage']}: {error['message']}[/red]")
            continue
        stages = [_median(row["stages"].get(name)) for name in _COLUMNS[:4]]
        run = (row.get("run") or {}).get("median_seconds")
        hlo, memory = row.get("hlo") or {}, row.get("memory") or {}
        cycles = hlo.get("cycles")
        temporaries = memory.get("temporaries")
        table.add_row(
            row["cell"],
            *stages,
            "" if run is None else f"{1e3 * run:.2f}",
            f"{hlo['instructions']:,}" if "instructions" in hlo else "",
            "" if temporaries is None else f"{temporaries / 1e6:.1f}",
            _cycles(cycles),
        )
    return table


def comparison_table(ratios: Sequence[Ratio], threshold: float) -> Table:
    """A table of ratios; those past the threshold are marked."""
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
    """Whether a ratio says that something has changed."""
    if ratio.low is None or ratio.high is None:
        return False
    return not (ratio.low <= 1 <= ratio.high) and not math.isclose(ratio.ratio, 1, rel_tol=0.02)


def summary(comparison: Comparison, threshold: float) -> str:
    """One line on a comparison."""
    worse, pairs = comparison.worse(threshold), {r.cell for r in comparison.ratios}
    unsure = sum(ratio.low is None for ratio in comparison.ratios)
    parts = [f"{len(pairs)} cells in both", f"{len(worse)} measures worse than {threshold:g}"]
    if comparison.broken:
        parts.append(f"{len(comparison.broken)} cells fail now")
    for name, cells in (("old", comparison.only_old), ("new", comparison.only_new)):
        if cells:
            parts.append(f"{len(cells)} only in the {name} file")
    if unsure:
        parts.append(f"{unsure} times not judged: a single repetition")
    return "; ".join(parts)


def _median(values: Any) -> str:
    return f"{statistics.median(values):.3f}" if values else ""


def _cycles(cycles: Any) -> str:
    """Millions; with a plus where something is left out of them."""
    if not cycles:
        return ""
    return f"{cycles['total'] / 1e6:.2f} M{'+' if cycles['without_estimate'] else ''}"


def _value(ratio: Ratio, value: float) -> str:
    times = ("trace", "lower", "compile", "load", "run")
    return f"{value:.4f} s" if ratio.measure in times else f"{value:,.0f}"
