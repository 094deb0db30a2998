"""The measures of a row as text, for the table and the page."""

import statistics
from collections.abc import Callable

from capsjax.bench.results.rows import Row


def _stage(name: str) -> Callable[[Row], str]:
    return lambda row: f"{statistics.median(row.stages[name]):.3f}" if name in row.stages else ""


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{scale * value:,.{digits}f}"


def _count(name: str, scale: float = 1.0, digits: int = 0) -> Callable[[Row], str]:
    return lambda row: _number(row.counts[name], scale, digits)


def _median(row: Row) -> str:
    return _number(row.run.median_seconds, 1e3, 3) if row.run else ""


def _range(row: Row) -> str:
    if row.run is None:
        return ""
    return f"{1e3 * row.run.least_seconds:.3f}-{1e3 * row.run.most_seconds:.3f}"


def _fraction(row: Row) -> str:
    bound = row.run.roofline if row.run else None
    return f"{bound.fraction:.1%}" if bound else ""


def _loops(row: Row) -> str:
    counts = [loop.trip_count for loop in row.hlo.loops] if row.hlo else []
    return ", ".join("?" if count is None else str(count) for count in counts)


def _collectives(row: Row) -> str:
    kinds = row.hlo.collectives if row.hlo else {}
    return ", ".join(
        f"{each.executions:g} {name} {each.bytes / 1e6:.2f} MB" for name, each in kinds.items()
    )


def _arguments(row: Row) -> str:
    return _number(row.memory.arguments, 1e-6, 2) if row.memory else ""


def _estimate(name: str, scale: float) -> Callable[[Row], str]:
    """With a plus if some instructions have no estimate."""

    def show(row: Row) -> str:
        found = row.hlo.estimate if row.hlo and row.counts[name] is not None else None
        return _number(found.total, scale, 3) + "+" * bool(found.without_estimate) if found else ""

    return show


def _kinds(row: Row) -> str:
    launches = row.hlo.kernels.launches if row.hlo and row.hlo.kernels else {}
    return ", ".join(f"{count:g} {kind}" for kind, count in launches.items())


def _cuts(row: Row) -> str:
    return f"{row.hlo.kernels.graph_cuts:g}" if row.hlo and row.hlo.kernels else ""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "trace": _stage("trace"),
    "lower": _stage("lower"),
    "compile": _stage("compile"),
    "load": _stage("load"),
    "run ms": _median,
    "range ms": _range,
    "ratio": lambda row: _number(row.alternation.ratio, 1, 3) if row.alternation else "",
    "of roofline": _fraction,
    "instr.": _count("instructions"),
    "fusions": _count("fusions"),
    "loop trips": _loops,
    "GFLOP": _count("flops", 1e-9, 3),
    "GB": _count("bytes", 1e-9, 3),
    "args MB": _arguments,
    "MB": _count("temporaries", 1e-6, 2),
    "MB ratio": lambda row: _number(row.alternation.temporaries, 1, 3) if row.alternation else "",
    "collectives": _collectives,
    "Mcycles": _estimate("cycles", 1e-6),
    "kernels": _count("kernels"),
    "by kind": _kinds,
    "graph cuts": _cuts,
    "est. ms": _estimate("estimate", 1e3),
}
NOTE = (
    "Stages are in seconds. Compile is cold, load is from the persistent cache. For another"
    " compiler, compile is its whole work. Ratios are to the first cell of a group that ran in"
    " alternation; run times are compared within each round. GFLOP, GB moved, MB of arguments"
    " (args MB) and of temporary memory (MB), bytes of collectives, Mcycles, kernels and est. ms"
    " are per device and count loops in full. Mcycles is the TPU compiler's estimate. Est. ms is"
    " an untuned estimate for a GPU: the compiler's for fusions; for matrix products, convolutions"
    " and copies the least time at the published speed of the chip, which libraries do not reach."
    " A plus means that some custom calls, copies or collectives have no estimate. Kernels is the"
    " number of launches of one run on a GPU. Graph cuts counts the convolutions by cuDNN, each of"
    " which ends a CUDA graph. A loop with ? trips counts once and waits for the host in each"
    " iteration."
)
