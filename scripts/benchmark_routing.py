"""Compares implementations of votes and dynamic routing: time, memory, operations."""

import dataclasses
import sys
from pathlib import Path

import jax
import tyro

from capsjax.bench import RoutingSizes, TargetError, benchmark_routing, show, write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RoutingSizes):
    """Compare implementations of votes and dynamic routing."""

    rounds: int = 9
    """Counted calls of each program, in alternation."""

    target: str | None = None
    """Compile for this device and do not call, such as v5e-1; None is the one of this machine."""

    json: Path | None = None
    """Also add the rows to this file, as JSON lines."""


def main() -> None:
    """Measures, prints a table, and writes the rows."""
    options = tyro.cli(Options)
    if options.json and not options.json.parent.is_dir():
        sys.exit(f"benchmark_routing.py: error: --json: no directory {options.json.parent}")
    try:
        rows = benchmark_routing(options, rounds=options.rounds, target=options.target)
    except TargetError as error:
        sys.exit(f"benchmark_routing.py: error: --target: {error}")
    device = options.target or jax.devices()[0].device_kind
    run = "compiled and not run" if options.target else f"{options.rounds} rounds in alternation"
    print(
        f"{options.batch} examples, {options.children} children of {options.in_features} to"
        f" {options.parents} parents of {options.features}, {options.num_iterations} iterations,"
        f" {options.dtype}; {device}, jax {jax.__version__}; {run}; ratios to the"
        " reference, MB of temporary memory"
    )
    show(rows, "reference")
    if options.json:
        sizes = {f.name: getattr(options, f.name) for f in dataclasses.fields(RoutingSizes)}
        write(rows, "reference", options.json, device=device, **sizes)


if __name__ == "__main__":
    main()
