"""Batches in tiles of 128 examples, one in each lane of a kernel (floor 2)."""

import jax
import jax.numpy as jnp

LANES = 128


def to_lanes(x: jax.Array) -> jax.Array:
    """Tiles ``[tiles, J, D, lanes]`` of ``[J, B, D]``, the last one filled up with zeros."""
    parents, batch, features = x.shape
    x = jnp.pad(x, ((0, 0), (0, -batch % LANES), (0, 0)))
    return x.reshape(parents, -1, LANES, features).transpose(1, 0, 3, 2)


def from_lanes(x: jax.Array, batch: int) -> jax.Array:
    """The inverse of :func:`to_lanes`."""
    x = x.transpose(1, 0, 3, 2)
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :batch]
