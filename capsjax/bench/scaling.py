"""Estimates how training scales over a pod or a cluster, from programs compiled for it.

The compiler estimates the cycles of a step on one TPU or its time on one GPU, and the compiled text
states the bytes of the all-reduce. A model of the interconnect gives the time of the all-reduce.
Nothing is measured.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from capsjax.bench.gpus import GPUS, Gpu
from capsjax.bench.results.rows import Row
from capsjax.bench.targets import Target, parse_target
from capsjax.bench.workloads import make_workload
from capsjax.errors import ConfigError

Kind = Literal["weak", "strong"]
WORKLOAD = "pmap_train_step"
PER_CHIP = 128
TOTAL = 1024
PAYS = 0.5
_SIZES = (1, 8, 64, 256)
_HOP_SECONDS = 1e-6


class Chip(NamedTuple):
    """Published figures of a generation of TPUs.

    Attributes:
      hertz: clock of the compiler's cycles: the published peak in bfloat16, divided by the
        operations per cycle that the compiler assumes, 2 x 128 x 128 for each of 4 (v5e), 8 (v4,
        v5p) or 16 (v6e) matrix units.
      link_bytes_per_second: bandwidth of one link of the interconnect in one direction.
    """

    hertz: float
    link_bytes_per_second: float


# Links, and a latency of about 1 us per hop, are from the table of TPU specifications in "How to
# Scale Your Model", Austin et al., 2025; peaks are from Cloud TPU's pages on the generations.
CHIPS = {
    "v4": Chip(1.05e9, 4.5e10),
    "v5e": Chip(1.5e9, 4.5e10),
    "v5p": Chip(1.75e9, 9e10),
    "v6e": Chip(1.75e9, 9e10),
}


@dataclasses.dataclass(frozen=True)
class ScalingStep:
    """An estimated train step on a slice of a pod.

    Attributes:
      chips: number of chips in the slice.
      batch: examples per chip.
      cycles: cycles of each TPU, without communication; None for GPUs.
      compute_seconds: time of each chip, without communication.
      all_reduce_seconds: time of the all-reduce, which does not overlap with computation.
    """

    chips: int
    batch: int
    cycles: float | None
    compute_seconds: float
    all_reduce_seconds: float

    @property
    def seconds(self) -> float:
        """Time of the whole step."""
        return self.compute_seconds + self.all_reduce_seconds

    @property
    def examples_per_second(self) -> float:
        """Throughput of all chips."""
        return self.chips * self.batch / self.seconds


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Steps on growing slices of a pod.

    Attributes:
      kind: ``"weak"`` for a fixed batch per chip, ``"strong"`` for a fixed total batch.
      program: workload and parameters, without the batch.
      generation: generation of the chips.
      steps: steps by number of chips.
    """

    kind: Kind
    program: str
    generation: str
    steps: tuple[ScalingStep, ...]

    def efficiency(self, step: ScalingStep) -> float:
        """Examples per second and chip, relative to the smallest slice."""
        first = self.steps[0]
        rates = [each.examples_per_second / each.chips for each in (step, first)]
        return rates[0] / rates[1]

    @property
    def limit(self) -> ScalingStep | None:
        """The first step whose efficiency is below one half; None if there is none."""
        return next((each for each in self.steps if self.efficiency(each) < PAYS), None)

    def causes(self, step: ScalingStep) -> dict[str, float]:
        """Seconds lost compared to a perfectly divided step, by cause."""
        first = self.steps[0]
        ideal = first.seconds * step.batch / first.batch
        return {
            "the all-reduce": step.all_reduce_seconds,
            "work that a smaller batch per chip does not reduce": step.compute_seconds - ideal,
        }


def all_reduce_seconds(chip: Chip, shape: Sequence[int], size: float) -> float:
    """Estimates the least time of an all-reduce of `size` bytes over a torus or mesh of chips.

    A chip sends and receives ``2 (n - 1) / n`` times the bytes, over all its links at once: two
    along a ring, and one along a line, because the chips at its ends have only one. Each hop adds 1
    us.

    Args:
      chip: figures of its links.
      shape: chips along each axis. With two axes, those of 16 chips are rings; with three, all are
        rings if none has fewer than 4 chips.
      size: bytes that each chip contributes.

    Example:
      >>> from capsjax.bench.scaling import CHIPS, all_reduce_seconds
      >>> round(1e6 * all_reduce_seconds(CHIPS["v5e"], (2, 4), 36e6))   # 700 us and 8 hops
      708
    """
    chips = math.prod(shape)
    if chips == 1:
        return 0.0
    links = hops = 0
    for length in shape:
        is_ring = length >= 16 if len(shape) == 2 else min(shape) >= 4
        links += 0 if length == 1 else 1 + is_ring
        hops += 2 * (length // 2 if is_ring else length - 1)
    bandwidth = links * chip.link_bytes_per_second
    return 2 * (chips - 1) / chips * size / bandwidth + hops * _HOP_SECONDS


def gpu_all_reduce_seconds(gpu: Gpu, shape: Sequence[int], size: float) -> float:
    """Estimates the least time of an all-reduce of `size` bytes over hosts with several GPUs each.

    A reduce-scatter over NVLink leaves each GPU of a host with a part of the sum; an all-reduce
    over InfiniBand, with one adapter per GPU, sums each part over the hosts; an all-gather over
    NVLink distributes the parts. Over `n` members a GPU sends ``2 (n - 1) / n`` times the bytes, in
    ``2 (n - 1)`` hops of 1 us.

    Args:
      gpu: figures of its links.
      shape: number of hosts, and of GPUs per host.
      size: bytes that each GPU contributes.

    Example:
      >>> from capsjax.bench import GPUS
      >>> from capsjax.bench.scaling import gpu_all_reduce_seconds
      >>> round(1e6 * gpu_all_reduce_seconds(GPUS["h100"], (1, 8), 36e6))   # 140 us and 14 hops
      154
    """
    hosts, members = shape
    stages = (
        (members, size, gpu.link_bytes_per_second),
        (hosts, size / members, gpu.network_bytes_per_second),
    )
    return sum(
        2 * (n - 1) / n * part / bandwidth + 2 * (n - 1) * _HOP_SECONDS
        for n, part, bandwidth in stages
    )


def slice_sizes(target: Target) -> list[int]:
    """Returns the numbers of chips to estimate: 1, 8, 64 and 256, up to those of the target.

    Example:
      >>> from capsjax.bench import parse_target
      >>> from capsjax.bench.scaling import slice_sizes
      >>> slice_sizes(parse_target("v5p-128"))
      [1, 8, 64]
    """
    return [size for size in _SIZES if size < target.chips] + [target.chips]


def batches(target: Target) -> list[int]:
    """Returns the batches per chip on the slices of a target; only 128 for present devices.

    Example:
      >>> from capsjax.bench import parse_target
      >>> from capsjax.bench.scaling import batches
      >>> batches(parse_target("v5e-256"))
      [128, 1024, 16, 4]
    """
    if not target.is_absent:
        return [PER_CHIP]
    strong = [TOTAL // size for size in slice_sizes(target) if TOTAL % size == 0]
    return list(dict.fromkeys([PER_CHIP, *strong]))


def estimate_scaling(rows: Iterable[Row]) -> list[Scaling]:
    """Estimates weak and strong scaling from the rows of train steps on several absent chips.

    The step of a slice is taken from the row with its batch per chip and the same number of chips,
    or the next larger one: these programs differ only in their all-reduce.

    Args:
      rows: rows of any workloads. Devices of this machine, and TPUs other than v4, v5e, v5p and
        v6e, have no estimate.

    Returns:
      For each pod and program, weak scaling with a batch of 128 per chip (or the largest batch, if
      there is none of 128), and strong scaling with the largest batch as the total.
    """
    pods: dict[tuple[str, str], dict[tuple[int, int], Row]] = {}
    for row in rows:
        target = parse_target(row.target)
        if row.workload == WORKLOAD and _compute_seconds(row, target) is not None:
            key = (target.generation, _program(row))
            pods.setdefault(key, {})[_batch(row), target.chips] = row
    found = []
    for (generation, program), compiled in pods.items():
        pod = parse_target(max(compiled.items(), key=lambda item: item[0][1])[1].target)
        per_chip = [batch for batch, _ in compiled]
        weak = PER_CHIP if PER_CHIP in per_chip else max(per_chip)
        total = max(per_chip)
        kinds: dict[Kind, dict[int, int]] = {
            "weak": dict.fromkeys(slice_sizes(pod), weak),
            "strong": {size: total // size for size in slice_sizes(pod) if not total % size},
        }
        for kind, wanted in kinds.items():
            steps = [
                step
                for chips, batch in wanted.items()
                if (step := _step(pod, chips, batch, compiled)) is not None
            ]
            if len(steps) > 1:
                found.append(Scaling(kind, program, generation, tuple(steps)))
    return found


def _step(
    pod: Target, chips: int, batch: int, compiled: dict[tuple[int, int], Row]
) -> ScalingStep | None:
    fitting = [size for each, size in compiled if each == batch and size >= chips]
    if not fitting:
        return None
    row = compiled[batch, min(fitting)]
    try:
        shape = pod.resized(chips).shape
    except ConfigError:
        return None  # the generation has no slice of this size
    size, compute = all_reduce_bytes(row), _compute_seconds(row, pod)
    if compute is None:
        return None
    if pod.platform == "gpu":
        summed = gpu_all_reduce_seconds(GPUS[pod.generation], shape, size)
    else:
        summed = all_reduce_seconds(CHIPS[pod.generation], shape, size)
    return ScalingStep(chips, batch, row.counts["cycles"], compute, summed)


def all_reduce_bytes(row: Row) -> float:
    """Bytes that each device contributes to all-reduces in one step."""
    found = row.hlo.collectives.get("all-reduce") if row.hlo else None
    return found.bytes if found else 0.0


def _compute_seconds(row: Row, target: Target) -> float | None:
    """Time of one absent chip without communication; None if unknown."""
    if target.generation in GPUS:
        return row.counts["estimate"]
    cycles, chip = row.counts["cycles"], CHIPS.get(target.generation)
    return cycles / chip.hertz if cycles and chip else None


def _batch(row: Row) -> int:
    workload: Any = make_workload(row.workload, row.parameters)
    return int(workload.batch)


def _program(row: Row) -> str:
    given = (f"{name}={value}" for name, value in row.parameters.items() if name != "batch")
    return " ".join([row.workload, *given, *row.xla_flags])
