"""How training scales over a pod or a cluster, estimated from programs compiled for it.

The compiler estimates the cycles of a step on one TPU, or its time on one GPU, and its text holds
the bytes that are summed over the chips. A model of the interconnect gives the time of that sum.
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
      hertz: clock that cycles are counted in: the published peak in bfloat16, divided by the
        operations that the compiler counts with for a cycle, twice 128 x 128 for 4 (v5e), 8 (v4,
        v5p) or 16 (v6e) matrix units.
      link_bytes_per_second: of one link of the interconnect in one direction.
    """

    hertz: float
    link_bytes_per_second: float


# Links, and a latency of about 1 us per hop: "How to Scale Your Model", Austin et al., 2025, table
# of TPU specifications. Peaks: Cloud TPU's pages of the generations.
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
      chips: of the slice.
      batch: examples on each chip.
      cycles: of each TPU, without communication; None for GPUs.
      compute_seconds: of each chip, without communication.
      all_reduce_seconds: of the sum over the chips, which nothing hides.
    """

    chips: int
    batch: int
    cycles: float | None
    compute_seconds: float
    all_reduce_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute_seconds + self.all_reduce_seconds

    @property
    def examples_per_second(self) -> float:
        """Of all chips."""
        return self.chips * self.batch / self.seconds


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Steps on growing slices of a pod.

    Attributes:
      kind: ``"weak"`` for the same batch on each chip, ``"strong"`` for the same batch in all.
      program: workload and parameters, without the batch.
      generation: of the chips.
      steps: by number of chips.
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
        """Seconds beyond a perfectly divided step, by cause."""
        first = self.steps[0]
        ideal = first.seconds * step.batch / first.batch
        return {
            "the all-reduce": step.all_reduce_seconds,
            "work that a smaller batch per chip does not reduce": step.compute_seconds - ideal,
        }


def all_reduce_seconds(chip: Chip, shape: Sequence[int], size: float) -> float:
    """Estimates the least time of an all-reduce of `size` bytes over a torus or mesh of chips.

    A chip sends and receives ``2 (n - 1) / n`` times the bytes, over all its links at once: two
    along an axis that is a ring, one along an axis that is a line, as the chips at its ends have
    one. Each hop adds 1 us.

    Args:
      chip: its links.
      shape: chips along each axis. With two axes, those of 16 are rings; with three, all are if
        none is below 4.
      size: bytes that each chip hands in.

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

    NVLink sums over the GPUs of a host, so that each has a part of the sum; InfiniBand sums each
    part over the hosts, one adapter for each GPU; NVLink hands the parts round. Over `n` members a
    GPU sends ``2 (n - 1) / n`` times the bytes, in ``2 (n - 1)`` hops of 1 us.

    Args:
      gpu: its links.
      shape: hosts, and GPUs of each.
      size: bytes that each GPU hands in.

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
    """Numbers of chips to look at, up to all that are absent: 1, 8, 64, 256.

    Example:
      >>> from capsjax.bench import parse_target
      >>> from capsjax.bench.scaling import slice_sizes
      >>> slice_sizes(parse_target("v5p-128"))
      [1, 8, 64]
    """
    return [size for size in _SIZES if size < target.chips] + [target.chips]


def batches(target: Target) -> list[int]:
    """Batches per chip that the slices of a target take; 128 alone for devices of this machine.

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

    A slice's step is the row of its batch per chip that was compiled for as many chips, or for the
    next larger number: the programs differ in their all-reduce alone.

    Args:
      rows: of any workloads; other TPUs than v4, v5e, v5p and v6e, and devices of this machine,
        have no estimate.

    Returns:
      For each pod and program, weak scaling with a batch of 128 on each chip, or the largest there
      is, and strong scaling with the largest batch in all.
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
        return None  # slices of the generation do not come in this size
    size, compute = all_reduce_bytes(row), _compute_seconds(row, pod)
    if compute is None:
        return None
    if pod.platform == "gpu":
        summed = gpu_all_reduce_seconds(GPUS[pod.generation], shape, size)
    else:
        summed = all_reduce_seconds(CHIPS[pod.generation], shape, size)
    return ScalingStep(chips, batch, row.counts["cycles"], compute, summed)


def all_reduce_bytes(row: Row) -> float:
    """Bytes that each device hands in to all-reduces in one step."""
    found = row.hlo.collectives.get("all-reduce") if row.hlo else None
    return found.bytes if found else 0.0


def _compute_seconds(row: Row, target: Target) -> float | None:
    """What one absent chip takes without communication; None if it is not known."""
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
