"""Sums a compiler's estimates of a program, and lists what they leave out."""

import dataclasses
import os
import site
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from capsjax.bench.programs.hlo import Instruction, Module, shape_bytes
from capsjax.bench.programs.loops import Execution

COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
# Custom calls that compute nothing.
FREE_CALLS = {"AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
# Opcodes that take time but have no estimate outside fusions.
WORK = {
    "fusion",
    "custom-call",
    "convolution",
    "dot",
    "sort",
    "scatter",
    "gather",
    "reduce",
    "reduce-window",
    "select-and-scatter",
    "rng-bit-generator",
    "copy",
    "pad",
    "transpose",
    "fft",
    "triangular-solve",
    "cholesky",
    "conditional",
}
_PACKAGE = str(Path(__file__).parents[2])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated cost of one run of a program, with loops counted in full.

    Attributes:
      total: sum of the estimates.
      by_source: estimates by file and line, largest first; instructions without a line are under
        ``""``.
      without_estimate: number of executions by opcode of computation and communication without an
        estimate, which `total` leaves out; custom calls are listed by target.
    """

    total: float
    by_source: dict[str, float] = dataclasses.field(default_factory=dict)
    without_estimate: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def has_kernels(self) -> bool:
        """Whether custom calls, such as Pallas kernels, are left out; they may dominate."""
        return any(name.startswith("custom-call ") for name in self.without_estimate)


class Cycles(Estimate):
    """An :class:`Estimate` by the TPU compiler, in cycles."""

    @property
    def has_kernels(self) -> bool:
        """Whether Pallas kernels are left out; a TPU's other custom calls are small."""
        return "custom-call tpu_custom_call" in self.without_estimate


def sum_estimates(
    module: Module, estimated: Iterable[tuple[Execution, float | None]]
) -> Estimate | None:
    """Sums the estimates of instructions outside fusions.

    Args:
      module: the program.
      estimated: executions, with the estimate for a single one or None.

    Returns:
      The sum, or None if there is no estimate at all.
    """
    total, by_source = 0.0, Counter[str]()
    missing = Counter[str]()
    for (each, _, times, _), value in estimated:
        if value is not None:
            total += times * value
            by_source[_short(module.source(each))] += times * value  # type: ignore[assignment]
        elif each.opcode == "custom-call":
            if each.target not in FREE_CALLS:
                missing[f"custom-call {each.target}"] += times  # type: ignore[assignment]
        elif _works(each):
            missing[each.opcode] += times  # type: ignore[assignment]
    return Estimate(total, descending(by_source), descending(missing)) if total else None


def descending(counts: Counter[str]) -> dict[str, Any]:
    """Returns counts, the largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _works(each: Instruction) -> bool:
    """Whether an instruction takes time; copies of scalars do not."""
    kinds = WORK | COLLECTIVES
    return each.opcode.removesuffix("-start") in kinds and shape_bytes(each.shape) > 8


def _short(source: str) -> str:
    """Returns a path relative to where it is installed, or to the working directory."""
    for root in (*site.getsitepackages(), os.getcwd(), os.path.dirname(_PACKAGE)):
        if source.startswith(root + os.sep):
            return source[len(root) + 1 :]
    return source
