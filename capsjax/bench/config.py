"""Options of ``capsjax bench``, and what it does with them."""

import dataclasses
import time
from pathlib import Path

from capsjax.bench.cells import Cell, Suite, make_cells, suite_cells, sweep
from capsjax.bench.running import Plan, check_targets, remaining
from capsjax.bench.workloads import import_function


class BenchError(ValueError):
    """Options do not go together; the message is one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Benchmark XLA compilation: stages, instructions, memory, cost and run time of programs.

    Without a workload a suite is measured: quick (under 2 minutes on 2 cores), routing, hotos,
    train, or pod (minutes, needs libtpu). Rows go to a file of JSON lines, and an HTML report
    beside it. Compare two files with: capsjax bench compare OLD NEW
    """

    suite: Suite = "quick"
    """Suite to measure, if no workload is named."""

    target: tuple[str, ...] = ()
    """What to compile for: cpu, cpu:8, gpu, tpu, or a TPU that is not here, such as v5e-256,
    v5p-128 or v6e-8. The CPU if not given; for the suite pod v5e-256."""

    workload: str | None = None
    """One workload instead of a suite: squash, routing, stack, hotos, hotos_gcc, forward,
    train_step, pmap_train_step; or a function of your own, module:function."""

    set: tuple[str, ...] = ()
    """Parameters of the workload, such as iterations=1,3,10 loop=fori_loop,unrolled; several values
    are swept."""

    shape: tuple[str, ...] = ()
    """Arguments of your own function, such as f32[128,784] i32[128]."""

    xla_flag: tuple[str, ...] = ()
    """Sets of XLA flags to sweep, such as '' --xla_a=1 '--xla_a=1 --xla_b=2': each a text, the
    empty one for none. Those of the TPU's compiler go to libtpu."""

    repetitions: int | None = None
    """Fresh processes for each cell. If not given 1 for quick and pod, else 3; comparisons of times
    need 2."""

    run_seconds: float = 0.5
    """About how long a program is run in each process, at least four times; 0 for not at all."""

    timeout: float = 900.0
    """Seconds that one process may take before its cell counts as failed."""

    output: Path | None = None
    """File for the rows; bench-SUITE-TIME.jsonl if not given."""

    resume: bool = False
    """Go on with the rows of --output: what it holds is not measured again."""

    hlo: Path | None = None
    """Directory for the StableHLO and the compiled HLO of each cell."""

    report: bool = True
    """Write the HTML report, which needs the extra bench."""

    def __post_init__(self) -> None:
        """Checks what one option says about another."""
        if self.repetitions is not None and self.repetitions < 1:
            raise BenchError(f"--repetitions must be at least 1, got {self.repetitions}")
        if self.run_seconds < 0:
            raise BenchError(f"--run-seconds must not be negative, got {self.run_seconds}")
        if self.timeout <= 0:
            raise BenchError(f"--timeout must be positive, got {self.timeout}")
        if self.set and self.workload is None:
            raise BenchError("--set goes with --workload")
        if self.shape and ":" not in (self.workload or ""):
            raise BenchError("--shape goes with --workload module:function")
        if self.resume and self.output is None:
            raise BenchError("--resume needs --output, the file to go on with")

    def cells(self) -> list[Cell]:
        """The cells to measure.

        Raises:
          BenchError, TargetError, WorkloadError: a name is unknown.
        """
        if self.workload is None:
            return suite_cells(self.suite, self.target, self.xla_flag)
        settings = dict(map(_setting, self.set))
        if ":" in self.workload:
            import_function(self.workload)
            settings["shapes"] = [" ".join(self.shape)]
        entries = sweep(self.workload, settings)
        return make_cells(entries, self.target or ("cpu",), self.xla_flag)

    def plan(self) -> Plan:
        """How they are measured, and where the rows go.

        Raises:
          BenchError: the file is there already, or its directory is not.
        """
        name = (self.workload or self.suite).replace(":", ".")
        output = self.output or Path(f"bench-{name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
        if not output.parent.is_dir():
            raise BenchError(f"--output: no directory {output.parent}")
        if output.exists() and not self.resume:
            raise BenchError(f"--output: {output} is there already; --resume goes on with it")
        if self.resume and not output.exists():
            raise BenchError(f"--resume: no file {output}")
        few = self.workload is None and self.suite in ("quick", "pod")
        return Plan(
            output=output,
            repetitions=self.repetitions or (1 if few else 3),
            timeout=self.timeout,
            run_seconds=self.run_seconds,
            hlo=self.hlo,
        )

    def left(self, plan: Plan) -> list[Cell]:
        """The cells that have no row yet, whose targets this machine can serve.

        Raises:
          BenchError, TargetError, WorkloadError, RowError: as above.
        """
        cells = self.cells()
        if plan.output.exists():
            cells = remaining(cells, plan.output)
        check_targets(cells)
        return cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare two files of rows; exit code 1 if something is worse than the threshold allows."""

    old: Path
    """Rows of the run to compare with."""

    new: Path
    """Rows of the run in question."""

    threshold: float = 1.1
    """Ratio, new by old, above which a measure is worse: for times the lower end of the 95 %
    interval, for counts the ratio itself."""

    measure: tuple[str, ...] = ()
    """What to compare: trace, lower, compile, load, run, instructions, fusions, flops, bytes,
    temporaries, cycles; all if not given."""

    all: bool = False
    """Print every ratio, not only those beyond 2 % or the interval."""


def _setting(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise BenchError(f"--set must be like iterations=1,3, got {text!r}")
    return name.strip(), [value for value in values.split(",") if value]
