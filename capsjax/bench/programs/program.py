"""Reads the contents and the cost of a compiled program, with loops counted in full.

XLA counts the body of a loop once. Here every count is multiplied by the trip count of the loop. If
that is unknown, the body is counted once, and the result says so.
"""

import dataclasses
import re
from collections import Counter
from importlib import import_module
from typing import Any

import jax
import numpy as np

from capsjax.bench.gpus import Gpu
from capsjax.bench.programs.estimate import (
    COLLECTIVES,
    FREE_CALLS,
    Cycles,
    Estimate,
    descending,
    sum_estimates,
)
from capsjax.bench.programs.hlo import Computation, Instruction, Module, shape_bytes
from capsjax.bench.programs.kernels import Kernels, call_work, read_kernels
from capsjax.bench.programs.loops import Execution, executions, loops_in, trip_count

_Counts = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop.

    Attributes:
      operation: the JAX operation that it comes from.
      trip_count: number of trips, or None if the text does not tell.
    """

    operation: str
    trip_count: int | None


@dataclasses.dataclass(frozen=True)
class Collective:
    """All communication of one kind.

    Attributes:
      executions: number of executions in one run of the program.
      bytes: bytes that each device sends in all these executions.
    """

    executions: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """XLA's cost model of one device, with loops counted in full.

    Attributes:
      flops: floating-point operations other than transcendental functions; a multiply-add counts as
        two.
      transcendentals: exponentials, logarithms, roots and the like.
      bytes: bytes read and written by all fusions and instructions, as if nothing stayed in a
        cache; None for programs of other compilers.
    """

    flops: float
    transcendentals: float = 0.0
    bytes: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Contents and cost of a compiled program; None if the compiler does not tell.

    Attributes:
      instructions: number of instructions, including those inside fusions.
      opcodes: number of instructions by opcode.
      fusion_count: number of fusions.
      fusions: number of fusions by kind.
      loops: executed while loops.
      is_complete: whether all trip counts are known, so that all loops are counted in full.
      collectives: communication by opcode.
      custom_calls: number of executions by target, such as ``"__onednn$matmul"``.
      cost: XLA's cost model; None if this version of jaxlib lacks it.
      cycles: cycles of a program for TPUs; None if no instruction has an estimate.
      kernels: kernels of a program for a GPU in the table of GPUs.
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
    kernels: Kernels | None = None

    @property
    def estimate(self) -> Estimate | None:
        """Estimated cost of one run: cycles on a TPU, seconds on a GPU."""
        return self.kernels.seconds if self.kernels else self.cycles


def read_program(text: str, *, gpu: Gpu | None = None) -> Program:
    """Reads the text of a compiled program.

    Args:
      text: text from ``jax.stages.Compiled.as_text()``.
      gpu: the GPU that it was compiled for, see :func:`capsjax.bench.known_gpu`; None for other
        devices.

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
        opcodes=descending(opcodes),
        fusion_count=fusions.total(),
        fusions=descending(fusions),
        loops=loops,
        is_complete=all(loop.trip_count is not None for loop in loops),
        collectives=_collectives(executed),
        custom_calls=_custom_calls(executed),
        cost=_cost(module, executed),
        cycles=_cycles(module, executed),
        kernels=read_kernels(module, executed, gpu) if gpu else None,
    )


def _all(module: Module, opcode: str) -> list[Instruction]:
    parts = module.computations.values()
    return [e for part in parts for e in part.instructions.values() if e.opcode == opcode]


def _collectives(executed: list[Execution]) -> dict[str, Collective]:
    found: dict[str, Collective] = {}
    for each, part, times, _ in executed:
        opcode = each.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            operands = (part.instructions[name].shape for name in each.operand_names)
            size = sum(shape_bytes(shape) for shape in operands)
            before = found.get(opcode, Collective(0, 0))
            found[opcode] = Collective(before.executions + times, before.bytes + times * size)
    return found


def _custom_calls(executed: list[Execution]) -> dict[str, float]:
    calls = Counter[str]()
    for each, _, times, _ in executed:
        if each.opcode == "custom-call" and each.target not in FREE_CALLS:
            calls[each.target] += times  # type: ignore[assignment]
    return descending(calls)


def _cycles(module: Module, executed: list[Execution]) -> Cycles | None:
    alone = [each for each in executed if not each.is_fused]
    found = sum_estimates(module, ((each, each.instruction.estimated_cycles) for each in alone))
    if found is None:
        return None
    return Cycles(found.total, found.by_source, found.without_estimate)


def _cost(module: Module, executed: list[Execution]) -> Cost | None:
    """XLA's cost of the module, with each loop's body and condition as often as they run.

    Library calls on GPUs, which XLA does not count, are added.
    """
    # None of this is public; the parser moved after jaxlib 0.10.1.
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
            # Drops the layouts of the original entry's arguments.
            text = re.sub(r"^HloModule .*", "HloModule part", text, count=1)
            found = analyse(client, parse(text))
            names = ("flops", "transcendentals", "bytes accessed")
            known[name] = np.array([found.get(each, 0.0) for each in names])
        return known[name]

    def full(part: Computation) -> _Counts:
        """The same with loops counted in full, including nested ones."""
        total = once(part.name)
        for loop, around in loops_in(module, part):
            trips = trip_count(module, loop, around)
            often = 1 if trips is None else trips
            for role, times in (("body", often), ("condition", often + (trips is not None))):
                called = module.computations[loop.called[role][0]]
                total = total + times * full(called) - once(called.name)
        return total

    calls = [
        each.times * np.array([work.flops, 0.0, work.bytes])
        for each in executed
        if each.instruction.opcode == "custom-call"
        and (work := call_work(each.computation, each.instruction))
    ]
    try:
        return Cost(*sum(calls, full(module.entry)).tolist())
    except (jax.errors.JaxRuntimeError, ValueError):
        return None  # this version's parser cannot read the text
