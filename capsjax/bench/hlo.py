"""Reads the text of compiled programs: computations, instructions, loops, sources.

The text of ``jax.stages.Compiled.as_text()`` is all that is read, so that a text kept in a file is
judged like one that was just compiled.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=?]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)?\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"?(-?\d+)')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_OPERATION = re.compile(r'op_name="([^"]*)"')
_STABLEHLO = re.compile(r'^\s*(?:%[^=]*= )?"?((?:stablehlo|chlo|func|sdy|mhlo)\.\w+)', re.MULTILINE)
# Instructions that only hand on what another one has computed.
_SAME_VALUE = {"copy", "bitcast", "convert", "reshape", "bitcast-convert", "opt-barrier"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its module.
      opcode: such as ``"fusion"``, ``"while"``, ``"all-reduce"``.
      shape: of the result, as printed.
      operands: what stands between the parentheses, as printed.
      attributes: what follows them.
      is_root: whether the computation's result is this one's.
    """

    name: str
    opcode: str
    shape: str
    operands: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operand_names(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(_NAME.findall(self.operands))

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations that it calls, by role: ``body``, ``calls``, ``to_apply``."""
        found = _CALLED.findall(self.attributes)
        return {role: tuple(re.findall(r"[\w.\-]+", names)) for role, names in found}

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's own estimate, of one execution; None where it gives none."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found and int(found[1]) >= 0 else None

    @property
    def operation(self) -> str:
        """The JAX operation that it comes from, such as ``jit(f)/while/body/mul``."""
        found = _OPERATION.search(self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call, what is called; else empty."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """An attribute without braces or commas in it, such as ``direction``; or empty."""
        found = re.search(rf"\b{name}=([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text, which is that of execution where it is scheduled."""

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
      text: of ``jax.stages.Compiled.as_text()``.

    Attributes:
      text: the same.
      computations: by name.
      entry: the one that is executed.

    Raises:
      ValueError: the text is not that of an HLO module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.bench.hlo import Module
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
        """Number of instructions by opcode, those inside of fusions included."""
        return Counter(
            each.opcode
            for part in self.computations.values()
            for each in part.instructions.values()
        )

    def executions(self) -> Iterator[tuple[Instruction, Computation, float, bool]]:
        """Instructions of the entry and of all that it calls but reducers and comparators.

        Yields:
          The instruction, its computation, how often one execution of the program executes it, and
          whether it is inside of a fusion. Bodies of loops whose trip count is not known count
          once, see :meth:`loops`; so does every branch of a conditional.
        """
        yield from self._walk(self.entry, 1, False)

    def _walk(
        self, part: Computation, times: float, fused: bool
    ) -> Iterator[tuple[Instruction, Computation, float, bool]]:
        for each in part.instructions.values():
            yield each, part, times, fused
            trips = self.trip_count(each, part) if each.opcode == "while" else None
            for role, names in each.called.items():
                if role == "to_apply" and each.opcode != "call":
                    continue  # of a reduction, a sort, a scatter or an all-reduce
                often = times
                if trips is not None:
                    often = times * (trips if role == "body" else trips + 1)
                for name in names:
                    called = self.computations[name]
                    yield from self._walk(called, often, fused or each.opcode == "fusion")

    def trip_count(self, loop: Instruction, part: Computation) -> int | None:
        """How often a while loop's body runs; None if the text does not tell.

        XLA:CPU and XLA:GPU print what they know. The TPU's compiler does not: there it follows
        from the condition, the first value and the step of the loop's counter, if these are
        constants.
        """
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called["condition"][0]]
        body = self.computations[loop.called["body"][0]]
        compared = self._comparison(condition)
        if compared is None:
            return None
        direction, left, right = compared
        counter = _tuple_index(left, condition)
        bound = self._constant(right, condition, loop, part)
        if counter is None or bound is None:
            return None
        first = self._constant(_element(loop, counter, part), part)
        step = self._step(body, counter)
        if first is None or not step:
            return None
        last = bound + (step > 0) - (step < 0) if direction in ("LE", "GE") else bound
        if direction not in ("LT", "LE", "GT", "GE") or (step > 0) != (direction in ("LT", "LE")):
            return None
        return max(0, -(-(last - first) // step))

    def loops(self) -> list[tuple[str, int | None]]:
        """While loops that are executed: the JAX operation, and the trip count or None."""
        return [
            (each.operation, self.trip_count(each, part))
            for each, part, _, _ in self.executions()
            if each.opcode == "while"
        ]

    def loops_in(self, part: Computation) -> Iterator[tuple[Instruction, Computation]]:
        """While loops that one execution of a computation starts, but not those inside of them.

        Yields:
          The loop, and the computation that it stands in.
        """
        for each in part.instructions.values():
            if each.opcode == "while":
                yield each, part
                continue
            for role, names in each.called.items():
                if role != "to_apply" or each.opcode == "call":
                    for name in names:
                        yield from self.loops_in(self.computations[name])

    def source(self, each: Instruction) -> str:
        """File, line and function that an instruction comes from; empty if not told."""
        if found := _SOURCE.search(each.attributes):
            return f"{found[1]}:{found[2]}"
        frame = _FRAME.search(each.attributes)
        return self._frames.get(int(frame[1]), "") if frame else ""

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

    def _comparison(self, part: Computation) -> tuple[str, Instruction, Instruction] | None:
        """Direction and operands of the comparison that a condition is, also of a fused one."""
        root, inner = part.root, part
        if root.opcode == "fusion":
            inner = self.computations[root.called["calls"][0]]
            root = inner.root
        if root.opcode != "compare":
            return None
        operands = []
        for name in root.operand_names:
            operand = inner.instructions[name]
            if operand.opcode == "parameter" and inner is not part:
                operand = part.instructions[part.root.operand_names[int(operand.operands)]]
            operands.append(operand)
        direction, (left, right) = root.attribute("direction"), operands
        if left.opcode == "constant":
            flipped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
            return flipped.get(direction, direction), right, left
        return direction, left, right

    def _constant(
        self,
        each: Instruction | None,
        part: Computation,
        loop: Instruction | None = None,
        outside: Computation | None = None,
    ) -> int | None:
        """The integer that an instruction holds, if it does not change while the program runs.

        In the condition of a loop also what the loop hands on unchanged from before it.
        """
        if each is None:
            return None
        if each.opcode in _SAME_VALUE:
            return self._constant(part.instructions[each.operand_names[0]], part, loop, outside)
        if each.opcode == "constant":
            return int(each.operands) if re.fullmatch(r"-?\d+", each.operands) else None
        index = _tuple_index(each, part)
        if index is None or loop is None or outside is None:
            return None
        body = self.computations[loop.called["body"][0]]
        kept = _element(body.root, index, body, is_tuple=True)
        if kept is None or _tuple_index(kept, body) != index:
            return None
        return self._constant(_element(loop, index, outside), outside)

    def _step(self, body: Computation, counter: int) -> int | None:
        """By how much a loop's body moves its counter."""
        each = _element(body.root, counter, body, is_tuple=True)
        inner = body
        while each is not None and each.opcode in _SAME_VALUE:
            each = inner.instructions[each.operand_names[0]]
        fusion = each
        if each is not None and each.opcode == "fusion":
            inner = self.computations[each.called["calls"][0]]
            each = inner.root
        if each is None or each.opcode not in ("add", "subtract"):
            return None
        moved, step = False, None
        for name in each.operand_names:
            operand = inner.instructions[name]
            outer = operand
            if operand.opcode == "parameter" and inner is not body and fusion is not None:
                outer = body.instructions[fusion.operand_names[int(operand.operands)]]
            if _tuple_index(outer, body) == counter:
                moved = True
            else:
                where = body if outer is not operand else inner
                step = self._constant(outer, where)
        if not moved or step is None:
            return None
        return -step if each.opcode == "subtract" else step


def shape_bytes(shape: str) -> int:
    """Bytes of a shape as printed, of all arrays of a tuple; padding is not counted.

    Example:
      >>> from capsjax.bench.hlo import shape_bytes
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
    """Number of operations by name in the text of ``jax.stages.Lowered.as_text()``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.bench.hlo import stablehlo_opcodes
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
    """Takes ``SHAPE OPCODE(OPERANDS), ATTRIBUTES`` apart."""
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


def _tuple_index(each: Instruction, part: Computation) -> int | None:
    """Which element of the computation's parameter an instruction is, or None."""
    while each.opcode in _SAME_VALUE:
        each = part.instructions[each.operand_names[0]]
    if each.opcode != "get-tuple-element":
        return None
    if part.instructions[each.operand_names[0]].opcode != "parameter":
        return None
    return int(each.attribute("index"))


def _element(
    each: Instruction, index: int, part: Computation, *, is_tuple: bool = False
) -> Instruction | None:
    """What makes one element of a tuple, or of a loop's first carry."""
    made = each if is_tuple else part.instructions[each.operand_names[0]]
    while made.opcode in _SAME_VALUE:
        made = part.instructions[made.operand_names[0]]
    return part.instructions[made.operand_names[index]] if made.opcode == "tuple" else None
