"""Eight CPU devices, strict rank promotion, and where real data come from."""

import atexit
import gc
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before jax is imported anywhere: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # Nearly all of the time goes to compiling programs that run once, on tiny arrays.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Code generators in parallel each start anew; on two cores that is a quarter of compiling.
    " --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Ten frames of Python as each operation's place in a program take a fifth of lowering it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The processes that tests start need not each compile the package's modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one test has compiled, another and the processes that tests start need not.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="capsjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# As in pyproject.toml, for the processes that tests start.
os.environ["PYTHONWARNINGS"] = (
    "ignore:Error reading persistent compilation cache entry,"
    "ignore:Error writing persistent compilation cache entry"
)

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The heap grows to gigabytes of traced programs, which each full collection walks.
gc.set_threshold(100_000, 20, 100)

# Examples are the same in every run, and few: each new shape is a compilation. One that fails is
# not made smaller, which would take minutes.
hypothesis.settings.register_profile(
    "capsjax",
    deadline=None,
    derandomize=True,
    max_examples=12,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("capsjax")


@pytest.fixture(autouse=True)
def loggers():
    """Undoes what a command that a test calls does to loggers and hooks."""
    kept = [
        (logger, logger.level, logger.propagate, logger.handlers[:])
        for logger in map(logging.getLogger, ("capsjax", "absl"))
    ]
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for logger, level, propagate, handlers in kept:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder of prepared data beside the repository")
    return folder


@pytest.fixture(scope="session")
def absent_h200():
    """Places arguments on an H200 that programs are compiled for without having one."""
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from capsjax.bench import GPUS

    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        pytest.skip("needs the CUDA plugin: pip install 'capsjax[cuda]'")
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=GPUS["h200"].target_config
    )
    return NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec())


@pytest.fixture
def as_on_tpu(monkeypatch):
    """What depends on the platform is computed as on a TPU."""

    def choose(*arguments, default=None, tpu=None, **_):
        return (tpu or default)(*arguments)

    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    yield
    jax.clear_caches()
