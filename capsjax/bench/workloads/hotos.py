"""The convolutional-capsule primitive of Barham and Isard in four formulations.

*Machine Learning Systems are Stuck in a Rut*, HotOS 2019. Poses are
``P[n, c, x, y, i, k]``, weights ``W[c, o, u, v, k, j]``, and

``V[n, o, x, y, i, j] = sum over c, u, v, k of P[n, c, 2x + u, 2y + v, i, k] W[c, o, u, v, k, j]``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from capsjax.bench.workloads.workload import Direction, JaxFunction, directed, on_one_device

STRIDE, KERNEL, POSE = 2, 3, 4
_HIGHEST = lax.Precision.HIGHEST


def shapes(batch: int, channels: int, out: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of poses and weights."""
    return (
        (batch, channels, size, size, POSE, POSE),
        (channels, out, KERNEL, KERNEL, POSE, POSE),
    )


def flops(batch: int, channels: int, out: int, size: int) -> int:
    """Returns the floating-point operations; a multiply-add counts as two."""
    grid = (size - KERNEL) // STRIDE + 1
    return 2 * batch * out * grid**2 * channels * KERNEL**2 * POSE**3


def by_einsum(poses: jax.Array, weights: jax.Array) -> jax.Array:
    """One einsum over the gathered windows."""
    return jnp.einsum("ncxyuvik,couvkj->noxyij", _windows(poses), weights, precision=_HIGHEST)


def by_patches(poses: jax.Array, weights: jax.Array) -> jax.Array:
    """Windows as rows of one matrix, times the weights as another."""
    n, c, x, y, u, v, i, k = _windows(poses).shape
    rows = _windows(poses).transpose(0, 2, 3, 6, 1, 4, 5, 7).reshape(n * x * y * i, c * u * v * k)
    out, j = weights.shape[1], weights.shape[-1]
    columns = weights.transpose(0, 2, 3, 4, 1, 5).reshape(c * u * v * k, out * j)
    product = jnp.matmul(rows, columns, precision=_HIGHEST)
    return product.reshape(n, x, y, i, out, j).transpose(0, 4, 1, 2, 3, 5)


def by_convolution(poses: jax.Array, weights: jax.Array) -> jax.Array:
    """A convolution: rows of the poses are examples, channels times columns are features."""
    n, c, height, width, i, k = poses.shape
    out, j = weights.shape[1], weights.shape[-1]
    images = poses.transpose(0, 4, 2, 3, 1, 5).reshape(n * i, height, width, c * k)
    kernel = weights.transpose(2, 3, 0, 4, 1, 5).reshape(KERNEL, KERNEL, c * k, out * j)
    result = lax.conv_general_dilated(
        images,
        kernel,
        (STRIDE, STRIDE),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,
    )
    return result.reshape(n, i, *result.shape[1:3], out, j).transpose(0, 4, 2, 3, 1, 5)


def by_shifts(poses: jax.Array, weights: jax.Array) -> jax.Array:
    """Nine einsums over shifted slices, added up."""
    return sum(
        (
            jnp.einsum(
                "ncxyik,cokj->noxyij",
                _shifted(poses, u, v),
                weights[:, :, u, v],
                precision=_HIGHEST,
            )
            for u in range(KERNEL)
            for v in range(KERNEL)
        ),
        start=jnp.zeros((), poses.dtype),
    )


_FORMULATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "einsum": by_einsum,
    "patches": by_patches,
    "conv": by_convolution,
    "shifts": by_shifts,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HotOS:
    """The primitive with ``batch`` examples, from ``channels`` to ``out`` types of capsules."""

    formulation: Literal["einsum", "patches", "conv", "shifts"] = "einsum"
    direction: Direction = "forward"
    batch: int = 8
    channels: int = 32
    out: int = 32
    size: int = 15

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Makes the function."""
        function = directed(_FORMULATIONS[self.formulation], self.direction)
        sizes = shapes(self.batch, self.channels, self.out, self.size)
        return on_one_device(function, devices, sizes, "float32")


def _shifted(poses: jax.Array, u: int, v: int) -> jax.Array:
    """The poses under position (u, v) of the kernel, ``[n, c, x, y, i, k]``."""
    grid = [(size - KERNEL) // STRIDE + 1 for size in poses.shape[2:4]]
    rows = slice(u, u + STRIDE * (grid[0] - 1) + 1, STRIDE)
    columns = slice(v, v + STRIDE * (grid[1] - 1) + 1, STRIDE)
    return poses[:, :, rows, columns]


def _windows(poses: jax.Array) -> jax.Array:
    """The receptive field of each position, ``[n, c, x, y, u, v, i, k]``."""
    seen = [_shifted(poses, u, v) for u in range(KERNEL) for v in range(KERNEL)]
    stacked = jnp.stack(seen, axis=4)
    return stacked.reshape(*stacked.shape[:4], KERNEL, KERNEL, *stacked.shape[5:])
