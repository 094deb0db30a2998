"""How far results are from those of the plain implementation in float64 on the CPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capsjax.bench.results.rows import Deviation
from capsjax.bench.workloads import make_workload
from capsjax.bench.workloads.workload import JaxFunction

# The implementation that others are held against.
_PLAIN = {"routing": "reference", "convolution": "patches"}
# Factors of float32 products are rounded to this on NVIDIA GPUs unless asked otherwise.
_TF32_EPSILON = 2.0**-10


def measure_deviation(
    name: str, parameters: dict[str, Any], built: JaxFunction, compiled: Any
) -> Deviation:
    """Returns the largest deviation among the results of a program, for normal random arguments.

    Args:
      name: of the workload, ``"routing"`` or ``"convolution"``.
      parameters: of the workload.
      built: the workload's function.
      compiled: the program.

    Raises:
      FloatingPointError: a result is not finite.
      KeyError: the workload has no plain implementation.
    """
    random = np.random.default_rng(0)
    arguments = [0.3 * random.normal(size=x.shape) for x in built.arguments]
    # Rounded as the program's are, so that all of the difference is its own.
    arguments = [x.astype(s.dtype) for x, s in zip(arguments, built.arguments, strict=True)]
    device = built.arguments[0].sharding.device_set.pop()
    results = compiled(*(jax.device_put(x, device) for x in arguments))

    workload: Any = make_workload(name, parameters)
    plain = dataclasses.replace(workload, implementation=_PLAIN[name], dtype="float64")
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True):
        exact = [jax.device_put(x.astype(np.float64), cpu) for x in arguments]
        expected = plain.build([cpu]).function(*exact)
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
    found = max(_relative(*pair) for pair in pairs)
    if not np.isfinite(found):
        raise FloatingPointError("a result is not finite")
    epsilon = float(jnp.finfo(built.arguments[0].dtype).eps)
    if device.platform == "gpu":
        epsilon = max(epsilon, _TF32_EPSILON)
    return Deviation(found, allowed=max(4 * epsilon, 1e-5))


def _relative(actual: jax.Array, expected: jax.Array) -> float:
    """Norm of the difference by that of the expected numbers; infinite for NaN."""
    a, b = (np.asarray(x, np.float64) for x in (actual, expected))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return np.inf if np.isnan(error) else error
