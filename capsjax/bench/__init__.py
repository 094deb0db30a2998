"""Benchmarks: timing programs, reading compiled programs, and recording the results."""

from capsjax.bench.cells import Cell, suite_cells
from capsjax.bench.command import run_benchmark, run_comparison
from capsjax.bench.config import BenchConfig, CompareConfig
from capsjax.bench.environment import Environment, read_environment
from capsjax.bench.gpus import GPUS, Gpu, known_gpu
from capsjax.bench.processes.runner import Plan, run_cells
from capsjax.bench.processes.timing import Times, alternate
from capsjax.bench.programs.estimate import Cycles, Estimate
from capsjax.bench.programs.kernels import Kernels
from capsjax.bench.programs.program import Collective, Cost, Loop, Program, read_program
from capsjax.bench.results.comparison import Comparison, Ratio, compare_rows
from capsjax.bench.results.page import write_report
from capsjax.bench.results.rows import (
    Alternation,
    Bound,
    Deviation,
    Failure,
    Kernel,
    Memory,
    Profile,
    Row,
    Run,
    append_rows,
    read_rows,
)
from capsjax.bench.scaling import Scaling, ScalingStep, estimate_scaling
from capsjax.bench.sizes import CAPSULE_SIZES, CapsuleSizes
from capsjax.bench.targets import Target, libtpu_lock, parse_target, take_libtpu
from capsjax.bench.workloads import WORKLOADS, make_workload

__all__ = [
    "CAPSULE_SIZES",
    "GPUS",
    "WORKLOADS",
    "Alternation",
    "BenchConfig",
    "Bound",
    "CapsuleSizes",
    "Cell",
    "Collective",
    "CompareConfig",
    "Comparison",
    "Cost",
    "Cycles",
    "Deviation",
    "Environment",
    "Estimate",
    "Failure",
    "Gpu",
    "Kernel",
    "Kernels",
    "Loop",
    "Memory",
    "Plan",
    "Profile",
    "Program",
    "Ratio",
    "Row",
    "Run",
    "Scaling",
    "ScalingStep",
    "Target",
    "Times",
    "alternate",
    "append_rows",
    "compare_rows",
    "estimate_scaling",
    "known_gpu",
    "libtpu_lock",
    "make_workload",
    "parse_target",
    "read_environment",
    "read_program",
    "read_rows",
    "run_benchmark",
    "run_cells",
    "run_comparison",
    "suite_cells",
    "take_libtpu",
    "write_report",
]
