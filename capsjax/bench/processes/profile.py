"""Profiles the kernels that a program runs on a GPU, from a profiler trace."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from capsjax.bench.results.rows import Kernel, Profile

_MOST_KERNELS = 40


def profile_call(call: Callable[[], Any], *, calls: int = 2) -> Profile | None:
    """Returns the kernels that a call runs on the GPU; None if it runs none.

    Args:
      call: a compiled call without arguments; its result is awaited.
      calls: number of traced calls; the result is their mean.
    """
    with tempfile.TemporaryDirectory(prefix="capsjax-profile-") as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        traces = list(Path(folder).rglob("*.xplane.pb"))
        return _read([jax.profiler.ProfileData.from_file(str(path)) for path in traces], calls)


def _read(traces: list[Any], calls: int) -> Profile | None:
    """Reads traces, in which a plane is a device and a line is a stream."""
    seconds: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for trace in traces:
        for plane in trace.planes:
            for line in plane.lines if "GPU" in plane.name else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    seconds[event.name] += 1e-9 * event.duration_ns / calls
                    launches[event.name] += 1
    if not launches:
        return None
    return Profile(
        seconds=sum(seconds.values()),
        launches=launches.total() / calls,
        kernels=tuple(
            Kernel(name[:200], each, launches[name] / calls)
            for name, each in seconds.most_common(_MOST_KERNELS)
        ),
    )
