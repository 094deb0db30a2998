"""Pure functions of capsule networks; they depend on JAX only.

The names in ``__all__`` can also be imported from :mod:`capsjax`.
"""

from capsjax.ops.capsule import exponential_squash, length, squash
from capsjax.ops.conv import conv_general_dilated
from capsjax.ops.fields import ReceptiveFields as ReceptiveFields
from capsjax.ops.losses import margin_loss, reconstruction_loss, spread_loss
from capsjax.ops.votes import dense_votes, matrix_votes

__all__ = [
    "conv_general_dilated",
    "dense_votes",
    "exponential_squash",
    "length",
    "margin_loss",
    "matrix_votes",
    "reconstruction_loss",
    "spread_loss",
    "squash",
]
