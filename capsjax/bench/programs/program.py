"""What a compiled program consists of and costs, with its loops counted in full.

XLA counts the body of a loop once. Here every count is multiplied by how often the loop runs; where
that is not known the body counts once, and the result says so.
"""

import dataclasses
import os
import re
import site
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsjax.bench.programs.hlo import Computation, Instruction, Module, shape_bytes
from capsjax.bench.programs.loops import Execution, executions, loops_in, trip_count

_COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
_Counts = np.ndarray[Any, np.dtype[np.float64]]
# Custom calls that compute nothing.
_FREE_CALLS = {"AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
# Opcodes that take time, and have no estimate of their own outside of fusions.
_WORK = {
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
    "transpose",
    "fft",
    "triangular-solve",
    "cholesky",
    "conditional",
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop.

    Attributes:
      operation: the JAX operation that it comes from.
      trip_count: how often its body runs, or None if the compiled text does not tell.
    """

    operation: str
    trip_count: int | None


@dataclasses.dataclass(frozen=True)
class Collective:
    """All communication of one kind.

    Attributes:
      executions: in one run of the program.
      bytes: that each device sends, in all executions together.
    """

    executions: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """XLA's cost model of one device, with loops counted in full.

    Attributes:
      flops: floating-point operations other than transcendental functions; a multiplication with
        an addition is two.
      transcendentals: exponentials, logarithms, roots and the like.
      bytes: read and written by all fusions and instructions, as if nothing stayed in a cache; None
        for programs of other compilers.
    """

    flops: float
    transcendentals: float = 0.0
    bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Estimates of the TPU compiler; other compilers estimate nothing.

    Attributes:
      total: sum of the estimates with loops counted in full.
      by_source: the same by file and line, largest first; instructions without a line are under
        ``""``.
      without_estimate: executions by opcode that compute or communicate and have no estimate, so
        that they are not part of `total`; custom calls by their target.
    """

    total: float
    by_source: dict[str, float] = dataclasses.field(default_factory=dict)
    without_estimate: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def has_kernels(self) -> bool:
        """Whether Pallas kernels are left out, which may be most of the work."""
        return "custom-call tpu_custom_call" in self.without_estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiled text says; None stands for what a compiler does not tell.

    Attributes:
      instructions: number of instructions, those inside of fusions included.
      opcodes: the same by opcode.
      fusion_count: number of fusions.
      fusions: the same by kind.
      loops: while loops that are executed.
      is_complete: whether the trip counts of all loops are known, so that they are counted in full.
      collectives: by opcode.
      custom_calls: executions by target, such as ``"__onednn$matmul"``.
      cost: None where this version of jaxlib does not give it.
      cycles: None where no instruction has an estimate.
    """

    instructions: int | None = None
    opcodes: dict[str, int] = dataclasses.field(default_factory=dict)
    fusion_count: int | None = None
    fusions: dict[str, int] = dataclasses.field(default_factory=dict)
    loops: tuple[Loop, ...] = ()
    is_complete: bool = True
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    custom_calls: dict[str, float] = dataclasses.field(default_factory=dict)
    cost: Cost | None = None
    cycles: Cycles | None = None


def read_program(text: str) -> Program:
    """Reads the text of a compiled program.

    Args:
      text: of ``jax.stages.Compiled.as_text()``.

    Returns:
      A :class:`Program`.

    Raises:
      ValueError: the text is not that of an HLO module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.bench import read_program
      >>> def repeated(x):
      ...   return jax.lax.fori_loop(0, 7, lambda _, y: jnp.tanh(y @ x), x)
      >>> program = read_program(jax.jit(repeated).lower(jnp.ones((8, 8))).compile().as_text())
      >>> [loop.trip_count for loop in program.loops], program.cost.flops >= 7 * 2 * 8**3
      ([7], True)
    """
    module = Module(text)
    executed = list(executions(module))
    loops = tuple(
        Loop(each.operation, trip_count(module, each, part))
        for each, part, _, _ in executed
        if each.opcode == "while"
    )
    opcodes = module.opcodes()
    fusions = Counter(each.attribute("kind") for each in _all(module, "fusion"))
    return Program(
        instructions=opcodes.total(),
        opcodes=_sorted(opcodes),
        fusion_count=fusions.total(),
        fusions=_sorted(fusions),
        loops=loops,
        is_complete=all(loop.trip_count is not None for loop in loops),
        collectives=_collectives(executed),
        custom_calls=_custom_calls(executed),
        cost=_cost(module),
        cycles=_cycles(module, executed),
    )


def _all(module: Module, opcode: str) -> list[Instruction]:
    parts = module.computations.values()
    return [e for part in parts for e in part.instructions.values() if e.opcode == opcode]


def _sorted(counts: Counter[str]) -> dict[str, Any]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _collectives(executed: list[Execution]) -> dict[str, Collective]:
    found: dict[str, Collective] = {}
    for each, part, times, _ in executed:
        opcode = each.opcode.removesuffix("-start")
        if opcode in _COLLECTIVES:
            operands = (part.instructions[name].shape for name in each.operand_names)
            size = sum(shape_bytes(shape) for shape in operands)
            before = found.get(opcode, Collective(0, 0))
            found[opcode] = Collective(before.executions + times, before.bytes + times * size)
    return found


def _custom_calls(executed: list[Execution]) -> dict[str, float]:
    calls = Counter[str]()
    for each, _, times, _ in executed:
        if each.opcode == "custom-call" and each.target not in _FREE_CALLS:
            calls[each.target] += times  # type: ignore[assignment]
    return _sorted(calls)


def _cycles(module: Module, executed: list[Execution]) -> Cycles | None:
    total, by_source = 0.0, Counter[str]()
    missing = Counter[str]()
    for each, _, times, fused in executed:
        if fused:
            continue
        cycles = each.estimated_cycles
        if cycles is not None:
            total += times * cycles
            by_source[_short(module.source(each))] += times * cycles  # type: ignore[assignment]
        elif each.opcode == "custom-call":
            if each.target not in _FREE_CALLS:
                missing[f"custom-call {each.target}"] += times  # type: ignore[assignment]
        elif _works(each):
            missing[each.opcode] += times  # type: ignore[assignment]
    if not total:
        return None
    return Cycles(total, _sorted(by_source), _sorted(missing))


def _works(each: Instruction) -> bool:
    """Whether an instruction takes time: not copies of scalars between memories."""
    kinds = _WORK | _COLLECTIVES
    return each.opcode.removesuffix("-start") in kinds and shape_bytes(each.shape) > 8


def _short(source: str) -> str:
    """A file's path relative to where it is installed, or to the working directory."""
    for root in (*site.getsitepackages(), os.getcwd(), os.path.dirname(_PACKAGE)):
        if source.startswith(root + os.sep):
            return source[len(root) + 1 :]
    return source


_PACKAGE = str(Path(__file__).parents[2])


def _cost(module: Module) -> Cost | None:
    """XLA's cost of the module, and of each loop's body and condition as often as they run."""
    # None of it is public: the parser moved after jaxlib 0.10.1.
    try:
        from jaxlib import _jax

        place = _jax if hasattr(_jax, "hlo_module_from_text") else import_module("jaxlib._hlo")
        parse, analyse = place.hlo_module_from_text, _jax.hlo_module_cost_analysis
    except (ImportError, AttributeError):
        return None
    client = jax.devices("cpu")[0].client
    known: dict[str, _Counts] = {}
    headless = re.sub(r"^ENTRY ", "", module.text, flags=re.MULTILINE)

    def once(name: str) -> _Counts:
        """The cost of a computation as if it were the whole program: loops count once."""
        if name not in known:
            entry = rf"^(%?{re.escape(name)} )"
            text = re.sub(entry, r"ENTRY \1", headless, count=1, flags=re.MULTILINE)
            # Without the layouts of the real entry's arguments.
            text = re.sub(r"^HloModule .*", "HloModule part", text, count=1)
            found = analyse(client, parse(text))
            names = ("flops", "transcendentals", "bytes accessed")
            known[name] = np.array([found.get(each, 0.0) for each in names])
        return known[name]

    def full(part: Computation) -> _Counts:
        """The same with loops as often as they run; their bodies may have loops too."""
        total = once(part.name)
        for loop, around in loops_in(module, part):
            trips = trip_count(module, loop, around)
            often = 1 if trips is None else trips
            for role, times in (("body", often), ("condition", often + (trips is not None))):
                called = module.computations[loop.called[role][0]]
                total = total + times * full(called) - once(called.name)
        return total

    try:
        return Cost(*full(module.entry).tolist())
    except (jax.errors.JaxRuntimeError, ValueError):
        return None  # a text that this version's own parser does not read
