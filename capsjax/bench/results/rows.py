"""Rows of measurements in a file of JSON lines with a versioned schema."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from capsjax.bench.programs.program import Program
from capsjax.errors import DataError
from capsjax.files import naming

SCHEMA = "capsjax.bench"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a cell has no result.

    Attributes:
      stage: stage in which it failed; ``"process"`` if the whole process failed.
      type: type of the exception, or ``"timeout"`` or ``"died"``.
      message: one line of text.
    """

    stage: str
    type: str
    message: str

    @property
    def is_unsupported(self) -> bool:
        """Whether the target has no such implementation."""
        return self.type == NotImplementedError.__name__


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device as reported by the compiler; None if it does not tell."""

    arguments: int
    outputs: int
    aliased: int | None = None
    temporaries: int | None = None
    code: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time of a program on this machine.

    Attributes:
      flops_per_second: measured rate of a matrix product.
      bytes_per_second: measured rate of a sum over memory.
      seconds: the least time for the program's operations, arguments and results.
      fraction: the least time divided by the measured one.
    """

    flops_per_second: float
    bytes_per_second: float
    seconds: float
    fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Run times over all processes, in seconds.

    Attributes:
      median_seconds: median over all calls.
      least_seconds: the fastest call.
      most_seconds: the slowest call.
      first_seconds: the first call of each process, which the other fields exclude.
      medians: median over the calls of each process.
      calls: times of all calls, by process.
      roofline: bound by the machine; None for several devices, or without a count of operations.
    """

    median_seconds: float
    least_seconds: float
    most_seconds: float
    first_seconds: tuple[float, ...]
    medians: tuple[float, ...]
    calls: tuple[tuple[float, ...], ...]
    roofline: Bound | None = None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Kernels of one name: seconds and number of launches per call."""

    name: str
    seconds: float
    launches: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """The kernels that a call runs on a GPU, including copies.

    Attributes:
      seconds: sum over the kernels; they may overlap, and the device may be idle in between.
      launches: number of kernels.
      kernels: the most expensive kernels by name, in descending order.
    """

    seconds: float
    launches: float
    kernels: tuple[Kernel, ...]


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Largest relative error in norm among the results: found, and allowed for the dtype."""

    found: float
    allowed: float


@dataclasses.dataclass(frozen=True)
class Alternation:
    """A cell compared with the base of its group, with which it ran in alternation.

    Attributes:
      base: key of the base.
      ratio: median ratio of run times in the same round. If nothing ran, the ratio of estimated
        cycles or seconds, if both are complete except for copies and collectives.
      temporaries: ratio of temporary memory.
    """

    base: str
    ratio: float | None = None
    temporaries: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of one cell; None or empty if not measured.

    Attributes:
      cell: key of the cell; see :class:`capsjax.bench.Cell`.
      workload: name of the workload.
      parameters: given parameters of the workload.
      target: name of the target.
      xla_flags: flags of the cell.
      status: ``"ok"`` or ``"failed"``.
      error: why it failed.
      repetitions: number of processes that succeeded.
      time: UTC at the end of the last process.
      stages: seconds of each process by stage.
      wall_seconds: duration of each process.
      devices: number of devices that the program runs on.
      processes: number of processes that own these devices.
      device_kind: kind of the devices, such as ``"TPU v5 lite"``.
      cache: hits of the persistent cache in cold and warm compilation.
      command: command line of a compiler other than XLA.
      stablehlo: number of operations by name.
      hlo: the compiled program.
      memory: memory of each device.
      run: run times, on targets of this machine.
      profile: kernels of a GPU, if requested.
      deviation: deviation from the plain implementation in float64, if requested.
      alternation: ratios to the base, if cells ran in alternation.
      environment: environment of the processes.
      base_environment: environment of the process that started them.
    """

    cell: str
    workload: str
    parameters: dict[str, Any]
    target: str
    xla_flags: tuple[str, ...] = ()
    status: Literal["ok", "failed"] = "ok"
    error: Failure | None = None
    repetitions: int = 0
    time: str = ""
    stages: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    wall_seconds: tuple[float, ...] = ()
    devices: int | None = None
    processes: int | None = None
    device_kind: str | None = None
    cache: dict[str, int] | None = None
    command: str | None = None
    stablehlo: dict[str, Any] | None = None
    hlo: Program | None = None
    memory: Memory | None = None
    run: Run | None = None
    profile: Profile | None = None
    deviation: Deviation | None = None
    alternation: Alternation | None = None
    environment: dict[str, Any] | None = None
    base_environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that a failure has a reason."""
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"status is {self.status!r}, error is {self.error}")

    @property
    def counts(self) -> dict[str, float | None]:
        """Counts and estimates that depend only on the compiler."""
        hlo = self.hlo or Program()
        seconds = hlo.kernels.seconds if hlo.kernels else None
        return {
            "instructions": hlo.instructions,
            "fusions": hlo.fusion_count,
            "flops": hlo.cost.flops if hlo.cost else None,
            "bytes": hlo.cost.bytes if hlo.cost else None,
            "temporaries": self.memory.temporaries if self.memory else None,
            "cycles": hlo.cycles.total if hlo.cycles else None,
            "kernels": sum(hlo.kernels.launches.values()) if hlo.kernels else None,
            "estimate": seconds.total if seconds else None,
        }


@dataclasses.dataclass(frozen=True)
class _Header:
    schema: str | None = None
    version: int | None = None


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Appends rows to a file in one write, and syncs it to disk.

    Args:
      path: path of the file, which is created if missing.
      rows: each becomes a line with the name and the version of the schema.

    Raises:
      ValueError: a number is not finite.
      OSError: the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> from capsjax.bench import Row, append_rows, read_rows
      >>> row = Row(cell="squash @ cpu", workload="squash", parameters={}, target="cpu")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   path = pathlib.Path(folder, "rows.jsonl")
      ...   append_rows(path, [row])
      ...   read_rows(path)[0].workload
      'squash'
    """
    header = {"schema": SCHEMA, "version": VERSION}
    lines = [json.dumps(header | dataclasses.asdict(row), allow_nan=False) for row in rows]
    # A killed process may have left an incomplete line.
    broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("\n" * broken + "".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, *, complete: bool = False) -> list[Row]:
    """Reads the rows of a file; if a cell was measured again, only the last row.

    Args:
      path: path of the file.
      complete: whether to refuse a file whose last line was cut off; otherwise that line is
        ignored.

    Raises:
      DataError: a line is not a row or has an unknown version; the message names its number.
      OSError: the file cannot be read.
    """
    # Imported here, because measuring does not need it.
    import msgspec

    rows: dict[str, Row] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            header = msgspec.json.decode(line, type=_Header)
            if header.schema != SCHEMA:
                raise DataError(f"{path}:{number} is not a row of {SCHEMA}")
            if header.version != VERSION:
                raise DataError(
                    f"{path}:{number} has version {header.version}, this capsjax reads {VERSION}"
                )
            row = msgspec.json.decode(line, type=Row)
            rows[row.cell] = row
        except (msgspec.ValidationError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not a row of {SCHEMA}: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if not line.startswith(b'{"schema"'[: len(line)]) or "truncated" not in str(error):
                raise DataError(f"{path}:{number} is not JSON") from None
            if complete and number == len(lines):
                raise DataError(
                    f"{path}:{number} is cut off; --resume --output measures what is missing"
                ) from None
    return list(rows.values())
