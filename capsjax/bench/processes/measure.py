"""Measures cells in one process: compiles them one by one, then runs them in alternation."""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from capsjax.bench.cells import Cell
from capsjax.bench.environment import read_environment
from capsjax.bench.gpus import known_gpu
from capsjax.bench.processes.checking import measure_deviation
from capsjax.bench.processes.profile import profile_call
from capsjax.bench.processes.timing import Times, alternate, call_within
from capsjax.bench.programs.hlo import stablehlo_opcodes
from capsjax.bench.programs.program import Cost, Program, read_program
from capsjax.bench.results.rows import Deviation, Failure, Memory, Profile
from capsjax.bench.targets import Target, parse_target, take_libtpu
from capsjax.bench.workloads import make_workload
from capsjax.bench.workloads.workload import JaxFunction, Peer
from capsjax.files import write_text

_HIT = "/jax/compilation_cache/cache_hits"
_TRACED = "/jax/core/compile/jaxpr_trace_duration"
# OpenMP threads, which other compilers use on CPUs, spin for this long.
_PAUSE = 0.3
_MOST_ROUNDS = 100

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a process is asked to measure.

    Attributes:
      cells: cells with the same target and flags.
      begun: ``time.time()`` at which the process was started.
      cache: directory for persistent compilation caches.
      analyse: whether to read the compiled programs; once is enough.
      run_seconds: about how long to run each program; 0 to compile only.
      texts: directory for the texts of the programs, or None.
      profile: whether to trace kernels on GPUs, after timing.
      check: whether to compare results with those of the plain implementation.
      peer_seconds: time limit of compilation by another compiler, or None.
    """

    cells: tuple[Cell, ...]
    begun: float
    cache: Path
    analyse: bool = True
    run_seconds: float = 1.0
    texts: Path | None = None
    profile: bool = False
    check: bool = False
    peer_seconds: float | None = None


@dataclasses.dataclass(kw_only=True)
class Measurement:
    """What one process measured of one cell; fields that were not reached keep their defaults.

    Attributes:
      stages: seconds by stage, in order.
      error: why the cell failed, or None.
      ended: ``time.time()`` at the end of all stages.
      wall_seconds: duration of the process, measured from outside.
      environment: environment of the process; see :class:`capsjax.bench.Environment`.
      devices: number of devices that the program runs on.
      processes: number of processes that own these devices.
      device_kind: kind of the devices, such as ``"TPU v5 lite"``.
      cache: hits of the persistent cache in cold and warm compilation, and number of entries.
      command: command line of another compiler.
      stablehlo: number of operations by name.
      program: what XLA compiled.
      memory: memory of each device.
      first_seconds: time of the first call.
      times: times of the counted calls.
      profile: kernels of a GPU.
      deviation: from the plain implementation in float64.
    """

    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    error: Failure | None = None
    ended: float = 0.0
    wall_seconds: float = 0.0
    environment: dict[str, Any] | None = None
    devices: int | None = None
    processes: int | None = None
    device_kind: str | None = None
    cache: dict[str, int] | None = None
    command: str | None = None
    stablehlo: dict[str, int] | None = None
    program: Program | None = None
    memory: Memory | None = None
    first_seconds: float | None = None
    times: Times | None = None
    profile: Profile | None = None
    deviation: Deviation | None = None


class _Program(NamedTuple):
    """A compiled program.

    Attributes:
      found: measurement of the program.
      make_call: puts arguments on the device and returns a call without arguments.
      pause: seconds to wait before each call of the programs run beside it.
    """

    found: Measurement
    make_call: Callable[[], Call]
    pause: float = 0.0


class _Clock:
    """Divides the time of a process into stages without gaps."""

    def __init__(self, begun: float):
        self.last = begun
        self._stage = ""

    @contextlib.contextmanager
    def stage(self, name: str, *measurements: Measurement) -> Iterator[None]:
        """Records a stage of these measurements, which begins where the last one ended."""
        self._stage = name
        yield
        seconds = self.skip()
        for each in measurements:
            each.stages[name] = each.stages.get(name, 0.0) + seconds

    def skip(self) -> float:
        """Ends the current stage, and returns its seconds."""
        last, self.last = self.last, time.time()
        return self.last - last

    @contextlib.contextmanager
    def failures(self, *measurements: Measurement) -> Iterator[None]:
        """Records an exception and its stage as the error of these measurements."""
        try:
            yield
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            for each in measurements:
                each.error = Failure(self._stage, type(error).__name__, text.splitlines()[0])


def measure_cells(request: Request) -> list[Measurement]:
    """Measures cells in this process; exceptions become errors of the cells."""
    clock = _Clock(request.begun)
    found = [Measurement() for _ in request.cells]
    with clock.failures(*found):
        with clock.stage("start", *found):
            target = parse_target(request.cells[0].target)
        if target.platform == "tpu":
            take_libtpu()
        with clock.stage("devices", *found):
            devices = target.devices()
        programs = []
        for cell, each in zip(request.cells, found, strict=True):
            if each is not found[0]:
                clock.skip()  # excludes the time of earlier cells
            with clock.failures(each):
                each.device_kind = devices[0].device_kind
                programs.append(_prepare(cell, request, target, devices, each, clock))
        if request.run_seconds and not target.is_absent:
            with clock.stage("run", *(each.found for each in programs)):
                _run(programs, request, clock)
    with clock.stage("finish", *found):
        environment = dataclasses.asdict(read_environment())
    for each in found:
        each.environment, each.ended = environment, clock.last
    return found


def _prepare(
    cell: Cell,
    request: Request,
    target: Target,
    devices: Sequence[jax.Device],
    found: Measurement,
    clock: _Clock,
) -> _Program:
    """Builds, compiles and reads the program of a cell."""
    with clock.stage("build", found):
        built = make_workload(cell.workload, dict(cell.parameters)).build(devices)
    if isinstance(built, Peer):
        pause = _PAUSE if target.platform == "cpu" else 0.0
        call = call_within(request.peer_seconds, lambda: _compile_peer(built, found, clock))
        return _Program(found, call, pause)
    found.processes = len({each.process_index for each in devices[: built.devices]})
    lowered, compiled = _compile(built, target, request.cache, found, clock)
    if request.analyse:
        with clock.stage("analyse", found):
            _analyse(lowered, compiled, request.texts and request.texts / cell.file_name, found)
    if request.check:
        with clock.stage("check", found):
            parameters = dict(cell.parameters)
            found.deviation = measure_deviation(cell.workload, parameters, built, compiled)
    return _Program(found, _caller(built, compiled, target, found))


def _compile(
    built: JaxFunction, target: Target, caches: Path, found: Measurement, clock: _Clock
) -> tuple[Any, Any]:
    """Traces, lowers and compiles with an empty cache, then loads from the cache."""
    cache = _use_new_cache(caches)
    jax.clear_caches()
    found.devices = built.devices
    if hasattr(built.function, "trace"):
        with clock.stage("trace", found):
            traced = built.function.trace(*built.arguments)
        with clock.stage("lower", found):
            lowered = traced.lower()
    else:
        # pmap traces and lowers in one call and reports each traced function; the outermost
        # contains the others.
        with clock.stage("lower", found), _durations(_TRACED) as seconds:
            lowered = built.function.lower(*built.arguments)
        found.stages["trace"] = max(seconds, default=0.0)
        found.stages["lower"] -= found.stages["trace"]
    with clock.stage("compile", found), _count(_HIT) as hits:
        compiled = lowered.compile()
    found.cache = {"hits_cold": hits[0], "entries": len(os.listdir(cache))}
    if not target.is_absent:  # an executable for absent devices cannot be loaded
        jax.clear_caches()
        with clock.stage("lower_again", found):
            again = built.function.lower(*built.arguments)
        with clock.stage("load", found), _count(_HIT) as hits:
            again.compile()
        found.cache["hits_warm"] = hits[0]
    return lowered, compiled


def _compile_peer(peer: Peer, found: Measurement, clock: _Clock) -> Callable[[], Call]:
    with clock.stage("compile", found):
        call = peer.compile()
    found.devices, found.command = 1, peer.command
    if peer.flops is not None:
        found.program = Program(cost=Cost(peer.flops))
    if peer.argument_bytes is not None:
        found.memory = Memory(arguments=peer.argument_bytes, outputs=0)
    return lambda: call


def _use_new_cache(caches: Path) -> str:
    """Enables the persistent cache in an empty directory, so that the next compilation is cold."""
    folder = tempfile.mkdtemp(dir=caches)
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _analyse(lowered: Any, compiled: Any, texts: Path | None, found: Measurement) -> None:
    before, after = lowered.as_text(), compiled.as_text()
    if texts is not None:
        texts.parent.mkdir(parents=True, exist_ok=True)
        write_text(texts.with_name(texts.name + ".stablehlo.mlir"), before)
        write_text(texts.with_name(texts.name + ".hlo.txt"), after)
    found.stablehlo = dict(stablehlo_opcodes(before).most_common())
    found.program = read_program(after, gpu=known_gpu(found.device_kind or ""))
    if memory := compiled.memory_analysis():
        found.memory = Memory(
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
        )


def _caller(
    built: JaxFunction, compiled: Any, target: Target, found: Measurement
) -> Callable[[], Call]:
    """Returns a function that places the arguments and returns a call of the program."""

    def prepare() -> Call:
        _check_memory(found.memory, target)
        arguments = list(_arguments(built))

        def call() -> Any:
            result = compiled(*arguments)
            if built.donated is not None:
                arguments[built.donated] = result[0]
            return result

        return call

    return prepare


def _arguments(built: JaxFunction) -> tuple[Any, ...]:
    """Makes arrays on the device: the workload's own, else small positive numbers and zeros."""
    random = np.random.default_rng(0)

    def make(shape: jax.ShapeDtypeStruct) -> Any:
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return np.zeros(shape.shape, shape.dtype)
        return (0.1 * random.random(shape.shape, np.float32)).astype(shape.dtype)

    if built.make_arguments is not None:
        values = jax.jit(built.make_arguments)()
    else:
        values = jax.tree.map(make, built.arguments)
    return tuple(
        jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), values, built.arguments)
    )


def _check_memory(memory: Memory | None, target: Target) -> None:
    """Raises a MemoryError where the system would kill this process or others."""
    if memory is None or target.platform != "cpu":
        return
    needed = memory.arguments + memory.outputs + (memory.temporaries or 0)
    needed *= target.count or 1
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    if needed > available:
        raise MemoryError(
            f"out of memory: needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        )


def _run(programs: Sequence[_Program], request: Request, clock: _Clock) -> None:
    """Times the first call of each program, then all programs in alternation."""
    calls: dict[str, Call] = {}
    for number, (found, make_call, _) in enumerate(programs):
        with clock.failures(found):
            call = make_call()
            start = time.perf_counter()
            jax.block_until_ready(call())
            found.first_seconds = time.perf_counter() - start
            calls[str(number)] = call
    pause = max((each.pause for each in programs), default=0.0)
    seconds = request.run_seconds * len(calls)
    times = alternate(calls, rounds=_MOST_ROUNDS, seconds=seconds, pause=pause)
    for name, each in times.items():
        found = programs[int(name)].found
        found.times = each
        if request.profile:
            with contextlib.suppress(Exception):  # times without a profile are better than none
                found.profile = profile_call(calls[name])


@contextlib.contextmanager
def _count(wanted: str) -> Iterator[list[int]]:
    """Counts an event of JAX."""
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
    """Collects the durations that JAX reports for an event."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == wanted:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
