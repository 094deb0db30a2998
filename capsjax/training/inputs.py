"""Chooses whether images stay on the devices or are streamed, by size or by option."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from capsjax.data import Dataset, Sampler, StoredSplit, load
from capsjax.data.dataset import AnySplit
from capsjax.data.stream import check_installed, default_workers, is_installed
from capsjax.errors import ConfigError
from capsjax.machine import machine_memory
from capsjax.training import processes
from capsjax.training.memory import device_memory

InputName = Literal["resident", "stream"]


def load_dataset(
    name: str,
    asked: InputName | None,
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> Dataset:
    """Loads a data set by name; if it is to be streamed, its images stay on disk if possible.

    Raises:
      capsjax.data.DataError: as :func:`capsjax.data.load`.
    """
    in_memory: bool | Callable[[int], bool] = fits if asked is None else asked == "resident"
    return load(
        name, data_dir=data_dir, image_size=image_size, channels=channels, in_memory=in_memory
    )


def fits(size: int) -> bool:
    """Whether this many bytes of decoded images stay on the devices by default."""
    limit = _limit()
    return processes.decide(limit is None or size <= limit)


def _limit() -> int | None:
    """Half of a device's memory or a quarter of the machine's, which holds copies."""
    device, machine = device_memory(jax.devices()[0]), machine_memory()
    limits = ([] if device is None else [device // 2]) + ([] if machine is None else [machine // 4])
    return min(limits, default=None)


def choose_stream(
    asked: InputName | None, dataset: Dataset, sampler: Sampler, *, several_seeds: bool
) -> str | None:
    """Returns why images are streamed, or None if they stay on the devices.

    Raises:
      ConfigError: they must be streamed but cannot be.
    """
    size = dataset.train.images.nbytes + dataset.test.images.nbytes
    is_stored = isinstance(dataset.train, StoredSplit)
    can = sampler.takes_batches and not several_seeds and is_installed()
    if asked == "resident" or (asked is None and (fits(size) or not (can or is_stored))):
        return None
    if not sampler.takes_batches:
        raise ConfigError(
            f"--input stream is not for data set {dataset.name}, whose samples need all images at"
            " once"
        )
    if several_seeds:
        raise ConfigError(
            "--input stream is for one run: several seeds need --input resident, since each has its"
            " own order"
        )
    check_installed()
    if asked == "stream":
        return "as requested"
    limit = _limit()
    assert limit is not None  # without a limit, everything fits
    return (
        f"as all decoded images take {size / 1e9:,.2f} GB, more than {limit / 1e9:,.2f} GB, half of"
        " a device's memory or a quarter of the machine's"
    )


def choose_workers(workers: int | None, split: AnySplit) -> int:
    """Returns the number of worker processes to read a split with; 0 for images in memory."""
    if not isinstance(split, StoredSplit):
        return 0
    return default_workers() if workers is None else workers
