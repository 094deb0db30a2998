"""Counts the kernels that a program launches on a GPU, and estimates their time.

XLA writes its own estimates into the text of each fusion if a flag asks for them. It has none for
libraries and Pallas kernels, and its estimates of matrix products assume untuned tile sizes. For
matrix products, convolutions and the library's own kernels, the least time of their operations and
bytes at the chip's published speed is used instead.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from capsjax.bench.gpus import Gpu
from capsjax.bench.programs.estimate import (
    COLLECTIVES,
    FREE_CALLS,
    WORK,
    Estimate,
    descending,
    sum_estimates,
)
from capsjax.bench.programs.hlo import Computation, Instruction, Module, shape_bytes
from capsjax.bench.programs.loops import Execution, trip_count
from capsjax.ops._hopper import FLOPS

# Time of the shortest kernels: an H200 ran the 105 shortest ones of the paper's train step in 1.56
# us each (bfloat16), 1.50 us (float32).
_LEAST_SECONDS = 1.5e-6
_COSTS = re.compile(r'"exec_time_us":([\d.e+-]+)[^{}]*"name":"([^"]*)"')
_FUSION_KIND = re.compile(r'"kind":"(__[^"]*)"')
_FIRST_ARRAY = re.compile(r"\(?([a-z]\w*)\[([\d,]*)\]")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_PRECISE = re.compile(r"operand_precision\W+highest", re.IGNORECASE)
_RECORDED_FLOPS = re.compile(rf'{FLOPS}="([\d.e+]+)"')


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels that one run of a program launches on a GPU, with loops counted in full.

    Attributes:
      launches: number of launches by kind: ``"fusion"``, ``"gemm"`` for matrix products by cuBLAS
        or XLA, ``"cudnn"``, ``"custom call"``, ``"copy"``, ``"collective"``, ``"other"``. A library
        call may launch several kernels; kernels that only set memory are not in the text.
      graph_cuts: number of cuDNN convolutions among them, each of which ends a CUDA graph.
      seconds: an untuned estimate; None if the text has no estimates by the compiler.
    """

    launches: dict[str, float]
    graph_cuts: float = 0.0
    seconds: Estimate | None = None


class Work(NamedTuple):
    """The work of a kernel: operations, bytes moved, and the operands' dtype."""

    flops: float
    bytes: float
    dtype: str
    is_precise: bool = False

    def seconds(self, gpu: Gpu) -> float | None:
        """The least time on a GPU; None if its speed for the dtype is unknown."""
        peak = gpu.peak(self.dtype, is_precise=self.is_precise)
        return None if peak is None else max(self.flops / peak, self.bytes / gpu.bytes_per_second)


def read_kernels(module: Module, executed: Sequence[Execution], gpu: Gpu) -> Kernels:
    """Counts the kernels of a program for a GPU, and estimates their time.

    Args:
      module: the program.
      executed: its instructions, see :func:`capsjax.bench.programs.loops.executions`.
      gpu: the GPU that it was compiled for.
    """
    # For a loop of known length, the host counts the trips and does not run the condition.
    unasked = {
        loop.called["condition"][0]
        for loop, part, _, _ in executed
        if loop.opcode == "while" and trip_count(module, loop, part) is not None
    }
    alone = [e for e in executed if not e.is_fused and e.computation.name not in unasked]
    launches, cuts, has_costs = Counter[str](), 0.0, False
    estimated = []
    for each in alone:
        if kind := _kind(each.instruction):
            launches[kind] += each.times  # type: ignore[assignment]
            cuts += each.times * each.instruction.target.startswith("__cudnn$conv")
            has_costs = has_costs or bool(_COSTS.search(each.instruction.attributes))
            estimated.append((each, _seconds(module, each, kind, gpu)))
    seconds = sum_estimates(module, estimated) if has_costs else None
    return Kernels(descending(launches), cuts, seconds)


def call_work(part: Computation, call: Instruction) -> Work | None:
    """Reads a custom call of cuBLAS, cuDNN or a kernel of this library.

    Returns:
      None unless it is a product, a convolution or a kernel that records its operations.
    """
    operands = [part.instructions[name] for name in call.operand_names]
    if recorded := _RECORDED_FLOPS.search(call.attributes):
        moved = sum(shape_bytes(each.shape) for each in (*operands, call))
        return Work(float(recorded[1]), moved, _dtype(operands[0]))
    # The last array of the result is the library's workspace.
    result = _FIRST_ARRAY.match(call.shape)
    if result is None or len(operands) < 2:
        return None
    moved = sum(shape_bytes(each.shape) for each in operands) + shape_bytes(result[0])
    if call.target.startswith("__cublas$"):
        return _product(call, operands[0], _sizes(call), moved)
    labels = _LABELS.search(call.attributes)
    if not call.target.startswith("__cudnn$conv") or labels is None:
        return None
    inputs, kernel, outputs = operands[0], operands[1], call
    if call.target.endswith("BackwardFilter"):
        kernel, outputs = call, operands[1]
    elif call.target.endswith("BackwardInput"):
        outputs = operands[0]
    # Each output is a sum over the kernel's window and input features.
    sizes = _sizes(kernel)
    flops = 2 * math.prod(_sizes(outputs)) * math.prod(sizes) / sizes[labels[1].index("o")]
    return Work(flops, moved, _dtype(inputs), bool(_PRECISE.search(call.attributes)))


def _kind(each: Instruction) -> str | None:
    """Returns the kind of kernel that an instruction launches; None if it launches none."""
    opcode, target = each.opcode.removesuffix("-start"), each.target
    if each.opcode == "fusion-start":  # a slice, read or written
        return "copy"
    if opcode == "fusion":
        found = _FUSION_KIND.search(each.attributes)
        name = found[1] if found else ""
        return "cudnn" if "cudnn" in name else "gemm" if "gemm" in name else "fusion"
    if opcode == "custom-call":
        if target in FREE_CALLS:
            return None
        libraries = {"__cublas": "gemm", "__cudnn": "cudnn"}
        return libraries.get(target.partition("$")[0], "custom call")
    if opcode in COLLECTIVES:
        return "collective"
    if opcode == "conditional":  # the host chooses a branch
        return None
    return "copy" if opcode == "copy" else "other" if opcode in WORK else None


def _seconds(module: Module, execution: Execution, kind: str, gpu: Gpu) -> float | None:
    """Returns the time of one launch; None if unknown."""
    each, part, _, _ = execution
    least: float | None
    if kind == "fusion":
        costs = {name: float(time) / 1e6 for time, name in _COSTS.findall(each.attributes)}
        # The unnamed model does not know tiles: for a Triton fusion in the paper's step that an
        # H200 ran in 34 us, it gives 901 us and the tile model 23 us.
        least = costs.get("indexing-cost-model", costs.get(""))
    elif kind == "copy":
        least = 2 * shape_bytes(_copied(module, each)) / gpu.bytes_per_second
    elif each.opcode == "custom-call":
        work = call_work(part, each)
        least = work and work.seconds(gpu)
    elif each.opcode == "fusion":
        work = _fused_work(module, part, each)
        least = work and work.seconds(gpu)
    else:
        return None
    return None if least is None else max(least, _LEAST_SECONDS)


def _copied(module: Module, each: Instruction) -> str:
    """The shape that a copy, or an asynchronous fusion that copies a slice, reads and writes."""
    if each.opcode != "fusion-start":
        return each.shape
    part = module.computations[each.called["calls"][0]]
    if part.root.opcode == "dynamic-update-slice":
        return part.instructions[part.root.operand_names[1]].shape
    return part.root.shape


def _fused_work(module: Module, part: Computation, fusion: Instruction) -> Work | None:
    """The matrix products of a fusion."""
    moved = sum(shape_bytes(part.instructions[name].shape) for name in fusion.operand_names)
    moved += shape_bytes(fusion.shape)
    products = list(_products(module, module.computations[fusion.called["calls"][0]], moved))
    if not products:
        return None
    return products[0]._replace(flops=sum(each.flops for each in products))


def _products(module: Module, part: Computation, moved: float) -> Iterator[Work]:
    for each in part.instructions.values():
        if each.opcode == "dot":
            left = part.instructions[each.operand_names[0]]
            if work := _product(each, left, _sizes(each), moved):
                yield work
        for name in each.called.get("calls", ()):
            yield from _products(module, module.computations[name], moved)


def _product(
    each: Instruction, left: Instruction, result: Sequence[int], moved: float
) -> Work | None:
    """The work of a matrix product, from its text and the contracted axes of its left operand."""
    found = _CONTRACTED.search(each.attributes)
    if found is None:
        return None
    sizes = _sizes(left)
    contracted = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", found[1]))
    flops = 2.0 * math.prod(result) * contracted
    return Work(flops, moved, _dtype(left), bool(_PRECISE.search(each.attributes)))


def _sizes(each: Instruction) -> list[int]:
    """The sizes of an instruction's first array."""
    found = _FIRST_ARRAY.match(each.shape)
    return [int(size) for size in re.findall(r"\d+", found[2])] if found else []


def _dtype(each: Instruction) -> str:
    found = _FIRST_ARRAY.match(each.shape)
    return found[1] if found else ""
