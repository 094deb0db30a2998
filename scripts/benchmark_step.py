"""Compares whole train steps: implementations of the class capsules, and PyTorch."""

import dataclasses
import sys
from pathlib import Path

import jax
import tyro

from capsjax.bench import StepSizes, TargetError, benchmark_step, show, write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(StepSizes):
    """Compare whole train steps; where PyTorch is installed, ratios are to its compiled step."""

    rounds: int = 9
    """Counted calls of each program, in alternation."""

    torch: bool = True
    """Whether PyTorch takes part, if it is installed."""

    target: str | None = None
    """Compile for this device and do not call, such as v5e-1; None is the one of this machine."""

    json: Path | None = None
    """Also add the rows to this file, as JSON lines."""


def main() -> None:
    """Measures, prints a table, and writes the rows."""
    options = tyro.cli(Options)
    if options.json and not options.json.parent.is_dir():
        sys.exit(f"benchmark_step.py: error: --json: no directory {options.json.parent}")
    try:
        rows = benchmark_step(
            options, rounds=options.rounds, target=options.target, torch=options.torch
        )
    except TargetError as error:
        sys.exit(f"benchmark_step.py: error: --target: {error}")
    base = "torch.compile" if any(row.name == "torch.compile" for row in rows) else "reference"
    device = options.target or jax.devices()[0].device_kind
    run = "compiled and not run" if options.target else f"{options.rounds} rounds in alternation"
    print(
        f"preset {options.preset}, {options.batch} examples, {options.dtype}; {device}, jax"
        f" {jax.__version__}; {run}; ratios to {base}, MB of temporary memory; PyTorch's"
        " compilation is its first call"
    )
    show(rows, base)
    if options.json:
        sizes = {f.name: getattr(options, f.name) for f in dataclasses.fields(StepSizes)}
        write(rows, base, options.json, device=device, **sizes)


if __name__ == "__main__":
    main()
