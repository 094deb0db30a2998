"""Benchmarks: one way to time, to read compiled programs, and to keep what was found."""

from capsjax.bench.cells import Cell, suite_cells
from capsjax.bench.compare import Comparison, Ratio, compare_rows
from capsjax.bench.environment import Environment, read_environment
from capsjax.bench.measurement import Measurement, show, write
from capsjax.bench.program import Collective, Cost, Cycles, Loop, Program, read_program
from capsjax.bench.report import ReportError, write_report
from capsjax.bench.routing import Direction, RoutingSizes, benchmark_routing
from capsjax.bench.rows import RowError, append_row, read_rows
from capsjax.bench.running import Plan, run_cells
from capsjax.bench.step import StepSizes, benchmark_step
from capsjax.bench.targets import Target, TargetError, libtpu_lock, parse_target
from capsjax.bench.timing import Times, alternate
from capsjax.bench.workloads import WorkloadError, make_workload, workloads

__all__ = [
    "Cell",
    "Collective",
    "Comparison",
    "Cost",
    "Cycles",
    "Direction",
    "Environment",
    "Loop",
    "Measurement",
    "Plan",
    "Program",
    "Ratio",
    "ReportError",
    "RoutingSizes",
    "RowError",
    "StepSizes",
    "Target",
    "TargetError",
    "Times",
    "WorkloadError",
    "alternate",
    "append_row",
    "benchmark_routing",
    "benchmark_step",
    "compare_rows",
    "libtpu_lock",
    "make_workload",
    "parse_target",
    "read_environment",
    "read_program",
    "read_rows",
    "run_cells",
    "show",
    "suite_cells",
    "workloads",
    "write",
    "write_report",
]
