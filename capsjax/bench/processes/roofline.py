"""Measures the peak speed of the machine."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from capsjax.bench.processes.timing import alternate

_SIDE = 2048
_NUMBERS = 2**25


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Peak speed of one device.

    Attributes:
      flops_per_second: rate of a float32 matrix product, 2048 by 2048; the best of several.
      bytes_per_second: rate of reading and writing for ``x + 1`` on 128 MiB; the best of several.
    """

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, transferred: float) -> float:
        """The least time for this many operations and bytes."""
        return max(flops / self.flops_per_second, transferred / self.bytes_per_second)


def measure_roofline(devices: Sequence[jax.Device]) -> Roofline:
    """Measures the first device; takes about two seconds on a CPU."""
    with jax.default_device(devices[0]):
        matrix = jnp.ones((_SIDE, _SIDE)) / _SIDE
        numbers = jnp.ones(_NUMBERS)
        product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
        add = jax.jit(lambda x: x + 1)
        calls = {"product": lambda: product(matrix), "add": lambda: add(numbers)}
        best = {name: times.spread[0] for name, times in alternate(calls, rounds=7).items()}
    return Roofline(2 * _SIDE**3 / best["product"], 2 * numbers.nbytes / best["add"])
