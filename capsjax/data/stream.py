"""Streams batches, which grain reads, decodes and scales ahead of time in worker processes.

The number of a batch is its position in the stream, so that a stream can start anywhere and nothing
else has to be saved.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from capsjax.data.dataset import AnySplit, Split
from capsjax.data.transforms import epoch_order
from capsjax.errors import ConfigError, DataError, how_to_install
from capsjax.machine import processors

_PIECE = 2**23  # bytes per read
_AHEAD = 2  # pieces that each worker keeps ready
_MOST = 32  # workers or threads, unless a number is given


class Order(Protocol):
    """Maps batches to images; must be picklable, to be sent to the worker processes."""

    def __call__(self, batch: int) -> npt.NDArray[Any]:
        """Returns the indices of the images in the batch with this number."""


@dataclasses.dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of training: that of :func:`epoch_order` in each epoch.

    Attributes:
      key: key of the order, as from :func:`jax.random.key_data`.
      impl: name of the key's implementation.
      partitionable: the value of ``jax_threefry_partitionable``, on which the order depends.
      count: number of images.
      batch_size: size of whole batches.
      positions: positions in the whole batch to read, int ``[B]``.
    """

    key: npt.NDArray[Any]
    impl: str
    partitionable: bool
    count: int
    batch_size: int
    positions: npt.NDArray[Any]

    def __call__(self, batch: int) -> npt.NDArray[Any]:
        """Returns the indices for the step with this number."""
        epoch, number = divmod(batch, self.count // self.batch_size)
        about = (self.key.tobytes(), self.key.dtype.str, self.impl, self.partitionable, self.count)
        return _order(*about, epoch)[number * self.batch_size + self.positions]


@functools.lru_cache(maxsize=2)
def _order(
    key: bytes, dtype: str, impl: str, partitionable: bool, count: int, epoch: int
) -> npt.NDArray[Any]:
    with contextlib.ExitStack() as where, jax.threefry_partitionable(partitionable):
        with contextlib.suppress(RuntimeError):  # JAX may have no CPU backend
            where.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        typed = jax.random.wrap_key_data(jnp.asarray(np.frombuffer(key, dtype)), impl=impl)
        return np.asarray(epoch_order(jax.random.fold_in(typed, epoch), count))


@dataclasses.dataclass(frozen=True, eq=False)
class InOrder:
    """The images in their order; the last one is repeated to fill the last batch.

    Attributes:
      count: number of images.
      batch_size: size of whole batches.
      positions: positions in the whole batch to read, int ``[B]``.
    """

    count: int
    batch_size: int
    positions: npt.NDArray[Any]

    def __call__(self, batch: int) -> npt.NDArray[Any]:
        """Returns the indices for the batch with this number."""
        return np.minimum(batch * self.batch_size + self.positions, self.count - 1)


def default_workers() -> int:
    """Default number of worker processes, which leaves one processor free."""
    return max(1, min(_MOST, processors() - 1))


def is_installed() -> bool:
    """Whether grain is installed."""
    return importlib.util.find_spec("grain") is not None


def check_installed() -> None:
    """Raises a ConfigError if grain is not installed."""
    if not is_installed():
        raise ConfigError(
            f"a stream of images needs grain, which is not installed: {how_to_install('data')}"
        )


@contextlib.contextmanager
def open_stream(
    split: AnySplit, order: Order, batches: range, *, workers: int
) -> Iterator[Iterator[Split]]:
    """Reads batches in order within a ``with`` statement, whose end stops the workers.

    Args:
      split: the images. Threads of this process read those in memory.
      order: which images are in each batch.
      batches: numbers of the batches.
      workers: number of worker processes; if 0, threads of this process read.

    Returns:
      An iterator over the batches. Their arrays may be in memory shared with a worker: copy them
      and drop the references.

    Raises:
      ConfigError: grain is not installed.
      DataError: raised by the iterator if an image cannot be read, or a worker has ended.
    """
    check_installed()
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which capsjax does not parse
    pieces = _Pieces.of(split, order, batches)
    if isinstance(split, Split):
        workers = 0  # sending images to other processes would cost more than reading them
    threads = 0 if workers else min(_MOST, processors())
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    data = grain.MapDataset.source(pieces).to_iter_dataset(read)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        data = data.mp_prefetch(options, worker_init_fn=_begin_worker)
    iterator = iter(data)
    try:
        yield _joined(iterator, pieces.per_batch)
    finally:
        iterator.close()


def _joined(iterator: Iterator[Any], per_batch: int) -> Iterator[Split]:
    """Joins pieces to batches."""
    while True:
        try:
            taken = [next(iterator) for _ in range(per_batch)]
        except StopIteration:
            return
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise DataError(
                "a worker process that reads images has ended: it ran out of memory (fewer"
                " --workers need less), was killed, or was started by a script that trains without"
                ' `if __name__ == "__main__":`; --workers 0 reads in this process'
            ) from None
        yield (
            Split(*taken[0])
            if per_batch == 1
            else Split(*map(np.concatenate, zip(*taken, strict=True)))
        )
        del taken


@dataclasses.dataclass(frozen=True, eq=False)
class _Pieces:
    """The pieces of batches, as a sequence for grain."""

    split: AnySplit
    order: Order
    batches: range
    per_batch: int

    @classmethod
    def of(cls, split: AnySplit, order: Order, batches: range) -> "_Pieces":
        """Divides batches into pieces of a few megabytes."""
        number = len(order(batches[0]))
        size = number * split.images.nbytes // max(1, len(split.labels))
        return cls(split, order, batches, max(1, min(number, -(-size // _PIECE))))

    def __len__(self) -> int:
        return len(self.batches) * self.per_batch

    def __getitem__(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        batch, piece = divmod(int(index), self.per_batch)
        indices = self.order(self.batches[batch])
        taken = self.split.take(np.array_split(indices, self.per_batch)[piece])
        if isinstance(taken, Split):
            return taken.images, taken.labels
        return taken.images.read(threads=1), taken.labels


def _begin_worker(number: int, count: int) -> None:
    """Prepares a worker process: it ends only with its parent, and does not use the devices."""
    del number, count
    for each in (signal.SIGINT, signal.SIGTERM):  # a terminal sends these to all processes
        signal.signal(each, signal.SIG_IGN)
    jax.config.update("jax_platforms", "cpu")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        # By then the queue is full and no shared memory is being created, which would leak.
        time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
