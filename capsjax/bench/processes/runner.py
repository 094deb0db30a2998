"""Measures cells in fresh processes, one per repetition, and writes a row per cell."""

import contextlib
import dataclasses
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsjax.bench.cells import Cell, groups
from capsjax.bench.environment import Environment, read_environment
from capsjax.bench.processes.measure import Measurement, Request, measure_cells
from capsjax.bench.processes.roofline import Roofline, measure_roofline
from capsjax.bench.processes.timing import Times
from capsjax.bench.results.rows import Alternation, Bound, Failure, Row, Run, append_rows, read_rows
from capsjax.bench.targets import parse_target, take_libtpu
from capsjax.errors import ConfigError, DataError

_TARGET_SECONDS = 300  # to look a target up
# What all rows of a file must have in common. Instruction sets, memory and system may differ.
_VERSIONS = tuple(
    field.name
    for field in dataclasses.fields(Environment)
    if field.name not in ("cpu_features", "memory_bytes", "system")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How cells are measured.

    Attributes:
      output: file to append rows to.
      repetitions: number of processes per cell or group.
      timeout: time limit of one process, seconds.
      run_seconds: about how long each process runs a program; 0 to compile only.
      hlo: directory for the texts of programs, or None.
      alternate: name of a parameter. Cells that differ in nothing else form a group, which is
        compiled in one process and run in alternation; ratios are to its first cell that does not
        fail. When None, each cell has its own process.
      roofline: whether to measure the peak speed of the machine, in a separate process.
      profile: whether to trace kernels on GPUs.
      check: whether to compare results with those of the plain implementation in float64.
      peer_seconds: time limit of compilation by another compiler, or None.
    """

    output: Path
    repetitions: int = 3
    timeout: float = 900.0
    run_seconds: float = 1.0
    hlo: Path | None = None
    alternate: str | None = None
    roofline: bool = True
    profile: bool = False
    check: bool = False
    peer_seconds: float | None = None


def remaining(cells: Sequence[Cell], plan: Plan) -> list[Cell]:
    """Returns the cells of all groups with a cell that has no row in the plan's file, or failed.

    Cells without an implementation on their target are not tried again.

    Raises:
      DataError: the file does not hold rows, or was measured in another environment.
      OSError: the file cannot be read.
    """
    rows = [row for row in read_rows(plan.output) if not row.error or row.error.is_unsupported]
    here = dataclasses.asdict(read_environment())
    for row in rows:
        for name in _VERSIONS:
            if (there := row.base_environment.get(name)) != here[name]:
                raise DataError(
                    f"{plan.output} was measured with {name} {there}, but here it is {here[name]}"
                )
    done = {row.cell for row in rows}
    left = (g for g in groups(cells, plan.alternate) if not done.issuperset(c.key for c in g))
    return [cell for group in left for cell in group]


def run_cells(
    cells: Sequence[Cell],
    plan: Plan,
    *,
    on_start: Callable[[str], None] = lambda description: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> None:
    """Measures cells and appends a row for each to the plan's file.

    The row of a cell that fails has the reason; the others are still measured.

    Args:
      cells: the cells to measure.
      plan: how to measure them.
      on_start: called with a description of each process before it starts.
      on_row: called with each row.

    Raises:
      KeyboardInterrupt: interrupted; the running process has been killed.
    """
    rooflines: dict[str, Roofline | None] = {}
    here = dataclasses.asdict(read_environment())
    for group in groups(cells, plan.alternate):
        target = parse_target(group[0].target)
        platform = target.platform
        if plan.roofline and not target.is_absent and platform not in rooflines:
            on_start(f"roofline @ {platform}")
            found = _call(_measure_roofline, platform, _environment(platform), plan.timeout)
            rooflines[platform] = found if isinstance(found, Roofline) else None
        repetitions: list[Sequence[Measurement]] = []
        for repetition in range(plan.repetitions):
            others = f" and {len(group) - 1} more" if len(group) > 1 else ""
            on_start(group[0].key + others)
            repetitions.append(_repetition(group, plan, repetition == 0))
            if all(each.error for each in repetitions[-1]):
                break
        roofline = rooflines.get(platform)
        rows = [
            _row(cell, measurements, roofline, here)
            for cell, measurements in zip(group, zip(*repetitions, strict=True), strict=True)
        ]
        if len(group) > 1:
            base = next((row for row in rows if not row.error), rows[0])
            rows = [dataclasses.replace(row, alternation=_beside(row, base)) for row in rows]
        append_rows(plan.output, rows)
        for row in rows:
            on_row(row)


def check_targets(cells: Sequence[Cell]) -> None:
    """Raises a ConfigError if this machine cannot serve one of the targets.

    Each is looked up in a separate process, which may need other settings than this one.
    """
    for name in dict.fromkeys(cell.target for cell in cells):
        if parse_target(name).platform == "cpu":
            continue
        found = _call(_missing_devices, name, _environment(name), _TARGET_SECONDS)
        if message := found.message if isinstance(found, Failure) else found:
            raise ConfigError(message)


def _measure_roofline(platform: str) -> Roofline:
    return measure_roofline(parse_target(platform).devices())


def _missing_devices(name: str) -> str:
    """Returns why the target cannot be served; empty if it can."""
    target = parse_target(name)
    try:
        if target.platform == "tpu":
            take_libtpu()
        target.devices()
    except ConfigError as error:
        return str(error)
    return ""


def _repetition(group: Sequence[Cell], plan: Plan, is_first: bool) -> Sequence[Measurement]:
    """Measures a group in a separate process."""
    with tempfile.TemporaryDirectory(prefix="capsjax-bench-") as cache:
        begun = time.time()
        request = Request(
            cells=tuple(group),
            begun=begun,
            cache=Path(cache),
            analyse=is_first,
            run_seconds=plan.run_seconds,
            texts=plan.hlo.resolve() if plan.hlo and is_first else None,
            profile=plan.profile and is_first,
            check=plan.check and is_first,
            peer_seconds=plan.peer_seconds,
        )
        environment = _environment(group[0].target, group[0].xla_flags)
        found = _call(measure_cells, request, environment, plan.timeout)
        ended = time.time()
    if isinstance(found, Failure):
        return [Measurement(error=found) for _ in group]
    for each in found:
        each.stages["exit"] = ended - each.ended
        each.wall_seconds = ended - begun
    return list(found)


def _call(
    function: Callable[[Any], Any], argument: Any, environment: Mapping[str, str], timeout: float
) -> Any:
    """Calls a function in a fresh process; returns its result or a Failure."""
    with tempfile.TemporaryDirectory(prefix="capsjax-bench-") as folder:
        call, result, log = (Path(folder, name) for name in ("call", "result", "log"))
        call.write_bytes(pickle.dumps((function, argument)))
        command = [sys.executable, "-m", "capsjax.bench.processes.worker", str(call), str(result)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                return Failure("process", "timeout", f"took longer than {timeout:.0f} seconds")
            finally:
                # Kills the whole process group, as compilers start processes too.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not result.exists():
            return Failure("process", "died", _reason(process.returncode, log))
        return pickle.loads(result.read_bytes())


def _environment(target: str, xla_flags: Sequence[str] = ()) -> dict[str, str]:
    """Returns the environment of a process for a target; flags of the TPU compiler go to libtpu."""
    parsed = parse_target(target)
    environment = {**os.environ, **parsed.environment}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for_libtpu = [flag for flag in xla_flags if flag.startswith("--xla_tpu")]
    others = [flag for flag in xla_flags if flag not in for_libtpu]
    for name, flags in (
        ("XLA_FLAGS", [*parsed.xla_flags, *others]),
        ("LIBTPU_INIT_ARGS", for_libtpu),
    ):
        # The cell's own flags come last and take precedence.
        if flags:
            environment[name] = " ".join([*os.environ.get(name, "").split(), *flags])
    return environment


def _reason(code: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1][:300] if lines else "no output"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as the system does when memory runs out"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}: {last}"
    return f"ended with exit code {code}: {last}"


def _row(
    cell: Cell,
    measurements: Sequence[Measurement],
    roofline: Roofline | None,
    here: dict[str, Any],
) -> Row:
    """Makes the row of a cell from all its processes."""
    first, whole = measurements[0], [each for each in measurements if not each.error]
    error = next((each.error for each in measurements if each.error), None)
    names = sorted({name for each in whole for name in each.stages})
    operations = first.stablehlo
    return Row(
        cell=cell.key,
        workload=cell.workload,
        parameters=dict(cell.parameters),
        target=cell.target,
        xla_flags=cell.xla_flags,
        status="failed" if error else "ok",
        error=error,
        repetitions=len(whole),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        stages={n: tuple(e.stages[n] for e in whole if n in e.stages) for n in names},
        wall_seconds=tuple(each.wall_seconds for each in whole),
        devices=first.devices,
        processes=first.processes,
        device_kind=first.device_kind,
        cache=first.cache,
        command=first.command,
        stablehlo=operations and {"instructions": sum(operations.values()), "opcodes": operations},
        hlo=first.program,
        memory=first.memory,
        run=_run(whole, first, roofline),
        profile=first.profile,
        deviation=first.deviation,
        environment=first.environment,
        base_environment=here,
    )


def _run(
    measurements: Sequence[Measurement], first: Measurement, roofline: Roofline | None
) -> Run | None:
    """Returns the run times over all processes, and the fraction of the roofline."""
    times = [each.times for each in measurements if each.times]
    if not times:
        return None
    calls = Times(tuple(second for each in times for second in each.seconds))
    bound = None
    cost, memory = first.program and first.program.cost, first.memory
    if roofline and cost and memory and first.devices == 1:
        # Arguments and results have to be moved at least once.
        least = roofline.seconds(cost.flops, memory.arguments + memory.outputs)
        bound = Bound(**dataclasses.asdict(roofline), seconds=least, fraction=least / calls.median)
    return Run(
        median_seconds=calls.median,
        least_seconds=calls.spread[0],
        most_seconds=calls.spread[1],
        first_seconds=tuple(each.first_seconds or 0.0 for each in measurements),
        medians=tuple(each.median for each in times),
        calls=tuple(each.seconds for each in times),
        roofline=bound,
    )


def _beside(row: Row, base: Row) -> Alternation:
    """Returns the ratios to the base of the group."""
    if row.error or base.error:
        return Alternation(base.cell)
    return Alternation(base.cell, ratio=_ratio(row, base), temporaries=_memory_ratio(row, base))


def _ratio(row: Row, base: Row) -> float | None:
    if row.run and base.run:
        pairs = zip(row.run.calls, base.run.calls, strict=True)
        return statistics.median(Times(a).ratio(Times(b)) for a, b in pairs)
    estimates = [each.hlo.estimate for each in (row, base) if each.hlo and each.hlo.estimate]
    # A program with kernels that have no estimate cannot be compared.
    if len(estimates) < 2 or any(each.has_kernels for each in estimates):
        return None
    return estimates[0].total / estimates[1].total


def _memory_ratio(row: Row, base: Row) -> float | None:
    if not (row.memory and base.memory and base.memory.temporaries):
        return None
    of_row = row.memory.temporaries
    return None if of_row is None else of_row / base.memory.temporaries
