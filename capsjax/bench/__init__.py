"""Benchmarks (floor 5): one way to time, to read compiled programs, and to keep what was found."""

from capsjax.bench.environment import Environment, read_environment
from capsjax.bench.measurement import Measurement, show, write
from capsjax.bench.program import Collective, Cost, Cycles, Loop, Program, read_program
from capsjax.bench.routing import Direction, RoutingSizes, benchmark_routing
from capsjax.bench.rows import RowError, append_row, read_rows
from capsjax.bench.step import StepSizes, benchmark_step
from capsjax.bench.targets import Target, TargetError, libtpu_lock, parse_target
from capsjax.bench.timing import Times, alternate

__all__ = [
    "Collective",
    "Cost",
    "Cycles",
    "Direction",
    "Environment",
    "Loop",
    "Measurement",
    "Program",
    "RoutingSizes",
    "RowError",
    "StepSizes",
    "Target",
    "TargetError",
    "Times",
    "alternate",
    "append_row",
    "benchmark_routing",
    "benchmark_step",
    "libtpu_lock",
    "parse_target",
    "read_environment",
    "read_program",
    "read_rows",
    "show",
    "write",
]
