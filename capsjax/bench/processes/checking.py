"""Measures the deviation of results from the plain implementation in float64 on the CPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capsjax.bench.results.rows import Deviation
from capsjax.bench.workloads import make_workload
from capsjax.bench.workloads.workload import JaxFunction

# The reference implementation.
_PLAIN = {"routing": "reference", "convolution": "patches"}
# NVIDIA GPUs round the factors of float32 products to this precision by default.
_TF32_EPSILON = 2.0**-10


def measure_deviation(
    name: str, parameters: dict[str, Any], built: JaxFunction, compiled: Any
) -> Deviation:
    """Returns the largest deviation among the results of a program, for normal random arguments.

    Args:
      name: name of the workload, ``"routing"`` or ``"convolution"``.
      parameters: parameters of the workload.
      built: the workload's function.
      compiled: the program.

    Raises:
      FloatingPointError: a result is not finite.
      KeyError: the workload has no plain implementation.
    """
    workload: Any = make_workload(name, parameters)
    plain: Any = dataclasses.replace(workload, implementation=_PLAIN[name], dtype="float64")
    dtype = built.arguments[0].dtype
    arguments, expected = _expected(plain, dtype.name)
    device = built.arguments[0].sharding.device_set.pop()
    results = compiled(*(jax.device_put(x.astype(dtype), device) for x in arguments))
    pairs = zip(jax.tree.leaves(results), expected, strict=True)
    found = max(_relative(*pair) for pair in pairs)
    if not np.isfinite(found):
        raise FloatingPointError("a result is not finite")
    epsilon = float(jnp.finfo(dtype).eps)
    if device.platform == "gpu":
        epsilon = max(epsilon, _TF32_EPSILON)
    return Deviation(found, allowed=max(4 * epsilon, 1e-5))


@functools.lru_cache(maxsize=1)  # shared by the programs that are compared
def _expected(plain: Any, dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns arguments that are exact in a dtype, and the results, both in float64."""
    random, cpu = np.random.default_rng(0), jax.devices("cpu")[0]
    with jax.enable_x64(True):
        built = plain.build([cpu])
        arguments = [
            (0.3 * random.normal(size=x.shape)).astype(jnp.dtype(dtype)).astype(np.float64)
            for x in built.arguments
        ]
        results = built.function(*(jax.device_put(x, cpu) for x in arguments))
        return arguments, [np.asarray(x) for x in jax.tree.leaves(results)]


def _relative(actual: jax.Array, expected: np.ndarray) -> float:
    """Norm of the difference, divided by that of the expected numbers; infinite for NaN."""
    error = float(np.linalg.norm(np.asarray(actual, np.float64) - expected))
    return np.inf if np.isnan(error) else error / float(np.linalg.norm(expected))
