"""Batches in tiles of 128 examples, one in each lane of a kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128

Packed = tuple[jax.Array, jax.Array]
Kernel = Callable[..., tuple[jax.Array, ...]]


def forward_tiles(kernel: Kernel, packed: Packed, queries: jax.Array, batch: int) -> jax.Array:
    """Sums of all tiles, ``[J, B, D]``.

    Args:
      kernel: from one tile's poses, the weights and a query ``[J, D, lanes]`` to its sums.
      packed: poses ``[tiles, ...]``, and weights.
      queries: from :func:`to_lanes`.
      batch: B.
    """
    poses, weights = packed
    sums = lax.map(lambda tile: kernel(tile[0], weights, tile[1])[0], (poses, queries))
    return from_lanes(sums, batch)


def backward_tiles(
    kernel: Kernel,
    packed: Packed,
    queries: jax.Array,
    d_sums: jax.Array,
    grads: Packed,
    batch: int,
) -> tuple[jax.Array, Packed]:
    """The query's gradient, ``[J, B, D]``, and `grads` with those of poses and weights added.

    Args:
      kernel: from one tile's poses, the weights, a query and its sums' gradient to the gradients of
        poses, weights and query.
      packed: poses ``[tiles, ...]``, and weights.
      queries: from :func:`to_lanes`.
      d_sums: from :func:`to_lanes`.
      grads: like `packed`.
      batch: B.
    """
    poses, weights = packed

    def tile(
        d_weights: jax.Array, arguments: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        u, q, d_s = arguments
        d_u, d_w, d_q = kernel(u, weights, q, d_s)
        return d_weights + d_w, (d_q, d_u)

    d_weights, (d_query, d_poses) = lax.scan(tile, grads[1], (poses, queries, d_sums))
    return from_lanes(d_query, batch), (grads[0] + d_poses, d_weights)


def to_lanes(x: jax.Array) -> jax.Array:
    """Tiles ``[tiles, J, D, lanes]`` of ``[J, B, D]``, the last one filled up with zeros."""
    parents, batch, features = x.shape
    x = jnp.pad(x, ((0, 0), (0, -batch % LANES), (0, 0)))
    return x.reshape(parents, -1, LANES, features).transpose(1, 0, 3, 2)


def from_lanes(x: jax.Array, batch: int) -> jax.Array:
    """The inverse of :func:`to_lanes`."""
    x = x.transpose(1, 0, 3, 2)
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :batch]
