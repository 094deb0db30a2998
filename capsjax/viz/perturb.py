"""Reconstructions from chosen or perturbed class capsules."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from capsjax.nn import Decoder

OFFSETS = tuple(round(-0.25 + 0.05 * n, 2) for n in range(11))


def decoder_of(network: nnx.Module) -> Decoder:
    """Returns the network's decoder, or raises a ValueError if it has none."""
    decoder = getattr(network, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise ValueError(f"network must have a decoder, got a {type(network).__name__} without one")
    return decoder


@nnx.jit
def reconstruct(network: nnx.Module, poses: jax.Array, parent: jax.Array | int) -> jax.Array:
    """Reconstructs images from one class capsule: ``[..., J, D]`` to ``[..., H, W, C]``."""
    target = jax.nn.one_hot(parent, poses.shape[-2])
    target = jnp.broadcast_to(target, poses.shape[:-1])
    return decoder_of(network)(poses, target).astype(jnp.float32)


def vary_dimensions(
    network: nnx.Module, poses: jax.Array, parent: int, offsets: Sequence[float] = OFFSETS
) -> jax.Array:
    """Adds each offset to each dimension of a class capsule and reconstructs the images.

    Args:
      network: a network with a decoder.
      poses: class capsules of one image, ``[J, D]``.
      parent: the class whose capsule is varied.
      offsets: N offsets; −0.25 to 0.25 in steps of 0.05 by default, as in the paper.

    Returns:
      Reconstructions, ``[D, N, H, W, C]``.

    Raises:
      ValueError: the network has no decoder, or the class is out of range.

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 5.1.
    """
    if poses.ndim != 2 or not 0 <= parent < poses.shape[0]:
        raise ValueError(f"parent must be a class of poses [J, D] {poses.shape}, got {parent}")
    moved = jnp.eye(poses.shape[1])[:, None] * jnp.asarray(offsets)[None, :, None]
    at = jax.nn.one_hot(parent, poses.shape[0])[:, None]
    varied = poses[None, None] + at[None, None] * moved[:, :, None, :]
    return reconstruct(network, varied, parent)
