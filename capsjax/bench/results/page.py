"""Rows as a self-contained HTML page."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from capsjax.bench.results import estimates
from capsjax.bench.results.columns import COLUMNS, NOTE
from capsjax.bench.results.rows import Row
from capsjax.bench.scaling import estimate_scaling
from capsjax.bench.workloads import WORKLOADS
from capsjax.errors import ConfigError, how_to_install
from capsjax.files import write_text


def write_report(rows: Sequence[Row], path: Path, *, title: str = "capsjax bench") -> None:
    """Writes a page with plots and tables of rows.

    The page includes the plotting library and all data, and opens without a network.

    Args:
      rows: rows as from :func:`capsjax.bench.read_rows`.
      path: path of the page.
      title: heading of the page.

    Raises:
      ConfigError: the extra ``bench`` is not installed.
    """
    try:
        import jinja2
        import plotly.graph_objects as go
        import plotly.io
        import plotly.offline
    except ImportError:
        raise ConfigError(f"the HTML report needs: {how_to_install('bench')}") from None
    figures = []
    for number, (heading, note, traces, axes) in enumerate(_figures(rows)):
        figure = go.Figure(traces)
        figure.update_layout(
            template="plotly_white",
            height=420,
            margin={"l": 70, "r": 20, "t": 20, "b": 60},
            legend={"orientation": "h", "y": -0.25},
            xaxis={"title": axes[0], **axes[2]},
            yaxis={"title": axes[1], **axes[3]},
            font={"size": 14},
        )
        markup = plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{number}",
            config={"responsive": True, "displaylogo": False},
        )
        figures.append({"heading": heading, "note": note, "markup": markup})
    scalings = estimate_scaling(rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("page.html.jinja")
    text = template.render(
        title=title,
        plotly=plotly.offline.get_plotlyjs(),
        figures=figures,
        note=NOTE,
        columns=list(COLUMNS),
        rows=[_table_row(row) for row in rows],
        scalings=[
            {
                "title": estimates.title(each),
                "headings": estimates.headings(each),
                "rows": [estimates.cells(each, step) for step in each.steps],
                "verdict": estimates.verdict(each),
            }
            for each in scalings
        ],
        assumptions=estimates.assumptions(scalings) if scalings else "",
        environments=_environments(rows),
        contributors=_contributors(rows),
    )
    write_text(path, text)


def _figures(rows: Sequence[Row]) -> Iterable[tuple[str, str, list[dict[str, Any]], Any]]:
    """Yields heading, note, traces and axes of each plot for which the rows have data."""
    log, linear = {"type": "log"}, {"rangemode": "tozero"}
    compiled = _series(
        rows,
        "routing",
        "iterations",
        lambda r: _median(r, "compile"),
        ("algorithm", "loop", "implementation", "direction"),
    )
    if compiled:
        yield (
            "Compile time against iterations and loop form",
            "Median of cold compilations, each in a fresh process. Bars show the range.",
            compiled,
            ("iterations", "compile, seconds", linear, linear),
        )
    stacked = _series(
        rows, "stack", "layers", lambda r: _median(r, "compile"), ("loop", "direction")
    )
    if stacked:
        yield (
            "Compile time against stacked layers",
            "Median of cold compilations.",
            stacked,
            ("layers", "compile, seconds", linear, linear),
        )
    fixed = {"iterations": 3, "algorithm": "dynamic", "loop": "fori_loop"}
    memory = _series(
        rows, "routing", "batch", _temporaries, ("implementation", "direction"), fixed=fixed
    )
    if memory:
        yield (
            "Memory against batch",
            "Temporary memory of dynamic routing with 3 iterations, as the compiler reports it.",
            memory,
            ("batch", "temporaries, MB", log, log),
        )
    bounds = [(row, row.run, row.run.roofline) for row in rows if row.run and row.run.roofline]
    if bounds:
        ideal = [1e3 * bound.seconds for _, _, bound in bounds]
        found = [1e3 * run.median_seconds for _, run, _ in bounds]
        ends = [min(ideal + found), max(ideal + found)]
        yield (
            "Run time against the roofline",
            "The least time follows from the measured speeds of a matrix product and of a sum over"
            " memory. A program on the line reaches it. Programs whose data stay in a cache may lie"
            " below the line.",
            [
                {
                    "x": ideal,
                    "y": found,
                    "name": "cells",
                    "mode": "markers",
                    "text": [row.cell for row, _, _ in bounds],
                },
                {"x": ends, "y": ends, "name": "roofline", "mode": "lines"},
            ],
            ("least time, ms", "run, ms", log, log),
        )
    for count, scale, heading, note, unit in (
        (
            "cycles",
            1.0,
            "Cycles on absent TPUs",
            "The compiler's estimate for one device, with loops counted in full. It leaves out"
            " custom calls and collectives.",
            "cycles",
        ),
        (
            "estimate",
            1e3,
            "Time on GPUs, estimated",
            "An untuned estimate for one device, with loops counted in full: the compiler's for"
            " fusions, and the least time of matrix products and convolutions. It leaves out other"
            " custom calls and collectives.",
            "ms",
        ),
    ):
        estimated = [(row.cell, row.counts[count]) for row in rows]
        bars = [(cell, scale * total) for cell, total in estimated if total]
        if bars:
            x, y = zip(*bars, strict=True)
            trace = {"x": x, "y": y, "name": f"estimated {unit}", "type": "bar"}
            yield heading, note, [trace], ("", unit, {}, linear)


def _series(
    rows: Sequence[Row],
    workload: str,
    over: str,
    value: Any,
    by: Sequence[str],
    fixed: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Returns traces of a measure over a parameter, one per combination of the others."""
    kind = WORKLOADS[workload]
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    lines: dict[tuple[Any, ...], dict[Any, tuple[float, float, float]]] = {}
    others = [name for name in defaults if name != over]
    for row in rows:
        if row.workload != workload or row.error:
            continue
        parameters = {**defaults, **row.parameters}
        found = value(row)
        if found is None or not str(parameters[over]).isdecimal():
            continue
        if any(str(parameters[name]) != str(each) for name, each in (fixed or {}).items()):
            continue
        key = (*(str(parameters[name]) for name in others), row.target, *row.xla_flags)
        lines.setdefault(key, {})[int(parameters[over])] = found
    traces = []
    for key, points in sorted(lines.items()):
        if len(points) < 2:
            continue
        named = dict(zip(others, key, strict=False))
        labels = [named[name] for name in by] + list(key[len(others) :])
        x = sorted(points)
        traces.append(
            {
                "x": x,
                "y": [points[i][0] for i in x],
                "name": ", ".join(labels),
                "mode": "lines+markers",
                "error_y": {
                    "type": "data",
                    "array": [points[i][2] - points[i][0] for i in x],
                    "arrayminus": [points[i][0] - points[i][1] for i in x],
                },
            }
        )
    return traces


def _median(row: Row, stage: str) -> tuple[float, float, float] | None:
    values = row.stages.get(stage)
    return (statistics.median(values), min(values), max(values)) if values else None


def _temporaries(row: Row) -> tuple[float, float, float] | None:
    if row.memory is None or row.memory.temporaries is None:
        return None
    return (row.memory.temporaries / 1e6,) * 3


def _table_row(row: Row) -> dict[str, Any]:
    if row.error:
        return {"cell": row.cell, "error": f"{row.error.stage}: {row.error.message}"}
    return {"cell": row.cell, "error": None, "values": [text(row) for text in COLUMNS.values()]}


def _environments(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Returns the distinct environments of the rows."""
    seen = []
    for row in rows:
        values = {name: _shown(value) for name, value in row.base_environment.items()}
        if values not in seen:
            seen.append(values)
    return seen


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value if value is not None else "")


def _contributors(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns cycles on absent TPUs or time on absent GPUs by source line."""
    found = []
    for row in rows:
        if row.hlo and (estimate := row.hlo.estimate):
            unit, scale, digits = ("cycles", 1, 0) if row.hlo.cycles else ("us", 1e6, 1)
            lines = list(estimate.by_source.items())[:10]
            missing = (f"{name} ({n:g} times)" for name, n in estimate.without_estimate.items())
            found.append(
                {
                    "cell": row.cell,
                    "unit": unit,
                    "lines": [
                        (
                            source or "no line",
                            f"{scale * each:,.{digits}f}",
                            f"{each / estimate.total:.1%}",
                        )
                        for source, each in lines
                    ],
                    "missing": ", ".join(missing),
                }
            )
    return found
