"""Flax NNX layers."""

from capsjax.nn.conv import ConvCapsules
from capsjax.nn.decoder import Decoder
from capsjax.nn.dense import DenseCapsules
from capsjax.nn.primary import MatrixPrimaryCapsules, PrimaryCapsules
from capsjax.nn.router import Router

__all__ = [
    "ConvCapsules",
    "Decoder",
    "DenseCapsules",
    "MatrixPrimaryCapsules",
    "PrimaryCapsules",
    "Router",
]
