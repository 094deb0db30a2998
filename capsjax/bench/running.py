"""Runs cells in fresh processes: one for each repetition, a row for each cell."""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsjax.bench.cells import Cell
from capsjax.bench.environment import read_environment
from capsjax.bench.roofline import Roofline
from capsjax.bench.rows import Row, RowError, append_row, read_rows
from capsjax.bench.targets import TargetError, parse_target

_VERSIONS = (
    "capsjax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "python",
    "cpu",
    "xla_flags",
    "libtpu_init_args",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How cells are measured.

    Attributes:
      output: file that rows are added to.
      repetitions: processes for each cell.
      timeout: seconds for one process.
      run_seconds: about how long a program is run in each process; 0 for not at all.
      hlo: directory for the texts that were judged, or None.
    """

    output: Path
    repetitions: int = 3
    timeout: float = 900.0
    run_seconds: float = 1.0
    hlo: Path | None = None


def remaining(cells: Sequence[Cell], output: Path) -> list[Cell]:
    """Cells that a file has no row of yet.

    Raises:
      RowError, OSError: the file cannot be read.
      RowError: its rows were measured in another environment.
    """
    rows = read_rows(output)
    here = read_environment()._asdict()
    for row in rows:
        for name in _VERSIONS:
            if row["base_environment"].get(name) != here[name]:
                raise RowError(
                    f"{output} was measured with {name} {row['base_environment'].get(name)}, here"
                    f" it is {here[name]}"
                )
    done = {row["cell"] for row in rows}
    return [cell for cell in cells if cell.key not in done]


def run_cells(
    cells: Sequence[Cell],
    plan: Plan,
    *,
    on_start: Callable[[Cell, int], None] = lambda cell, repetition: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> None:
    """Measures cells and adds a row of each to the plan's file.

    A cell that fails is a row with its reason; the others go on.

    Args:
      cells: to measure.
      plan: how.
      on_start: is told of each process before it starts.
      on_row: is given each row.

    Raises:
      KeyboardInterrupt: as it comes, after the process under way has been ended.
    """
    rooflines: dict[str, Roofline | None] = {}
    base = read_environment()
    for cell in cells:
        target = parse_target(cell.target)
        kind = target.platform
        if not target.is_absent and kind not in rooflines:
            on_start(Cell("roofline", (), kind), 0)
            rooflines[kind] = _roofline(kind, plan.timeout)
        repetitions = []
        for repetition in range(plan.repetitions):
            on_start(cell, repetition)
            texts = plan.hlo / cell.file_name if plan.hlo and repetition == 0 else None
            found = _run_process(
                cell, plan, analyse=repetition == 0, texts=texts, timeout=plan.timeout
            )
            repetitions.append(found)
            if "error" in found:
                break
        row = _row(cell, repetitions, rooflines.get(kind), base._asdict())
        append_row(plan.output, row)
        on_row(row)


def check_targets(cells: Sequence[Cell], *, timeout: float = 300) -> None:
    """Raises a TargetError if this machine cannot serve one of the targets.

    Each is asked for in a process of its own, which may need settings that this one has not.
    """
    for name in dict.fromkeys(cell.target for cell in cells):
        target = parse_target(name)
        if target.platform == "cpu":
            continue
        code = (
            "import sys\nfrom capsjax.bench.targets import *\n"
            "try:\n with libtpu_lock(): parse_target(sys.argv[1]).devices()\n"
            "except TargetError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, name],
            env=_environment(Cell("", (), name)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
        )
        if said := done.stdout.strip():
            raise TargetError(said.splitlines()[-1])


def _roofline(platform: str, timeout: float) -> Roofline | None:
    plan = Plan(output=Path(os.devnull), run_seconds=0)
    found = _run_process(
        Cell("roofline", (), platform), plan, analyse=False, texts=None, timeout=timeout
    )
    return Roofline(**found["roofline"]) if "roofline" in found else None


def _environment(cell: Cell) -> dict[str, str]:
    """Variables of the cell's process. Flags of the TPU's compiler go to libtpu."""
    target = parse_target(cell.target)
    environment = {**os.environ, **target.environment}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for_libtpu = [flag for flag in cell.xla_flags if flag.startswith("--xla_tpu")]
    others = [flag for flag in cell.xla_flags if flag not in for_libtpu]
    for name, flags in (
        ("XLA_FLAGS", [*target.xla_flags, *others]),
        ("LIBTPU_INIT_ARGS", for_libtpu),
    ):
        # The cell's own come last, and win.
        if flags:
            environment[name] = " ".join([*os.environ.get(name, "").split(), *flags])
    return environment


def _run_process(
    cell: Cell, plan: Plan, *, analyse: bool, texts: Path | None, timeout: float
) -> dict[str, Any]:
    """What one repetition found: fields of a row, or ``error``; and the seconds it took."""
    with tempfile.TemporaryDirectory(prefix="capsjax-bench-") as folder:
        request, result, said = (Path(folder, name) for name in ("request", "result", "said"))
        begun = time.time()
        asked = {
            "workload": cell.workload,
            "parameters": dict(cell.parameters),
            "target": cell.target,
            "begun": begun,
            "cache": str(Path(folder, "cache")),
            "analyse": analyse,
            "run_seconds": plan.run_seconds,
            "texts": str(texts.resolve()) if texts else None,
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-m", "capsjax.bench.worker", str(request), str(result)]
        with said.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                env=_environment(cell),
                stdout=stderr,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            timed_out = False
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                # The whole group: compilers start processes of their own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        wall = time.time() - begun
        if timed_out:
            return _failed("timeout", f"took longer than {timeout:.0f} seconds")
        if not result.exists():
            return _failed("died", _why(process.returncode, said))
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        found["stages"]["exit"] = begun + wall - found.pop("ended")
        return {**found, "wall_seconds": wall}


def _failed(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"stage": "process", "type": kind, "message": message}}


def _why(code: int, said: Path) -> str:
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1][:300] if lines else "it said nothing"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as the system does where memory runs out"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}: {last}"
    return f"ended with exit code {code}: {last}"


def _row(
    cell: Cell,
    repetitions: Sequence[Mapping[str, Any]],
    roofline: Roofline | None,
    base: Mapping[str, Any],
) -> Row:
    """One row out of the repetitions of a cell."""
    whole = [each for each in repetitions if "error" not in each]
    errors = [each["error"] for each in repetitions if "error" in each]
    row: Row = {
        "cell": cell.key,
        "workload": cell.workload,
        "parameters": dict(cell.parameters),
        "target": cell.target,
        "xla_flags": list(cell.xla_flags),
        "status": "failed" if errors else "ok",
        "error": errors[0] if errors else None,
        "repetitions": len(whole),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base_environment": dict(base),
    }
    if not repetitions:
        return row
    first = repetitions[0]
    names = {name for each in whole for name in each["stages"]}
    row["environment"] = first.get("environment")
    row["stages"] = {n: [e["stages"][n] for e in whole if n in e["stages"]] for n in sorted(names)}
    row["wall_seconds"] = [each["wall_seconds"] for each in whole]
    kept = ("devices", "device_kind", "cache", "stablehlo", "hlo", "memory", "gcc")
    row |= {name: first[name] for name in kept if name in first}
    if runs := [each["run"] for each in whole if "run" in each]:
        row["run"] = _summary(runs, row, roofline)
    return row


def _summary(runs: Sequence[Mapping[str, Any]], row: Row, roofline: Roofline | None) -> Row:
    """Run times over all processes, and how near they come to the roofline."""
    medians = [statistics.median(each["seconds"]) for each in runs]
    calls = [second for each in runs for second in each["seconds"]]
    summary: Row = {
        "median_seconds": statistics.median(calls),
        "least_seconds": min(calls),
        "most_seconds": max(calls),
        "first_seconds": [each["first_seconds"] for each in runs],
        "medians": medians,
        "calls": [each["seconds"] for each in runs],
    }
    cost = (row.get("hlo") or {}).get("cost")
    if roofline and cost and row["devices"] == 1:
        # What has to be moved: arguments and results, once.
        moved = row["memory"]["arguments"] + row["memory"]["outputs"]
        ideal = roofline.seconds(cost["flops"], moved)
        summary["roofline"] = {**roofline._asdict(), "seconds": ideal}
        summary["roofline"]["fraction"] = ideal / summary["median_seconds"]
    return summary
