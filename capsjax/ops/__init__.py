"""Pure functions of capsule networks (floor 1); they import nothing but jax."""

from capsjax.ops.capsule import length, squash
from capsjax.ops.conv import conv_general_dilated
from capsjax.ops.losses import margin_loss, reconstruction_loss
from capsjax.ops.votes import dense_votes

__all__ = [
    "conv_general_dilated",
    "dense_votes",
    "length",
    "margin_loss",
    "reconstruction_loss",
    "squash",
]
