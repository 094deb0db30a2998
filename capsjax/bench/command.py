"""Runs ``capsjax bench`` and ``capsjax bench compare``."""

import os
import shlex
import sys
import time
from pathlib import Path

from capsjax.bench.cells import Cell, groups, make_cells, suite_cells, sweep
from capsjax.bench.config import BenchConfig, CompareConfig
from capsjax.bench.processes.runner import Plan, check_targets, remaining, run_cells
from capsjax.bench.results.comparison import COUNTS, TIMES, compare_rows
from capsjax.bench.results.page import write_report
from capsjax.bench.results.rows import Row, read_rows
from capsjax.bench.scaling import Scaling, estimate_scaling
from capsjax.bench.workloads import choices, import_function
from capsjax.errors import ConfigError

_WORSE = 3  # exit code of a comparison; errors have 1 and 2


def run_benchmark(config: BenchConfig) -> int:
    """Measures cells, shows a table, and writes rows and a report.

    Returns:
      The exit code: 1 if no cell succeeded, or if one failed for another reason than that its
      target has no such implementation; else 0.

    Raises:
      ConfigError: an option is invalid, or this machine cannot serve a target.
      DataError: the file to continue does not hold rows.
    """
    from capsjax.bench.results.table import Display

    sys.path.insert(0, os.getcwd())  # for the user's own functions
    cells, plan = select_cells(config), make_plan(config)
    missing, rows = cells, []
    if plan.output.exists():
        missing = remaining(cells, plan)
        again = {cell.key for cell in missing}
        rows = [row for row in read_rows(plan.output) if row.cell not in again]
    check_targets(missing)
    try:
        with Display(len(missing), rows) as display:
            run_cells(missing, plan, on_start=display.start, on_row=display.row)
    except KeyboardInterrupt:
        if plan.output.exists():
            path = shlex.quote(str(plan.output))
            print(f"stopped; continue with the same options and: --resume --output {path}")
        raise
    print(f"rows: {plan.output}")
    rows = read_rows(plan.output)
    _print_scaling(estimate_scaling(rows))
    if config.report and rows:
        _report(rows, plan.output)
    if count := sum(row.status != "ok" for row in rows):
        print(f"{count} of {len(rows)} cells failed")
    asked = {cell.key for cell in cells}
    errors = [row.error for row in rows if row.cell in asked]
    failed = any(error and not error.is_unsupported for error in errors)
    return int(failed or (bool(errors) and None not in errors))


def run_comparison(config: CompareConfig) -> int:
    """Compares two files of rows and prints what changed.

    Returns:
      The exit code: 3 if a measure is worse than the threshold, or a cell now fails; else 0.

    Raises:
      ConfigError: a measure is unknown, or the files have no cell in common.
      DataError: a file does not hold rows, or its last line is cut off.
    """
    from capsjax.bench.results.table import comparison_table, console, is_telling, summary

    known = (*TIMES, *COUNTS)
    if unknown := set(config.measure).difference(known):
        raise ConfigError(f"--measure must be among {', '.join(known)}, got {min(unknown)}")
    measures = config.measure or known
    old, new = (read_rows(path, complete=True) for path in (config.old, config.new))
    comparison = compare_rows(old, new, measures=measures)
    if not comparison.ratios and not comparison.broken:
        raise ConfigError(f"{config.old} and {config.new} have no cell in common")
    shown = [
        ratio
        for ratio in comparison.ratios
        if config.all or is_telling(ratio) or ratio.is_worse(config.threshold)
    ]
    if shown:
        console().print(comparison_table(shown, config.threshold))
    for cell in comparison.broken:
        print(f"now fails: {cell}")
    print(summary(comparison, config.threshold))
    return _WORSE if comparison.broken or comparison.worse(config.threshold) else 0


def select_cells(config: BenchConfig) -> list[Cell]:
    """Returns the cells that the options name.

    Raises:
      ConfigError: a name is unknown.
    """
    cells = _named_cells(config)
    if not cells:  # a workload for CPUs only was requested for another target
        raise ConfigError(f"--workload {config.workload} has no cell for these targets and flags")
    if config.alternate and len(groups(cells, config.alternate)) == len(cells):
        raise ConfigError(f"--alternate: no two cells differ only in {config.alternate!r}")
    return cells


def make_plan(config: BenchConfig) -> Plan:
    """Returns how to measure the cells, and where to write the rows.

    Raises:
      ConfigError: the file already exists, its directory does not, or ``--hlo`` names a file.
    """
    suite = config.suite or "quick"
    name = (config.workload or suite).replace(":", ".")
    output = config.output or Path(f"bench-{name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
    if not output.parent.is_dir():
        raise ConfigError(f"--output: no directory {output.parent}")
    if output.exists() and not config.resume:
        raise ConfigError(f"--output: {output} exists already; --resume continues it")
    if config.resume and not output.exists():
        raise ConfigError(f"--resume: no file {output}")
    page = _page(output)
    if config.report and page.exists() and not config.resume:
        raise ConfigError(f"--output: the report {page} exists already; --no-report writes none")
    if config.hlo is not None and config.hlo.exists() and not config.hlo.is_dir():
        raise ConfigError(f"--hlo must be a directory, got the file {config.hlo}")
    few = config.alternate or (config.workload is None and suite in ("quick", "pod"))
    return Plan(
        output=output,
        repetitions=config.repetitions or (1 if few else 3),
        timeout=config.timeout,
        run_seconds=config.run_seconds,
        hlo=config.hlo,
        alternate=config.alternate,
    )


def _named_cells(config: BenchConfig) -> list[Cell]:
    if config.workload is None:
        return suite_cells(config.suite or "quick", config.target, config.xla_flag)
    settings = dict(map(_setting, config.set))
    if ":" in config.workload:
        import_function(config.workload)
        settings["shapes"] = [" ".join(config.shape)]
    elif config.alternate is not None and config.alternate not in settings:
        settings[config.alternate] = list(choices(config.workload, config.alternate))
        if not settings[config.alternate]:
            raise ConfigError(
                f"--alternate {config.alternate} needs its values: --set {config.alternate}=...,..."
            )
    entries = sweep(config.workload, settings)
    return make_cells(entries, config.target or ("cpu",), config.xla_flag)


def _setting(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    found = [value for value in values.split(",") if value]
    if not equals or not found:
        raise ConfigError(f"--set must be like iterations=1,3, got {text!r}")
    return name.strip(), found


def _print_scaling(scalings: list[Scaling]) -> None:
    from capsjax.bench.results import estimates
    from capsjax.bench.results.table import console, scaling_table

    for scaling in scalings:
        console().print(scaling_table(scaling))
        console().print(estimates.verdict(scaling), "\n")
    if scalings:
        console().print(estimates.assumptions(scalings), "\n")


def _page(output: Path) -> Path:
    return output.with_suffix(".html")


def _report(rows: list[Row], output: Path) -> None:
    page = _page(output)
    try:
        write_report(rows, page, title=f"capsjax bench: {output.stem}")
    except ConfigError as error:
        print(error)
    else:
        print(f"report: {page}")
