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
from typing import Any, NamedTuple

import jax

from capsjax.bench.hlo import Computation, Instruction, Module, shape_bytes

_COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
# Custom calls that compute nothing.
_FREE_CALLS = {"AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
# What computes something, and has no estimate of the compiler's where it stands alone.
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


class Loop(NamedTuple):
    """A while loop.

    Attributes:
      operation: of JAX that it comes from.
      trip_count: how often its body runs, or None if the compiled text does not tell.
    """

    operation: str
    trip_count: int | None


class Collective(NamedTuple):
    """All communication of one kind.

    Attributes:
      executions: in one run of the program.
      bytes: that each device hands in, over all of them.
    """

    executions: float
    bytes: float


class Cost(NamedTuple):
    """By the cost model of XLA, of one device, with loops counted in full.

    Attributes:
      flops: floating-point operations other than transcendental functions; a multiplication with
        an addition is two.
      transcendentals: exponentials, logarithms, roots and the like.
      bytes: read and written by all fusions and instructions, as if nothing stayed in a cache.
    """

    flops: float
    transcendentals: float
    bytes: float


class Cycles(NamedTuple):
    """What the TPU compiler estimates; other compilers estimate nothing.

    Attributes:
      total: sum of the estimates with loops counted in full.
      by_source: the same by file and line, most first; what has no line is under ``""``.
      without_estimate: executions by opcode that compute or communicate and have no estimate, so
        that `total` does not hold them; custom calls by what they call.
    """

    total: float
    by_source: dict[str, float]
    without_estimate: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiled text says.

    Attributes:
      opcodes: number of instructions by opcode, those inside of fusions included.
      fusions: number of fusions by kind.
      loops: that are executed.
      collectives: by opcode.
      custom_calls: executions by what is called, such as ``"__onednn$matmul"``.
      cost: None where this version of jaxlib does not give it.
      cycles: None where no instruction has an estimate.
    """

    opcodes: dict[str, int]
    fusions: dict[str, int]
    loops: tuple[Loop, ...]
    collectives: dict[str, Collective]
    custom_calls: dict[str, float]
    cost: Cost | None
    cycles: Cycles | None

    @property
    def is_complete(self) -> bool:
        """Whether the trip counts of all loops are known, so that they are counted in full."""
        return all(loop.trip_count is not None for loop in self.loops)


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
    executed = list(module.executions())
    return Program(
        opcodes=_sorted(module.opcodes()),
        fusions=_sorted(Counter(e.attribute("kind") for e in _all(module, "fusion"))),
        loops=tuple(Loop(*loop) for loop in module.loops()),
        collectives=_collectives(executed),
        custom_calls=_custom_calls(executed),
        cost=_cost(module),
        cycles=_cycles(module, executed),
    )


_Executed = list[tuple[Instruction, Computation, float, bool]]


def _all(module: Module, opcode: str) -> list[Instruction]:
    parts = module.computations.values()
    return [e for part in parts for e in part.instructions.values() if e.opcode == opcode]


def _sorted(counts: Counter[str]) -> dict[str, Any]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _collectives(executed: _Executed) -> dict[str, Collective]:
    found: dict[str, Collective] = {}
    for each, part, times, _ in executed:
        opcode = each.opcode.removesuffix("-start")
        if opcode in _COLLECTIVES:
            operands = (part.instructions[name].shape for name in each.operand_names)
            size = sum(shape_bytes(shape) for shape in operands)
            before = found.get(opcode, Collective(0, 0))
            found[opcode] = Collective(before.executions + times, before.bytes + times * size)
    return found


def _custom_calls(executed: _Executed) -> dict[str, float]:
    calls = Counter[str]()
    for each, _, times, _ in executed:
        if each.opcode == "custom-call" and each.target not in _FREE_CALLS:
            calls[each.target] += times  # type: ignore[assignment]
    return _sorted(calls)


def _cycles(module: Module, executed: _Executed) -> Cycles | None:
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
    """A file's path from where it is installed, or from the working directory."""
    for root in (*site.getsitepackages(), os.getcwd(), os.path.dirname(_PACKAGE)):
        if source.startswith(root + os.sep):
            return source[len(root) + 1 :]
    return source


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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
    known: dict[str, Cost] = {}
    headless = re.sub(r"^ENTRY ", "", module.text, flags=re.MULTILINE)

    def once(name: str) -> Cost:
        """The cost of a computation if it were the whole program: loops count once."""
        if name not in known:
            entry = rf"^(%?{re.escape(name)} )"
            text = re.sub(entry, r"ENTRY \1", headless, count=1, flags=re.MULTILINE)
            # Without the layouts of the real entry's arguments.
            text = re.sub(r"^HloModule .*", "HloModule part", text, count=1)
            found = analyse(client, parse(text))
            known[name] = Cost(
                found.get("flops", 0),
                found.get("transcendentals", 0),
                found.get("bytes accessed", 0),
            )
        return known[name]

    def full(part: Computation) -> Cost:
        """The same with loops as often as they run; their bodies may hold loops again."""
        total = once(part.name)
        for loop, around in module.loops_in(part):
            trips = module.trip_count(loop, around)
            often = 1 if trips is None else trips
            for role, times in (("body", often), ("condition", often + (trips is not None))):
                called = module.computations[loop.called[role][0]]
                total = _plus(_plus(total, full(called), times), once(called.name), -1)
        return total

    try:
        return full(module.entry)
    except (jax.errors.JaxRuntimeError, ValueError):
        return None  # a text that this version's own parser does not read


def _plus(a: Cost, b: Cost, times: float) -> Cost:
    return Cost(*(x + times * y for x, y in zip(a, b, strict=True)))
