"""The environment of a measurement: versions, flags, machine."""

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from capsjax.machine import machine_memory, processors
from capsjax.version import __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions, flags and machine of a process; a version is None if not installed.

    Attributes:
      capsjax: version, with the commit if it runs from a clone.
      jax: version.
      jaxlib: version.
      libtpu: version.
      cuda_plugin: version of JAX's CUDA plugin, for any version of CUDA.
      flax: version.
      optax: version.
      torch: version.
      python: version.
      xla_flags: the environment variable ``XLA_FLAGS``.
      libtpu_init_args: the environment variable ``LIBTPU_INIT_ARGS``.
      glibc_tunables: the environment variable ``GLIBC_TUNABLES``, such as
        ``glibc.malloc.hugetlb=1``, which makes large programs on CPUs faster.
      cpu: model of the processor.
      cpu_features: instruction sets that matter to XLA.
      cores: number of cores that this process may use.
      memory_bytes: memory of the machine or the container; None if unknown.
      system: operating system, such as ``Linux-6.1-x86_64``.
    """

    capsjax: str
    jax: str | None
    jaxlib: str | None
    libtpu: str | None
    cuda_plugin: str | None
    flax: str | None
    optax: str | None
    torch: str | None
    python: str
    xla_flags: str
    libtpu_init_args: str
    glibc_tunables: str
    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    system: str


_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve")


def read_environment() -> Environment:
    """Returns the environment of this process.

    Example:
      >>> from capsjax.bench import read_environment
      >>> read_environment().cores >= 1
      True
    """
    cpu = _cpu_information()
    features = (cpu.get("flags") or cpu.get("Features") or "").split()
    return Environment(
        capsjax=f"{__version__}{_commit()}",
        jax=_version("jax"),
        jaxlib=_version("jaxlib"),
        libtpu=_version("libtpu"),
        cuda_plugin=_version("jax-cuda13-plugin") or _version("jax-cuda12-plugin"),
        flax=_version("flax"),
        optax=_version("optax"),
        torch=_version("torch"),
        python=platform.python_version(),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        libtpu_init_args=os.environ.get("LIBTPU_INIT_ARGS", ""),
        glibc_tunables=os.environ.get("GLIBC_TUNABLES", ""),
        cpu=cpu.get("model name") or platform.processor() or platform.machine(),
        cpu_features=tuple(name for name in _FEATURES if name in features),
        cores=processors(),
        memory_bytes=machine_memory(),
        system=platform.platform(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_information() -> dict[str, str]:
    """Returns Linux's description of the first processor; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _commit() -> str:
    """Returns ``+`` and the commit of capsjax's clone, with ``.dirty`` if it was changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"+{done.stdout.strip()}"
