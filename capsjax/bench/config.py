"""Options of ``capsjax bench`` and ``capsjax bench compare``."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from capsjax.errors import ConfigError
from capsjax.options import check_types, expand_paths, require, require_at_least

Suite = Literal["quick", "routing", "hotos", "train", "pod"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Benchmark XLA compilation: stages, instructions, memory, cost and run time of programs.

    Without a workload, a suite is measured: quick (under 2 minutes on 2 cores), routing, hotos,
    train, or pod (needs libtpu: three absent pods, with estimates of scaling). Results are written
    as JSON lines, one row per cell, and as an HTML report beside them. Compare two files with:
    capsjax bench compare OLD NEW

    The exit code is 1 if no cell succeeded, or if one failed for another reason than that its
    target has no such implementation.
    """

    suite: Suite | None = None
    """Suite to measure. By default, quick, unless a workload is given."""

    target: tuple[str, ...] = ()
    """What to compile for: cpu, cpu:8, gpu, tpu, or an absent TPU or GPU such as v5e-256, v6e-8,
    h100 or h200:8. By default, the CPU; v5e-256, v6e-256 and v5p-128 for the suite pod."""

    workload: str | None = None
    """One workload instead of a suite: squash, routing, stack, hotos, hotos_gcc, convolution,
    forward, train_step, train_steps, pmap_train_step; or your own function, module:function."""

    set: tuple[str, ...] = ()
    """Parameters of the workload, such as iterations=1,3,10 loop=fori_loop,unrolled. Several values
    are swept."""

    alternate: str | None = None
    """Parameter to compare, such as implementation. Cells that differ in nothing else are compiled
    in one process and run in alternation. Ratios are to the first of its values in --set that does
    not fail; without --set, all values are compared."""

    shape: tuple[str, ...] = ()
    """Arguments of your own function, such as f32[128,784] i32[128]."""

    xla_flag: tuple[str, ...] = ()
    """Sets of XLA flags to sweep, one string each, such as '' --xla_a=1 '--xla_a=1 --xla_b=2'. The
    empty string is no flags. Flags of the TPU compiler go to libtpu."""

    repetitions: int | None = None
    """Number of fresh processes per cell. By default, 1 for quick, pod and --alternate, else 3.
    Comparisons of times need at least 2."""

    run_seconds: float = 0.5
    """About how long each process runs each program, at least four times; 0 to compile only."""

    timeout: float = 900.0
    """Seconds after which a process is ended and its cells count as failed."""

    output: Path | None = None
    """File for the rows. By default, bench-SUITE-TIME.jsonl."""

    resume: bool = False
    """Continue the file --output: measure only cells that have no row or failed."""

    hlo: Path | None = None
    """Directory for the StableHLO and the compiled HLO of each cell."""

    report: bool = True
    """Write the HTML report. It needs the extra bench."""

    def __post_init__(self) -> None:
        """Checks options that depend on each other."""
        check_types(self)
        expand_paths(self, "output", "hlo")
        if self.suite is not None and self.workload is not None:
            raise ConfigError(f"--suite {self.suite} has no effect with --workload {self.workload}")
        if self.output is not None and self.output.suffix.lower() in (".html", ".htm"):
            raise ConfigError(f"--output is for rows, not for the HTML report, got {self.output}")
        require_at_least(self, 1, "repetitions")
        require(self, "run_seconds", 0 <= self.run_seconds < math.inf, "finite, at least 0")
        require(self, "timeout", 0 < self.timeout < math.inf, "finite and positive")
        if self.set and self.workload is None:
            raise ConfigError("--set needs --workload")
        if self.shape and ":" not in (self.workload or ""):
            raise ConfigError("--shape needs --workload module:function")
        if self.resume and self.output is None:
            raise ConfigError("--resume needs --output, the file to continue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare two benchmarks; the exit code is 3 if a measure is worse than the threshold."""

    old: Path
    """Rows to compare with."""

    new: Path
    """Rows to judge."""

    threshold: float = 1.1
    """Ratio of new to old above which a measure counts as worse. For times it is compared with the
    lower end of the 95 % interval, for counts with the ratio itself."""

    measure: tuple[str, ...] = ()
    """Measures to compare: trace, lower, compile, load, run, instructions, fusions, flops, bytes,
    temporaries, cycles, kernels, estimate. By default, all."""

    all: bool = False
    """Print every ratio. By default, only those beyond 2 % or the interval."""

    def __post_init__(self) -> None:
        """Checks types and the threshold."""
        check_types(self)
        expand_paths(self, "old", "new")
        require(self, "threshold", 0 < self.threshold < math.inf, "finite and positive")
