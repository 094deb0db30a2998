"""Parses the text of compiled programs: computations, instructions, sources.

It reads only the text of ``jax.stages.Compiled.as_text()``, so that a text from a file works like
one that was just compiled.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Mapping

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=?]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)?\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(-?\d+)')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_OPERATION = re.compile(r'op_name="([^"]*)"')
_STABLEHLO = re.compile(r'^\s*(?:%[^=]*= )?"?((?:stablehlo|chlo|func|sdy|mhlo)\.\w+)', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: name, unique in its module.
      opcode: opcode, such as ``"fusion"``, ``"while"`` or ``"all-reduce"``.
      shape: shape of the result, as printed.
      operands: the text between the parentheses.
      attributes: the text after the parentheses.
      is_root: whether its result is that of the computation.
    """

    name: str
    opcode: str
    shape: str
    operands: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operand_names(self) -> tuple[str, ...]:
        """Names of the instructions whose results it uses."""
        return tuple(_NAME.findall(self.operands))

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations that it calls, by role: ``body``, ``calls``, ``to_apply``."""
        found = _CALLED.findall(self.attributes)
        return {role: tuple(re.findall(r"[\w.\-]+", names)) for role, names in found}

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate for one execution, or None."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found and int(found[1]) >= 0 else None

    @property
    def operation(self) -> str:
        """The JAX operation that it comes from, such as ``jit(f)/while/body/mul``."""
        found = _OPERATION.search(self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The target of a custom call; else empty."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """Returns an attribute without braces or commas, such as ``direction``; or empty."""
        found = re.search(rf"\b{name}=([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text, which is the order of execution if scheduled."""

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(each for each in self.instructions.values() if each.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {
            int(each.operands): each
            for each in self.instructions.values()
            if each.opcode == "parameter"
        }


class Module:
    """A compiled program.

    Args:
      text: text from ``jax.stages.Compiled.as_text()``.

    Attributes:
      text: the same text.
      computations: computations by name.
      entry: the entry computation.

    Raises:
      ValueError: the text is not that of an HLO module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.bench.programs.hlo import Module
      >>> module = Module(jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text())
      >>> module.opcodes()["parameter"] >= 1
      True
    """

    def __init__(self, text: str):
        if not text.startswith("HloModule "):
            raise ValueError(f"text must be that of an HLO module, got {text[:40]!r}...")
        self.text = text
        self.computations: dict[str, Computation] = {}
        entry = ""
        name, instructions = "", dict[str, Instruction]()
        for line in text.splitlines()[1:]:
            if header := _HEADER.match(line):
                name, instructions = header[2], {}
                entry = name if header[1] else entry
            elif line.startswith("}") and name:
                self.computations[name] = Computation(name, instructions)
                name = ""
            elif name and (found := _INSTRUCTION.match(line)):
                instructions[found[2]] = _instruction(found[2], found[3], bool(found[1]))
        if entry not in self.computations:
            raise ValueError("text must have an ENTRY computation, got none")
        self.entry = self.computations[entry]

    def opcodes(self) -> Counter[str]:
        """Number of instructions by opcode, including those inside fusions."""
        return Counter(
            each.opcode
            for part in self.computations.values()
            for each in part.instructions.values()
        )

    def source(self, each: Instruction) -> str:
        """Returns the file, line and function that an instruction comes from; empty if unknown.

        For a fusion without a source, that of the last instruction inside it.
        """
        if found := _SOURCE.search(each.attributes):
            return f"{found[1]}:{found[2]}"
        if frame := _FRAME.search(each.attributes):
            return self._frames.get(int(frame[1]), "")
        parts = (self.computations[name] for name in each.called.get("calls", ()))
        inside = (self.source(i) for p in parts for i in reversed(list(p.instructions.values())))
        return next(filter(None, inside), "")

    @functools.cached_property
    def _frames(self) -> dict[int, str]:
        files = dict(re.findall(r'^(\d+) "(.*)"$', self._table("FileNames"), re.MULTILINE))
        functions = dict(re.findall(r'^(\d+) "(.*)"$', self._table("FunctionNames"), re.MULTILINE))
        locations = {
            number: f"{files[file]}:{line} ({functions[function]})"
            for number, file, function, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)",
                self._table("FileLocations"),
                re.MULTILINE,
            )
        }
        frames = re.findall(
            r"^(\d+) \{file_location_id=(\d+)", self._table("StackFrames"), re.MULTILINE
        )
        return {int(number): locations[location] for number, location in frames}

    def _table(self, title: str) -> str:
        found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", self.text, re.MULTILINE | re.DOTALL)
        return found[1] if found else ""


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a printed shape, over all arrays of a tuple, without padding.

    Example:
      >>> from capsjax.bench.programs.hlo import shape_bytes
      >>> shape_bytes("(f32[8,64]{1,0:T(8,128)S(1)}, pred[3], bf16[])")
      2053
    """
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        number = 1
        for size in re.findall(r"\d+", sizes):
            number *= int(size)
        total += number * _dtype_bytes(dtype)
    return round(total)


def stablehlo_opcodes(text: str) -> Counter[str]:
    """Counts operations by name in the text of ``jax.stages.Lowered.as_text()``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.bench.programs.hlo import stablehlo_opcodes
      >>> stablehlo_opcodes(jax.jit(jnp.sin).lower(1.0).as_text())["stablehlo.sine"]
      1
    """
    return Counter(_STABLEHLO.findall(text))


def _dtype_bytes(dtype: str) -> float:
    if dtype == "pred":
        return 1
    bits = re.match(r"[a-z]+(\d+)", dtype)  # f32, bf16, s4, f8e4m3fn, c64; token has none
    return int(bits[1]) / 8 if bits else 0


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """Parses ``SHAPE OPCODE(OPERANDS), ATTRIBUTES``."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    return Instruction(
        name, call[:opening], shape, call[opening + 1 : closing], call[closing + 1 :], is_root
    )


def _closing(text: str, opening: int) -> int:
    """Position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, opening):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if not depth:
            return found.start()
    raise ValueError(f"parenthesis is not closed in {text[:80]!r}...")
