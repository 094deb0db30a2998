"""Counts how often each instruction of a compiled program runs."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from capsjax.bench.programs.hlo import Computation, Instruction, Module

_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FUSIONS = {"fusion", "fusion-start"}  # fusion-start is asynchronous
# Instructions whose result has the value of their operand.
_SAME_VALUE = {"copy", "bitcast", "convert", "reshape", "bitcast-convert", "opt-barrier"}


class Execution(NamedTuple):
    """An executed instruction.

    Attributes:
      instruction: the instruction.
      computation: the computation that contains it.
      times: number of executions per run of the program.
      is_fused: whether it is inside a fusion.
    """

    instruction: Instruction
    computation: Computation
    times: float
    is_fused: bool


def executions(module: Module) -> Iterator[Execution]:
    """Yields the instructions of the entry and all that it calls, except reducers and comparators.

    Bodies of loops with an unknown trip count are counted once, and so is every branch of a
    conditional.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.bench.programs.hlo import Module
      >>> from capsjax.bench.programs.loops import executions
      >>> def f(x):
      ...   return jax.lax.fori_loop(0, 7, lambda _, y: jnp.tanh(y @ x), x)
      >>> module = Module(jax.jit(f).lower(jnp.ones((4, 4))).compile().as_text())
      >>> [each.times for each in executions(module) if each.instruction.opcode == "tanh"]
      [7]
    """
    yield from _walk(module, module.entry, 1, False)


def trip_count(module: Module, loop: Instruction, part: Computation) -> int | None:
    """Returns the trip count of a while loop; None if it cannot be read from the text.

    XLA:CPU and XLA:GPU print known trip counts. The TPU compiler does not; there the count follows
    from the condition, the initial value and the step of the loop's counter, if these are
    constants.

    Args:
      module: the program.
      loop: the instruction.
      part: the computation that contains the loop.
    """
    if known := _TRIP_COUNT.search(loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called["condition"][0]]
    body = module.computations[loop.called["body"][0]]
    compared = _comparison(module, condition)
    if compared is None:
        return None
    direction, left, right = compared
    counter = _tuple_index(left, condition)
    bound = _constant(module, right, condition, loop, part)
    if counter is None or bound is None:
        return None
    first = _initial(module, loop, counter, part)
    step = _step(module, body, counter)
    if first is None or not step:
        return None
    last = bound + (step > 0) - (step < 0) if direction in ("LE", "GE") else bound
    if direction not in ("LT", "LE", "GT", "GE") or (step > 0) != (direction in ("LT", "LE")):
        return None
    return max(0, -(-(last - first) // step))


def loops_in(module: Module, part: Computation) -> Iterator[tuple[Instruction, Computation]]:
    """Yields the while loops of a computation, without loops nested inside them.

    Each comes with the computation that contains it.
    """
    for each in part.instructions.values():
        if each.opcode == "while":
            yield each, part
            continue
        for role, names in each.called.items():
            if role != "to_apply" or each.opcode == "call":
                for name in names:
                    yield from loops_in(module, module.computations[name])


def _walk(module: Module, part: Computation, times: float, fused: bool) -> Iterator[Execution]:
    for each in part.instructions.values():
        yield Execution(each, part, times, fused)
        trips = trip_count(module, each, part) if each.opcode == "while" else None
        for role, names in each.called.items():
            if role == "to_apply" and each.opcode != "call":
                continue  # part of a reduction, a sort, a scatter or an all-reduce
            often = times
            if trips is not None:
                often = times * (trips if role == "body" else trips + 1)
            for name in names:
                called = module.computations[name]
                yield from _walk(module, called, often, fused or each.opcode in _FUSIONS)


def _comparison(module: Module, part: Computation) -> tuple[str, Instruction, Instruction] | None:
    """Returns direction and operands of a condition's comparison, which may be fused."""
    root, inner = part.root, part
    if root.opcode == "fusion":
        inner = module.computations[root.called["calls"][0]]
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
    module: Module,
    each: Instruction | None,
    part: Computation,
    loop: Instruction | None = None,
    outside: Computation | None = None,
) -> int | None:
    """Returns the integer value of an instruction, if it is constant while the program runs.

    In the condition of a loop, this includes a value from before the loop that the body does not
    change.
    """
    if each is None:
        return None
    if each.opcode in _SAME_VALUE:
        operand = part.instructions[each.operand_names[0]]
        return _constant(module, operand, part, loop, outside)
    if each.opcode == "constant":
        return int(each.operands) if re.fullmatch(r"-?\d+", each.operands) else None
    index = _tuple_index(each, part)
    if index is None or loop is None or outside is None:
        return None
    body = module.computations[loop.called["body"][0]]
    kept = _element(body.root, index, body)
    if kept is None or _tuple_index(kept, body) != index:
        return None
    return _initial(module, loop, index, outside)


def _step(module: Module, body: Computation, counter: int) -> int | None:
    """Returns the step of a loop's counter."""
    each = _element(body.root, counter, body)
    inner = body
    while each is not None and each.opcode in _SAME_VALUE:
        each = inner.instructions[each.operand_names[0]]
    fusion = each
    if each is not None and each.opcode == "fusion":
        inner = module.computations[each.called["calls"][0]]
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
            step = _constant(module, outer, where)
    if not moved or step is None:
        return None
    return -step if each.opcode == "subtract" else step


def _tuple_index(each: Instruction, part: Computation) -> int | None:
    """Returns the index if an instruction is an element of the computation's parameter, or None."""
    while each.opcode in _SAME_VALUE:
        each = part.instructions[each.operand_names[0]]
    if each.opcode != "get-tuple-element":
        return None
    if part.instructions[each.operand_names[0]].opcode != "parameter":
        return None
    return int(each.attribute("index"))


def _element(made: Instruction, index: int, part: Computation) -> Instruction | None:
    """Returns the instruction of one element of a tuple."""
    while made.opcode in _SAME_VALUE:
        made = part.instructions[made.operand_names[0]]
    return part.instructions[made.operand_names[index]] if made.opcode == "tuple" else None


def _initial(module: Module, loop: Instruction, index: int, part: Computation) -> int | None:
    """Returns the initial value of one element of a loop's carry, if it is a constant integer.

    XLA:CPU puts small loops into computations of their own, which receive the carry.
    """
    made = part.instructions[loop.operand_names[0]]
    while made.opcode == "parameter" and (caller := _caller(module, part)) is not None:
        call, part = caller
        made = part.instructions[call.operand_names[int(made.operands)]]
    return _constant(module, _element(made, index, part), part)


def _caller(module: Module, part: Computation) -> tuple[Instruction, Computation] | None:
    """Returns the only call of a computation, and the computation that contains the call."""
    found = [
        (each, outer)
        for outer in module.computations.values()
        for each in outer.instructions.values()
        if each.opcode == "call" and part.name in each.called.get("to_apply", ())
    ]
    return found[0] if len(found) == 1 else None
