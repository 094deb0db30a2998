"""What is measured of one program: time, memory, operations, and a table of several."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from capsjax.bench.environment import read_environment
from capsjax.bench.program import Cost, Cycles, read_program
from capsjax.bench.rows import append_row
from capsjax.bench.targets import Target
from capsjax.bench.timing import Times, alternate


class Measurement(NamedTuple):
    """What was measured of one program; None is what could not be.

    Attributes:
      kind: what the program does, such as ``"forward"``; only alike ones are compared.
      name: which program it is.
      reason: why there is nothing, if it cannot run.
      compile_seconds: time to trace, lower and compile, once.
      times: of the compiled program, where its device is in this machine.
      temporary_bytes: memory that it takes beside arguments and results.
      cost: operations and traffic, by XLA's cost model.
      cycles: the TPU compiler's estimate; it has none of kernels.
    """

    kind: str
    name: str
    reason: str | None = None
    compile_seconds: float | None = None
    times: Times | None = None
    temporary_bytes: int | None = None
    cost: Cost | None = None
    cycles: Cycles | None = None


class Compiled(NamedTuple):
    """A compiled program, and what its compiler tells of it."""

    call: Callable[..., Any]
    measurement: Measurement


def compile_for(
    target: Target,
    kind: str,
    name: str,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    **jit_options: Any,
) -> Compiled:
    """Compiles a function for the first device of a target.

    Args:
      target: see :func:`capsjax.bench.parse_target`.
      kind: what the program does.
      name: which program it is.
      function: to be compiled.
      arguments: trees of arrays or of their shapes and dtypes.
      **jit_options: of :func:`jax.jit`.

    Returns:
      A :class:`Compiled`; where the implementation cannot run on the target, calling it raises, and
      the measurement has the reason.

    Raises:
      TargetError: this machine cannot serve the target.
    """
    place = SingleDeviceSharding(target.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), list(arguments)
    )
    start = time.perf_counter()
    try:
        compiled = jax.jit(function, **jit_options).lower(*shapes).compile()
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return Compiled(function, Measurement(kind, name, reason=str(error)))
    seconds = time.perf_counter() - start
    found = read_program(compiled.as_text() or "")
    memory = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    return Compiled(
        compiled, Measurement(kind, name, None, seconds, None, memory, found.cost, found.cycles)
    )


def timed(
    calls: Mapping[str, Callable[[], Any]],
    measurements: Sequence[Measurement],
    *,
    rounds: int,
    pause: float = 0.0,
) -> list[Measurement]:
    """The measurements with the times of their calls, see :func:`capsjax.bench.alternate`."""
    times = alternate(calls, rounds=rounds, pause=pause)
    return [each._replace(times=times.get(each.name)) for each in measurements]


def ratio(one: Measurement, other: Measurement) -> float | None:
    """Of times, or if there are none of cycles; None if these leave out kernels, or are missing."""
    if one.times and other.times:
        return one.times.ratio(other.times)
    if one.cycles and other.cycles and not (_kernels(one) or _kernels(other)):
        return one.cycles.total / other.cycles.total
    return None


def show(measurements: Sequence[Measurement], base: str) -> None:
    """Prints a table for people; ratios are to the program `base` of the same kind."""
    table = Table()
    columns = (
        "",
        "",
        "median ms",
        "range ms",
        "Mcycles",
        "ratio",
        "MB",
        "ratio",
        "GFLOP",
        "GB moved",
        "compile s",
    )
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n > 1 else "left", no_wrap=True)
    bases = {each.kind: each for each in measurements if each.name == base}
    for each in measurements:
        if not each.reason:
            table.add_row(each.kind, each.name, *_cells(each, bases[each.kind]))
    # Where the output goes to a file there is no width to keep to.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(*_notes(measurements), sep="", end="")


def write(measurements: Sequence[Measurement], base: str, path: Path, **sizes: Any) -> None:
    """Adds a row for each measurement to a file, see :func:`capsjax.bench.append_row`.

    Args:
      measurements: of one call.
      base: the program that ratios are to.
      path: of the file.
      **sizes: what else the rows say.
    """
    environment = read_environment()
    bases = {each.kind: each for each in measurements if each.name == base}
    for each in measurements:
        row = {**sizes, **each._asdict(), "ratio": ratio(each, bases[each.kind])}
        append_row(path, {**row, "base": base, "environment": environment})


def _cells(each: Measurement, base: Measurement) -> list[str]:
    median = span = ""
    if each.times:
        low, high = each.times.spread
        median, span = f"{1e3 * each.times.median:.1f}", f"{1e3 * low:.1f}-{1e3 * high:.1f}"
    memory = None
    if base.temporary_bytes and each.temporary_bytes is not None:
        memory = each.temporary_bytes / base.temporary_bytes
    return [
        median,
        span,
        _number(each.cycles and each.cycles.total, 1e-6, 3) + ("+" if _kernels(each) else ""),
        _number(ratio(each, base), 1, 2),
        _number(each.temporary_bytes, 1e-6, 1),
        _number(memory, 1, 3),
        _number(each.cost and each.cost.flops, 1e-9, 1),
        _number(each.cost and each.cost.bytes, 1e-9, 2),
        _number(each.compile_seconds, 1, 1),
    ]


def _notes(measurements: Sequence[Measurement]) -> list[str]:
    """What a table cannot say: why a program is missing, and what cycles leave out."""
    missing = [f"{each.kind}, {each.name}: {each.reason}\n" for each in measurements if each.reason]
    without = [
        f"{each.kind}, {each.name}: and the cycles of {_kernels(each):g} kernels, of which the"
        " compiler has no estimate\n"
        for each in measurements
        if _kernels(each)
    ]
    return missing + without


def _kernels(each: Measurement) -> float:
    """Executions of kernels, which are in no estimate."""
    if each.cycles is None:
        return 0
    return each.cycles.without_estimate.get("custom-call tpu_custom_call", 0)


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"
