"""What a process may use of its machine: processors and memory."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def processors() -> int:
    """Returns the number of processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # missing on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine_memory() -> int | None:
    """Bytes of memory of the machine or this process's container; None if unknown."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        return min(memory, int(_CGROUP.read_text(encoding="ascii")))
    except (ValueError, OSError):  # "max", or no such container
        return memory
