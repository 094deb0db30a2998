"""Targets of compilation: devices of this machine, or absent TPUs and GPUs.

The TPU compiler is part of ``libtpu`` and needs no TPU. Only one process at a time can use it, so
processes of capsjax wait for each other. The GPU compiler is part of the CUDA plugin and needs no
GPU.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from capsjax.bench.gpus import GPUS, HOST
from capsjax.errors import ConfigError, how_to_install
from capsjax.ops import _hopper

Platform = Literal["cpu", "gpu", "tpu"]


class _Generation(NamedTuple):
    """The naming and topology of a generation of TPUs.

    Attributes:
      cores_per_chip: cores per chip if names count cores; 1 if they count chips.
      dimensions: number of axes of the torus.
      config: name of the chip configuration, for the compiler.
    """

    cores_per_chip: int
    dimensions: int
    config: str


_GENERATIONS = {
    "v4": _Generation(2, 3, "megacore"),
    "v5e": _Generation(1, 2, "default"),
    "v5p": _Generation(2, 3, "default"),
    "v6e": _Generation(1, 2, "default"),
    "tpu7x": _Generation(2, 3, "default"),
}
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}
# Without a GPU, tile sizes cannot be timed.
_ABSENT_GPU_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_collect_cost_model_stats=true")
# Collecting one of the estimates, which is not used, fails for A100: XLA has no table for it.
_WITHOUT_SOL = "--xla_disable_hlo_passes=sol-gpu-cost-model-stats-collection"
_MOST_CHIPS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
EXAMPLES = (
    "cpu",
    "cpu:8",
    "gpu",
    "tpu",
    "v4-32",
    "v5e-1",
    "v5e-8",
    "v5e-256",
    "v5p-128",
    "v6e-8",
    "v6e-256",
    "tpu7x-8",
    "h100",
    "h200:8",
    "b200:16",
)


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as given.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      count: number of local devices, virtual ones for CPUs; None for all.
      topology: topology of absent devices, such as ``"v5e:16x16"``, the TPU compiler's name, or
        ``"h100:2x8"`` for two hosts with eight GPUs each; None for devices of this machine.
    """

    name: str
    platform: Platform
    count: int | None = None
    topology: str | None = None

    @property
    def is_absent(self) -> bool:
        """Whether programs can only be compiled, not run here."""
        return self.topology is not None

    @property
    def generation(self) -> str:
        """Generation of absent devices, such as ``"v5e"`` or ``"h100"``; else empty."""
        return (self.topology or "").partition(":")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Absent chips along each axis, or numbers of hosts and of GPUs per host; else empty."""
        sizes = (self.topology or "").partition(":")[2]
        return tuple(int(size) for size in sizes.split("x") if size)

    @property
    def chips(self) -> int:
        """Number of absent chips; 1 for devices of this machine."""
        return math.prod(self.shape)

    def resized(self, chips: int) -> "Target":
        """Returns a target of this many absent chips of the same generation.

        Raises:
          ConfigError: the generation has no slice of this size.
        """
        if self.platform == "gpu":
            return parse_target(f"{self.generation}:{chips}")
        number = chips * _GENERATIONS[self.generation].cores_per_chip
        return parse_target(f"{self.generation}-{number}")

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables to set before JAX is imported, without XLA flags."""
        if self.is_absent and self.platform == "tpu":
            return {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3"}
        return {"JAX_PLATFORMS": "cpu"} if self.is_absent or self.platform == "cpu" else {}

    @property
    def xla_flags(self) -> tuple[str, ...]:
        """XLA flags that the target itself needs."""
        if self.platform == "cpu":
            return (f"--xla_force_host_platform_device_count={self.count or 1}",)
        if self.platform != "gpu" or not self.is_absent:
            return ()
        return (*_ABSENT_GPU_FLAGS, *([_WITHOUT_SOL] if self.generation == "a100" else []))

    def devices(self) -> tuple[jax.Device, ...]:
        """Returns the devices, or the compiler's descriptions of absent ones.

        Raises:
          ConfigError: this machine cannot serve the target.
        """
        if self.topology is not None:
            if self.platform == "gpu":
                return _absent_gpus(self)
            return _absent_tpus(self, self.topology)
        try:
            found = jax.devices(self.platform)
        except RuntimeError:
            extra = {"gpu": "cuda", "tpu": "tpu"}.get(self.platform, self.platform)
            raise ConfigError(
                f"target {self.name!r} needs a {self.platform.upper()} in this machine; if there is"
                f" one: {how_to_install(extra)}"
            ) from None
        if len(found) < (self.count or 1):
            raise ConfigError(
                f"target {self.name!r} needs {self.count} devices, this machine has {len(found)}"
            )
        return tuple(found[: self.count])


def parse_target(name: str) -> Target:
    """Returns the target with this name.

    Args:
      name: ``cpu``, ``gpu`` or ``tpu``, with ``:N`` for N devices of this machine; or the name of a
        TPU slice, in which ``v5e-256`` and ``v6e-8`` count chips, and ``v4-32``, ``v5p-128`` and
        ``tpu7x-8`` count cores, two per chip; or ``a100``, ``h100``, ``h200`` or ``b200``, with
        ``:N`` for N GPUs of one host or of hosts with eight each.

    Returns:
      A :class:`Target`. Devices are not looked up yet.

    Raises:
      ConfigError: there is no such target.

    Example:
      >>> from capsjax.bench import parse_target
      >>> parse_target("v5p-128").topology, parse_target("cpu:8").count
      ('v5p:4x4x4', 8)
    """
    if local := re.fullmatch(r"(cpu|gpu|tpu)(?::([1-9]\d*))?", name):
        platform, count = local.groups()
        number = int(count) if count else (1 if platform == "cpu" else None)
        return Target(name, platform, number)  # type: ignore[arg-type]
    if gpus := re.fullmatch(rf"({'|'.join(GPUS)})(?::([1-9]\d*))?", name):
        number = int(gpus[2] or 1)
        if number > HOST and number % HOST:
            raise ConfigError(
                f"target must have 1 to {HOST} GPUs, or hosts of {HOST} each, got {name!r}"
            )
        hosts = -(-number // HOST)
        return Target(name, "gpu", topology=f"{gpus[1]}:{hosts}x{number // hosts}")
    absent = re.fullmatch(r"([a-z0-9]+)-([1-9]\d*)", name)
    if absent is None:
        raise ConfigError(f"target must be like {', '.join(EXAMPLES)}, got {name!r}")
    family, number = _ALIASES.get(absent[1], absent[1]), int(absent[2])
    if family not in _GENERATIONS:
        raise ConfigError(
            f"target must be a TPU of generation {', '.join(_GENERATIONS)}, or a GPU such as"
            f" {', '.join(GPUS)} or h100:8, got {name!r}"
        )
    generation = _GENERATIONS[family]
    chips, rest = divmod(number, generation.cores_per_chip)
    shape = None if rest else _torus(chips, generation.dimensions, _MOST_CHIPS[family])
    if shape is None:
        raise ConfigError(f"a {family} does not come as {name!r}; try {_near(family)}")
    return Target(name, "tpu", topology=f"{family}:{'x'.join(map(str, shape))}")


@contextlib.contextmanager
def libtpu_lock(*, timeout: float = 3600) -> Iterator[float]:
    """While entered, keeps other processes of capsjax from using libtpu.

    Args:
      timeout: seconds to wait.

    Yields:
      The seconds waited.

    Raises:
      ConfigError: another process has held the lock for all this time.
    """
    import fcntl  # not on Windows, which has no libtpu either

    path = Path(tempfile.gettempdir()) / "capsjax-libtpu.lock"
    start = time.monotonic()
    with contextlib.suppress(OSError):
        path.touch(mode=0o666)
    # Opened for reading, so that any user can lock it.
    with path.open("rb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - start > timeout:
                    raise ConfigError(
                        f"another process has been using libtpu for {timeout:.0f} seconds"
                    ) from None
                time.sleep(0.2)
        yield time.monotonic() - start


_held = contextlib.ExitStack()
_waited: list[float] = []


def take_libtpu() -> float:
    """Holds :func:`libtpu_lock` until this process ends, since libtpu is not released before.

    Returns:
      The seconds waited.
    """
    if not _waited:
        _waited.append(_held.enter_context(libtpu_lock()))
    return _waited[0]


def _torus(chips: int, dimensions: int, most: int) -> tuple[int, ...] | None:
    """The shape of a slice of this many chips; None if there is none."""
    if chips == 1:
        return (1,) * dimensions
    if dimensions == 2:
        shapes = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
        return {**shapes, 256: (16, 16)}.get(chips)
    if chips in (4, 8):
        return (2, 2, chips // 4)
    if chips in (16, 32):
        return (2, chips // 8, 4) if chips == 16 else (2, 4, 4)
    # Whole cubes of 4 x 4 x 4 chips, arranged as close to a cube as possible.
    cubes, rest = divmod(chips, 64)
    if rest or chips > most:
        return None
    best = min(
        (
            (a, b, cubes // (a * b))
            for a in range(1, math.isqrt(cubes) + 1)
            for b in range(a, cubes // a + 1)
            if cubes % (a * b) == 0 and cubes // (a * b) >= b
        ),
        key=sum,
    )
    return tuple(4 * size for size in best)


def _near(family: str) -> str:
    generation = _GENERATIONS[family]
    sizes = (1, 4, 8, 16, 32, 64, 128, 256)
    fitting = (n for n in sizes if _torus(n, generation.dimensions, _MOST_CHIPS[family]))
    return ", ".join(f"{family}-{n * generation.cores_per_chip}" for n in fitting)


def _absent_gpus(target: Target) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    hosts, number = target.shape
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{hosts}x{number}",
            target_config=GPUS[target.generation].target_config,
        )
    except NotImplementedError:
        raise ConfigError(
            f"target {target.name!r} needs the GPU compiler, which comes with:"
            f" {how_to_install('cuda')}"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"target {target.name!r} is unknown to this CUDA plugin: {str(error).splitlines()[0]}"
        ) from None
    _hopper.compile_for(described.devices[0])
    return tuple(described.devices)


def _absent_tpus(target: Target, topology: str) -> tuple[jax.Device, ...]:
    name = target.name
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"target {name!r} needs the TPU compiler, which comes with: {how_to_install('tpu')}"
        )
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    host = [1, 1, 1] if target.chips == 1 else [2, 2, 1]
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology,
            chip_config_name=_GENERATIONS[target.generation].config,
            chips_per_host_bounds=host,
        )
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error) or "already in use" in str(error):
            raise ConfigError(
                f"target {name!r} needs libtpu, which another process is using"
            ) from None
        raise ConfigError(
            f"target {name!r} is unknown to this libtpu: {str(error).splitlines()[0]}"
        ) from None
    return tuple(described.devices)
