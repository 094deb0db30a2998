"""The HotOS primitive as plain C loops, compiled by gcc: what XLA is measured against."""

import ctypes
import dataclasses
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from capsjax.bench import hotos

_SOURCE = Path(__file__).with_name("hotos.c")


class GccError(RuntimeError):
    """gcc is missing, or refuses the program; the message is one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GccHotOS:
    """The same primitive in C, ``gcc -O3 -fopenmp``; ``flags`` are added."""

    threads: int = 1
    flags: str = ""
    batch: int = 8
    channels: int = 32
    out: int = 32
    size: int = 15

    @property
    def command(self) -> list[str]:
        """The compiler's command, without the file that it writes."""
        return ["gcc", "-O3", "-fopenmp", *self.flags.split(), "-shared", "-fPIC", str(_SOURCE)]

    @contextmanager
    def compiled(self) -> Iterator[tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], float]]:
        """Compiles.

        Yields:
          The function of poses and weights, and the seconds that gcc took.

        Raises:
          GccError: gcc is missing, or refuses the program.
        """
        if shutil.which("gcc") is None:
            raise GccError("workload 'hotos_gcc' needs gcc on the path")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "hotos.so")
            start = time.perf_counter()
            done = subprocess.run(
                [*self.command, "-o", str(library)], capture_output=True, text=True, timeout=300
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise GccError(f"gcc: {done.stderr.strip().splitlines()[0]}")
            loaded = ctypes.CDLL(str(library))
            # The library's own OpenMP, whatever OMP_NUM_THREADS says.
            loaded.omp_set_num_threads(self.threads)
            yield functools.partial(self._call, loaded), seconds

    @property
    def flops(self) -> int:
        """Floating-point operations of one call."""
        return hotos.flops(self.batch, self.channels, self.out, self.size)

    def arguments(self) -> tuple[np.ndarray, np.ndarray]:
        """Poses and weights."""
        random = np.random.default_rng(0)
        shapes = hotos.shapes(self.batch, self.channels, self.out, self.size)
        poses, weights = (random.random(shape, np.float32) for shape in shapes)
        return poses, weights

    def _call(self, library: ctypes.CDLL, poses: np.ndarray, weights: np.ndarray) -> np.ndarray:
        grid = (self.size - hotos.KERNEL) // hotos.STRIDE + 1
        result = np.empty((self.batch, self.out, grid, grid, hotos.POSE, hotos.POSE), np.float32)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (poses, weights, result))
        library.capsule_convolution(*pointers, self.batch, self.channels, self.out, self.size)
        return result
