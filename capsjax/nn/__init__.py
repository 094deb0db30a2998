"""Flax NNX layers (floor 3)."""

from capsjax.nn.decoder import Decoder
from capsjax.nn.dense import DenseCapsules
from capsjax.nn.primary import PrimaryCapsules

__all__ = ["Decoder", "DenseCapsules", "PrimaryCapsules"]
