r"""Sweeps for NVIDIA Hopper GPUs: one kernel, which keeps votes in registers.

A program of the kernel has a tile of 64 examples and a group of children. Query (and gradient of
the sums) of the tile, and poses and weights of the group are copied to shared memory at its start.
For one child after the other,

* one matrix instruction of a warpgroup computes the votes of the tile, ``[64, J * D]``, in
  registers, of factors rounded to TF32;
* products with the query, summed over D, are the logits; their softmax is the coupling;
* votes times coupling are added to the sums, which stay in registers until the last child.

XLA adds the sums of all groups. The backward sweep does the same with the gradient of the logits
instead of the coupling, and stores both: J numbers per child and example instead of the J·D of a
vote. With them, a vote's gradient is a sum of products,
:math:`\sum_t c^{(t)}_{ij} \bar s^{(t)}_j + \bar b^{(t)}_{ij} V^{(t)}_j`, which XLA computes once
for all iterations, followed by two batched matrix products.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from capsjax.ops import _hopper
from capsjax.routing.fused.hopper_sizes import Sizes
from capsjax.routing.fused.sweep_primitive import sweep

Packed = tuple[jax.Array, jax.Array]

# Iterations are unrolled: each of them is a kernel, and two more terms of the votes' gradient.
_MOST_ITERATIONS = 8


@dataclasses.dataclass(frozen=True)
class MosaicGpu:
    """Sweeps as calls of a Pallas kernel.

    Attributes:
      share: the coupling of every pair if all logits are zero.
      leaky: whether the softmax includes a logit of zero.
      stop_gradient: whether the coupling is treated as a constant.
      required: whether lowering for another device raises an error instead of storing the votes.
    """

    share: float
    leaky: bool
    stop_gradient: bool
    required: bool

    precision = lax.Precision.DEFAULT
    unrolled = True

    @classmethod
    def of(
        cls,
        poses: jax.Array,
        weights: jax.Array,
        *,
        num_iterations: int,
        leaky: bool,
        stop_gradient: bool,
        precision: lax.PrecisionLike,
        required: bool,
    ) -> "MosaicGpu":
        """Makes the sweeps for poses ``[B, I, K]`` and weights ``[I, K, J, D]``."""
        if (reason := _hopper.why_not_here()) is not None:
            raise _unsupported(reason)
        if poses.dtype == jnp.float64:
            raise _unsupported("computes in float32, got poses or weights of float64")
        if poses.dtype == jnp.float32 and not _hopper.allows_tf32(precision):
            raise _unsupported(f"rounds float32 factors to TF32, got precision {precision!r}")
        if num_iterations > _MOST_ITERATIONS:
            raise _unsupported(
                f"needs at most {_MOST_ITERATIONS} iterations, got num_iterations {num_iterations}"
            )
        batch, children, in_features = poses.shape
        if not isinstance(batch, int):
            raise _unsupported(f"needs poses of constant sizes, got shape {poses.shape}")
        parents, features = weights.shape[2:]
        try:
            Sizes.of(
                (1, children, batch, in_features), (1, children, parents, features, in_features), 2
            )
        except NotImplementedError as error:
            raise _unsupported(f"needs {error}") from None
        return cls(1 / (parents + leaky), leaky, stop_gradient, required)

    def pack(self, poses: jax.Array, weights: jax.Array) -> Packed:
        """Returns poses ``[1, I, B, K]`` and weights ``[1, I, J, D, K]`` in float32."""
        packed = poses.transpose(1, 0, 2), weights.transpose(0, 2, 3, 1)
        first, second = (x[None].astype(jnp.float32) for x in packed)
        return first, second

    def forward(self, packed: Packed, query: jax.Array) -> jax.Array:
        """Returns the sums ``[J, B, D]`` for logits from the query."""
        (sums,) = self._sweep(packed, query)
        return _parents_first(sums)

    def backward(
        self, packed: Packed, query: jax.Array, d_sums: jax.Array, grads: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Returns the query's gradient, and adds terms of the votes' gradient to `grads`."""
        d_query, coupling, d_logits = self._sweep(packed, query, d_sums)
        grads = (*grads, (coupling[0, ..., None], d_sums))
        if not self.stop_gradient:
            grads = (*grads, (d_logits[0, ..., None], query))
        return _parents_first(d_query), grads

    def unpack(
        self, grads: tuple[Any, ...], poses: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the gradients of poses and weights from the terms of the votes' gradient."""
        d_votes: Any = 0.0
        for factor, vector in grads:
            d_votes = d_votes + factor * vector.transpose(1, 0, 2)[None]
        shape = (poses.shape[1], poses.shape[0], *weights.shape[2:])
        d_votes = jnp.broadcast_to(d_votes, shape).astype(poses.dtype)
        poses = poses.transpose(1, 0, 2)
        d_poses = jnp.einsum("ibjd,ikjd->ibk", d_votes, weights, precision=self.precision)
        d_weights = jnp.einsum("ibk,ibjd->ikjd", poses, d_votes, precision=self.precision)
        # In the layout that XLA chooses for the weights in a loop over train steps. Without the
        # barrier, it transposes after Adam's first products, twice.
        d_weights = lax.optimization_barrier(d_weights.transpose(0, 2, 3, 1))
        return d_poses.transpose(1, 0, 2), d_weights.transpose(0, 3, 1, 2)

    def _sweep(self, packed: Packed, *queries: jax.Array) -> tuple[jax.Array, ...]:
        by_example = (x.transpose(1, 0, 2)[None] for x in queries)
        return sweep(*packed, *by_example, leaky=self.leaky, required=self.required)


def _unsupported(reason: str) -> NotImplementedError:
    return NotImplementedError(f"implementation 'mosaic_gpu' {reason}")


def _parents_first(x: jax.Array) -> jax.Array:
    return x[0].transpose(1, 0, 2)
