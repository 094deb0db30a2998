"""Flax NNX layers."""

from capsjax.nn.conv import ConvCapsules
from capsjax.nn.decoder import Decoder
from capsjax.nn.dense import DenseCapsules
from capsjax.nn.grid import GridCapsules
from capsjax.nn.matrix import MatrixConvCapsules, MatrixGridCapsules, MatrixPrimaryCapsules
from capsjax.nn.primary import PrimaryCapsules
from capsjax.nn.router import Router

__all__ = [
    "ConvCapsules",
    "Decoder",
    "DenseCapsules",
    "GridCapsules",
    "MatrixConvCapsules",
    "MatrixGridCapsules",
    "MatrixPrimaryCapsules",
    "PrimaryCapsules",
    "Router",
]
