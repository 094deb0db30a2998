"""Options of ``capsjax bench`` and ``capsjax bench compare``."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from capsjax.errors import ConfigError
from capsjax.files import expand_paths

Suite = Literal["quick", "routing", "hotos", "train", "pod"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Benchmark XLA compilation: stages, instructions, memory, cost and run time of programs.

    Without a workload a suite is measured: quick (under 2 minutes on 2 cores), routing, hotos,
    train, or pod (needs libtpu: three absent pods, with estimates of scaling). Rows go to a file of
    JSON lines, and an HTML report beside it. Compare two files with: capsjax bench compare OLD NEW

    Exit code 1 if a cell failed, except where the target has no such implementation, or if none
    succeeded.
    """

    suite: Suite | None = None
    """Suite to measure; quick if neither it nor a workload is named."""

    target: tuple[str, ...] = ()
    """What to compile for: cpu, cpu:8, gpu, tpu, or an absent TPU or GPU such as v5e-256, v6e-8,
    h100 or h200:8. If not given, the CPU, or v5e-256, v6e-256 and v5p-128 for the suite pod."""

    workload: str | None = None
    """One workload instead of a suite: squash, routing, stack, hotos, hotos_gcc, convolution,
    forward, train_step, train_steps, pmap_train_step; or a function of your own,
    module:function."""

    set: tuple[str, ...] = ()
    """Parameters of the workload, such as iterations=1,3,10 loop=fori_loop,unrolled; several values
    are swept."""

    alternate: str | None = None
    """Parameter to compare, such as implementation: cells that differ in nothing else are compiled
    in one process and run in alternation. Ratios are to its first value in --set that does not
    fail; without values, all are compared."""

    shape: tuple[str, ...] = ()
    """Arguments of your own function, such as f32[128,784] i32[128]."""

    xla_flag: tuple[str, ...] = ()
    """Sets of XLA flags to sweep, such as '' --xla_a=1 '--xla_a=1 --xla_b=2': each a string, empty
    for none. Those of the TPU's compiler go to libtpu."""

    repetitions: int | None = None
    """Fresh processes for each cell. If not given, 1 for quick, pod and --alternate, else 3;
    comparisons of times need 2."""

    run_seconds: float = 0.5
    """About how long each program is run in each process, at least four times; 0 for not at all."""

    timeout: float = 900.0
    """Seconds that one process may take before its cells count as failed."""

    output: Path | None = None
    """File for the rows; bench-SUITE-TIME.jsonl if not given."""

    resume: bool = False
    """Continue the file --output: only cells without a row, and those that failed, are measured."""

    hlo: Path | None = None
    """Directory for the StableHLO and the compiled HLO of each cell."""

    report: bool = True
    """Write the HTML report, which needs the extra bench."""

    def __post_init__(self) -> None:
        """Checks options that depend on each other."""
        expand_paths(self, "output", "hlo")
        if self.suite is not None and self.workload is not None:
            raise ConfigError(f"--suite {self.suite} has no effect with --workload {self.workload}")
        if self.output is not None and self.output.suffix.lower() in (".html", ".htm"):
            raise ConfigError(f"--output is for rows, the report is a page, got {self.output}")
        if self.repetitions is not None and self.repetitions < 1:
            raise ConfigError(f"--repetitions must be at least 1, got {self.repetitions}")
        if not 0 <= self.run_seconds < math.inf:
            raise ConfigError(f"--run-seconds must be finite, at least 0, got {self.run_seconds}")
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"--timeout must be finite and positive, got {self.timeout}")
        if self.set and self.workload is None:
            raise ConfigError("--set goes with --workload")
        if self.shape and ":" not in (self.workload or ""):
            raise ConfigError("--shape goes with --workload module:function")
        if self.resume and self.output is None:
            raise ConfigError("--resume needs --output, the file to continue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare two files of rows; exit code 3 if a measure is worse than the threshold allows."""

    old: Path
    """Rows of the run to compare with."""

    new: Path
    """Rows of the run in question."""

    threshold: float = 1.1
    """Ratio, new by old, above which a measure is worse: for times the lower end of the 95 %
    interval, for counts the ratio itself."""

    measure: tuple[str, ...] = ()
    """What to compare: trace, lower, compile, load, run, instructions, fusions, flops, bytes,
    temporaries, cycles, kernels, estimate; all if not given."""

    all: bool = False
    """Print every ratio, not only those beyond 2 % or the interval."""

    def __post_init__(self) -> None:
        """Checks the threshold."""
        if not 0 < self.threshold < math.inf:
            raise ConfigError(f"--threshold must be finite and positive, got {self.threshold}")
