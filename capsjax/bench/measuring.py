"""Measures one cell in the process it is called in: stages, program, run."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capsjax.bench.gcc import GccHotOS
from capsjax.bench.hlo import stablehlo_opcodes
from capsjax.bench.program import read_program
from capsjax.bench.rows import plain
from capsjax.bench.targets import Target, libtpu_lock
from capsjax.bench.workloads import Built, Workload

_HIT = "/jax/compilation_cache/cache_hits"
_TRACED = "/jax/core/compile/jaxpr_trace_duration"


class Stages:
    """Seconds of the stages of a process; each begins where the one before it ended.

    Args:
      begun: when the process was started, by ``time.time()`` of the one that started it.

    Attributes:
      seconds: by stage, in order.
      current: the stage that goes on, to say where something failed.
    """

    def __init__(self, begun: float):
        self._last = begun
        self.seconds: dict[str, float] = {}
        self.current = "start"

    def end(self, stage: str, *, then: str) -> None:
        """Ends a stage, and says what begins."""
        now = time.time()
        self.seconds[stage] = self.seconds.get(stage, 0) + now - self._last
        self._last, self.current = now, then


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a repetition measures.

    Attributes:
      cache: an empty directory for the persistent compilation cache.
      analyse: whether the program is read; once is enough.
      run_seconds: about how long the program is run for; 0 for not at all.
      texts: where the texts go, without suffix; or None.
    """

    cache: Path
    analyse: bool = True
    run_seconds: float = 1.0
    texts: Path | None = None


def measure(workload: Workload, target: Target, wanted: Wanted, stages: Stages) -> dict[str, Any]:
    """Measures a cell once.

    Args:
      workload: what to compile.
      target: what for.
      wanted: what to measure.
      stages: is added to.

    Returns:
      The fields of a row that one repetition gives.

    Raises:
      Exception: whatever building, compiling or running raises; ``stages.current`` says which.
    """
    if isinstance(workload, GccHotOS):
        return _measure_gcc(workload, wanted, stages)
    stages.end("start", then="devices")
    with libtpu_lock() if target.platform == "tpu" else contextlib.nullcontext(0.0) as waited:
        return {"waited_for_libtpu": waited, **_measure(workload, target, wanted, stages)}


def _measure(workload: Workload, target: Target, wanted: Wanted, stages: Stages) -> dict[str, Any]:
    devices = target.devices()
    _use_cache(wanted.cache)
    stages.end("devices", then="build")
    built = workload.build(devices)
    stages.end("build", then="trace")
    lowered = _trace_and_lower(built, stages)
    with _counted(_HIT) as hits:
        compiled = lowered.compile()
        stages.end("compile", then="load")
    cache: dict[str, Any] = {"hits_cold": hits[0], "entries": len(os.listdir(wanted.cache))}
    row: dict[str, Any] = {"devices": built.devices, "device_kind": devices[0].device_kind}
    # An executable for a TPU that is not there cannot be loaded.
    if not target.is_absent:
        jax.clear_caches()
        again = _lower(built)
        stages.end("lower_again", then="load")
        with _counted(_HIT) as hits:
            again.compile()
        stages.end("load", then="analyse")
        cache["hits_warm"] = hits[0]
    row["cache"] = cache
    stages.current = "analyse"
    if wanted.analyse:
        row |= _analyse(lowered, compiled, wanted.texts)
        stages.end("analyse", then="run")
    if wanted.run_seconds and not target.is_absent:
        stages.current = "run"
        _check_memory(row.get("memory"), target)
        row["run"] = _run(lambda: _arguments(built), compiled, built.donated, wanted.run_seconds)
        stages.end("run", then="exit")
    return row


def _trace_and_lower(built: Built, stages: Stages) -> Any:
    if hasattr(built.function, "trace"):
        traced = built.function.trace(*built.arguments)
        stages.end("trace", then="lower")
        lowered = traced.lower()
        stages.end("lower", then="compile")
        return lowered
    # pmap does both at once, and tells of each function that it traced: the outermost holds the
    # others.
    with _durations(_TRACED) as seconds:
        lowered = built.function.lower(*built.arguments)
    stages.end("lower", then="compile")
    stages.seconds["trace"] = max(seconds, default=0.0)
    stages.seconds["lower"] -= stages.seconds["trace"]
    return lowered


def _lower(built: Built) -> Any:
    return built.function.lower(*built.arguments)


def _use_cache(folder: Path) -> None:
    """Turns the persistent cache on, in a directory that has to be empty: what follows is cold."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.listdir(folder):
        raise RuntimeError(f"the cache {folder} is not empty")
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _analyse(lowered: Any, compiled: Any, texts: Path | None) -> dict[str, Any]:
    before, after = lowered.as_text(), compiled.as_text()
    if texts is not None:
        texts.parent.mkdir(parents=True, exist_ok=True)
        texts.with_name(texts.name + ".stablehlo.mlir").write_text(before, encoding="utf-8")
        texts.with_name(texts.name + ".hlo.txt").write_text(after, encoding="utf-8")
    stablehlo = stablehlo_opcodes(before)
    program = read_program(after)
    return {
        "stablehlo": {
            "instructions": sum(stablehlo.values()),
            "opcodes": dict(stablehlo.most_common()),
        },
        "hlo": {
            "instructions": sum(program.opcodes.values()),
            "fusion_count": sum(program.fusions.values()),
            "is_complete": program.is_complete,
            **plain({f.name: getattr(program, f.name) for f in dataclasses.fields(program)}),
        },
        "memory": _memory(compiled),
    }


def _memory(compiled: Any) -> dict[str, int] | None:
    """Bytes on each device, by the compiler."""
    found = compiled.memory_analysis()
    names = {
        "arguments": "argument",
        "outputs": "output",
        "aliased": "alias",
        "temporaries": "temp",
        "code": "generated_code",
    }
    if found is None:
        return None
    return {name: int(getattr(found, f"{key}_size_in_bytes")) for name, key in names.items()}


def _check_memory(memory: dict[str, int] | None, target: Target) -> None:
    """Raises a MemoryError where the system would rather kill the process, or others."""
    if memory is None or target.platform != "cpu":
        return
    needed = sum(memory[name] for name in ("arguments", "outputs", "temporaries"))
    needed *= target.count or 1
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    if needed > available:
        raise MemoryError(
            f"out of memory: needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        )


def _arguments(built: Built) -> tuple[Any, ...]:
    """Arrays of these shapes: small positive numbers, zeros for integers, a random key."""
    random = np.random.default_rng(0)

    def make(shape: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return np.zeros(shape.shape, shape.dtype)
        return 0.1 * random.random(shape.shape, np.float32).astype(shape.dtype)

    def place(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(make(shape), shape.sharding)

    return tuple(jax.tree.map(place, built.arguments))


def _run(
    make_arguments: Callable[[], tuple[Any, ...]],
    function: Callable[..., Any],
    donated: bool,
    seconds: float,
) -> dict[str, Any]:
    """Seconds of the first call, and of at least three more."""
    arguments = make_arguments()

    def call() -> float:
        first = jax.tree.map(jnp.copy, arguments[0]) if donated else arguments[0]
        jax.block_until_ready((first, arguments))
        start = time.perf_counter()
        jax.block_until_ready(function(first, *arguments[1:]))
        return time.perf_counter() - start

    first = call()
    calls: list[float] = []
    until = time.perf_counter() + seconds
    while len(calls) < 3 or (time.perf_counter() < until and len(calls) < 100):
        calls.append(call())
    return {"first_seconds": first, "seconds": calls}


@contextlib.contextmanager
def _counted(wanted: str) -> Iterator[list[int]]:
    """Counts an event of jax."""
    count = [0]

    def listen(event: str, **_: Any) -> None:
        count[0] += event == wanted

    jax.monitoring.register_event_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_listener(listen)


@contextlib.contextmanager
def _durations(wanted: str) -> Iterator[list[float]]:
    """Keeps the durations that jax tells of an event."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == wanted:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _measure_gcc(workload: GccHotOS, wanted: Wanted, stages: Stages) -> dict[str, Any]:
    stages.end("start", then="compile")
    with workload.compiled() as (function, seconds):
        stages.end("compile", then="run")
        row = _run(workload.arguments, function, False, wanted.run_seconds)
        stages.end("run", then="exit")
    return {
        "devices": 1,
        "device_kind": "cpu",
        "run": row,
        "gcc": {"command": " ".join(workload.command[:-1]), "seconds": seconds},
        "hlo": {"cost": {"flops": workload.flops, "transcendentals": 0, "bytes": None}},
        "memory": {"arguments": sum(a.nbytes for a in workload.arguments()), "outputs": 0},
    }
