"""Compares implementations of votes and dynamic routing: time, memory, compilation."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from capsjax.bench import RoutingSizes, benchmark_routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RoutingSizes):
    """Compare implementations of votes and dynamic routing on the default device."""

    rounds: int = 9
    """Counted calls of each program, in alternation."""

    json: Path | None = None
    """Also write the rows to this file, as JSON lines."""


def main() -> None:
    """Measures, prints a table, and writes the rows."""
    options = tyro.cli(Options)
    if options.json and not options.json.parent.is_dir():
        sys.exit(f"benchmark_routing.py: error: --json: no directory {options.json.parent}")
    rows = benchmark_routing(options, rounds=options.rounds)
    device = jax.devices()[0].device_kind
    print(
        f"{options.batch} examples, {options.children} children of {options.in_features} to"
        f" {options.parents} parents of {options.features}, {options.num_iterations} iterations,"
        f" {options.dtype}; {device}, jax {jax.__version__}; {options.rounds} rounds in"
        " alternation, ratios to the reference, MB of temporary memory"
    )
    table = Table()
    for column in ("", "", "median ms", "range ms", "time ratio", "MB", "MB ratio", "compile s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    sizes = {f.name: getattr(options, f.name) for f in dataclasses.fields(RoutingSizes)}
    records = []
    for row in rows:
        reference = next(other for other in rows if other.direction == row.direction)
        low, high = row.times.spread
        ratio = row.times.ratio(reference.times)
        memory = row.temporary_bytes / max(1, reference.temporary_bytes)
        table.add_row(
            row.direction, row.implementation, f"{1e3 * row.times.median:.1f}",
            f"{1e3 * low:.1f}-{1e3 * high:.1f}", f"{ratio:.2f}", f"{row.temporary_bytes / 1e6:.1f}",
            f"{memory:.3f}", f"{row.compile_seconds:.1f}",
        )  # fmt: skip
        records.append(
            {
                **sizes, **row._asdict(), "times": row.times.seconds,
                "ratio": ratio, "jax": jax.__version__, "device": device,
            }
        )  # fmt: skip
    # Where the output goes to a file there is no width to keep to.
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if options.json:
        lines = (json.dumps(record, default=str) + "\n" for record in records)
        options.json.write_text("".join(lines))


if __name__ == "__main__":
    main()
