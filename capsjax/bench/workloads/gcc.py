"""The HotOS primitive as plain C loops compiled by gcc, for comparison with XLA."""

import ctypes
import dataclasses
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from capsjax.bench.workloads import hotos
from capsjax.bench.workloads.workload import Peer
from capsjax.errors import ConfigError

_SOURCE = Path(__file__).with_name("hotos.c")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GccHotOS:
    """The HotOS primitive in C, compiled by ``gcc -O3 -fopenmp`` with additional ``flags``."""

    threads: int = 1
    flags: str = ""
    batch: int = 8
    channels: int = 32
    out: int = 32
    size: int = 15

    def build(self, devices: Sequence[jax.Device]) -> Peer:
        """Makes arguments; gcc compiles for this machine, whatever the devices."""
        del devices
        random = np.random.default_rng(0)
        sizes = (self.batch, self.channels, self.out, self.size)
        poses, weights = (random.random(shape, np.float32) for shape in hotos.shapes(*sizes))
        return Peer(
            compile=lambda: functools.partial(self.compile(), poses, weights),
            flops=hotos.flops(*sizes),
            argument_bytes=poses.nbytes + weights.nbytes,
            command=" ".join(self._command[:-1]),
        )

    def compile(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Compiles the function of poses and weights.

        Raises:
          ConfigError: gcc is missing, or rejects the program or the flags.
        """
        if shutil.which("gcc") is None:
            raise ConfigError("workload 'hotos_gcc' needs gcc on the path")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "hotos.so")
            done = subprocess.run(
                [*self._command, "-o", str(library)], capture_output=True, text=True, timeout=300
            )
            if done.returncode:
                raise ConfigError(f"gcc: {done.stderr.strip().splitlines()[0]}")
            loaded = ctypes.CDLL(str(library))
        # Overrides OMP_NUM_THREADS.
        loaded.omp_set_num_threads(self.threads)
        return functools.partial(self._call, loaded)

    @property
    def _command(self) -> list[str]:
        return ["gcc", "-O3", "-fopenmp", *self.flags.split(), "-shared", "-fPIC", str(_SOURCE)]

    def _call(self, library: ctypes.CDLL, poses: np.ndarray, weights: np.ndarray) -> np.ndarray:
        grid = (self.size - hotos.KERNEL) // hotos.STRIDE + 1
        result = np.empty((self.batch, self.out, grid, grid, hotos.POSE, hotos.POSE), np.float32)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (poses, weights, result))
        library.capsule_convolution(*pointers, self.batch, self.channels, self.out, self.size)
        return result
