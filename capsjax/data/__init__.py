"""Data (floor 4): sets by name on the host, and what happens to images on the device."""

from capsjax.data.dataset import DataError, Dataset, Split
from capsjax.data.sources import load, names
from capsjax.data.transforms import epoch_order, random_shift, scale_pixels

__all__ = [
    "DataError",
    "Dataset",
    "Split",
    "epoch_order",
    "load",
    "names",
    "random_shift",
    "scale_pixels",
]
