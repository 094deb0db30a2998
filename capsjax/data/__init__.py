"""Data sets by name on the host, and transformations of images on the device."""

from capsjax.data.affine import AffineRanges, random_affine
from capsjax.data.dataset import Dataset, Split, StoredSplit
from capsjax.data.npz import save_npz
from capsjax.data.sampling import Sampler, is_right
from capsjax.data.sources import is_name, load, names, source_of
from capsjax.data.stored import StoredImages
from capsjax.data.tasks import (
    Batch,
    Cropped,
    Distorted,
    Pairs,
    Placed,
    Sample,
    Shifted,
    Task,
)
from capsjax.data.transforms import (
    crop_images,
    epoch_order,
    random_flip,
    random_placement,
    random_shift,
    scale_pixels,
    white_of,
)
from capsjax.errors import DataError

__all__ = [
    "AffineRanges",
    "Batch",
    "Cropped",
    "DataError",
    "Dataset",
    "Distorted",
    "Pairs",
    "Placed",
    "Sample",
    "Sampler",
    "Shifted",
    "Split",
    "StoredImages",
    "StoredSplit",
    "Task",
    "crop_images",
    "epoch_order",
    "is_name",
    "is_right",
    "load",
    "names",
    "random_affine",
    "random_flip",
    "random_placement",
    "random_shift",
    "save_npz",
    "scale_pixels",
    "source_of",
    "white_of",
]
