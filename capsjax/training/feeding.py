"""Feeds images to the devices: a whole set that stays there, or a stream of chunks."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from capsjax.data import Batch, Split, epoch_order
from capsjax.data.dataset import AnySplit
from capsjax.data.stream import EpochOrder, InOrder, Order, open_stream
from capsjax.training.drivers import Driver
from capsjax.training.programs import Evaluate, EvaluationSums, RunSteps, StepSums, as_batch, stack
from capsjax.training.step import TrainState, Variables

# Bytes of a chunk on one device. Up to three are there at a time: the current one, the next, and
# the one after it in transfer.
_CHUNK = 2**24
CHUNKS = 3


class Feed(Protocol):
    """Runs the programs of a training run on its images."""

    def run_steps(
        self, state: TrainState, step: int, num_steps: int
    ) -> tuple[TrainState, StepSums]:
        """Dispatches steps, at most up to :meth:`call_end`; the state is donated."""

    def call_end(self, step: int) -> int:
        """Returns the last step that one dispatch can reach from a step."""

    def place(self, split: AnySplit) -> Batch | AnySplit:
        """Converts a split to the examples that :meth:`evaluate` takes."""

    def evaluate(
        self, variables: Variables, examples: Any, first: int, num_batches: int, number: int
    ) -> EvaluationSums:
        """Evaluates batches; see :func:`make_evaluate`."""

    def close(self) -> None:
        """Ends reading ahead."""


@dataclasses.dataclass(eq=False)
class Resident:
    """All images are on every device.

    Attributes:
      driver: where the programs run.
      examples: the training images, on the devices.
      order_keys: keys of the orders, one for each seed.
      step_key: the key of the steps, on the devices.
      steps_per_epoch: number of whole batches in an epoch.
      steps: from :func:`make_run_steps`.
      evaluate: from :func:`make_evaluate`.
    """

    driver: Driver
    examples: Batch
    order_keys: Sequence[jax.Array]
    step_key: jax.Array
    steps_per_epoch: int
    steps: RunSteps
    evaluate: Evaluate

    def __post_init__(self) -> None:
        # Keeps the order of the latest epoch.
        self._order = functools.lru_cache(maxsize=1)(self._make_order)

    def _make_order(self, epoch: int) -> jax.Array:
        count = len(self.examples.labels)
        orders = [epoch_order(jax.random.fold_in(key, epoch), count) for key in self.order_keys]
        return self.driver.replicate(stack(orders))

    def run_steps(
        self, state: TrainState, step: int, num_steps: int
    ) -> tuple[TrainState, StepSums]:
        """See :class:`Feed`."""
        order = self._order(step // self.steps_per_epoch)
        return self.steps(state, self.examples, order, self.step_key, np.int32(num_steps))

    def call_end(self, step: int) -> int:
        """The end of the epoch."""
        return (step // self.steps_per_epoch + 1) * self.steps_per_epoch

    def place(self, split: AnySplit) -> Batch:
        """Copies the images to each device."""
        return self.driver.replicate(as_batch(split.read()))

    def close(self) -> None:
        """Does nothing."""


def image_bytes(split: AnySplit) -> int:
    """Returns the size of an image in bytes."""
    return split.images.nbytes // len(split.labels)


def steps_per_chunk(split: AnySplit, driver: Driver, batch_size: int, most: int) -> int:
    """Returns the number of batches in a chunk, at most `most`."""
    on_one_device = image_bytes(split) * batch_size // len(driver.devices)
    return max(1, min(most, _CHUNK // on_one_device))


@dataclasses.dataclass(eq=False)
class Streamed:
    """Chunks of batches are sent to the devices one after another.

    Attributes:
      driver: where the programs run.
      train: the training images.
      order_key: the key of the order.
      step_key: the key of the steps, on the devices.
      batch_size: examples in the whole batch.
      total_steps: step at which the run ends.
      size: number of batches in a chunk.
      workers: number of worker processes that read training images; see :func:`open_stream`.
      steps: from :func:`make_run_steps`.
      evaluate_chunk: from :func:`make_evaluate`.
    """

    driver: Driver
    train: AnySplit
    order_key: jax.Array
    step_key: jax.Array
    batch_size: int
    total_steps: int
    size: int
    workers: int
    steps: RunSteps
    evaluate_chunk: Evaluate

    def __post_init__(self) -> None:
        self.evaluate = StreamedEvaluate(self.driver, self.batch_size, self.evaluate_chunk)
        self._chunks: _Chunks | None = None

    def run_steps(
        self, state: TrainState, step: int, num_steps: int
    ) -> tuple[TrainState, StepSums]:
        """See :class:`Feed`."""
        if self._chunks is None or not self._chunks.reaches(step):
            self._open(step)
        assert self._chunks is not None
        chunk = self._chunks.take(step)
        first, number = np.int32(chunk.batches.start), np.int32(num_steps)
        return self.steps(state, chunk.examples, first, self.step_key, number)

    def _open(self, step: int) -> None:
        """Starts reading at a step."""
        self.close()
        order = EpochOrder(
            np.asarray(jax.random.key_data(self.order_key)),
            str(jax.random.key_impl(self.order_key)),
            bool(jax.config.jax_threefry_partitionable),  # type: ignore[attr-defined]
            len(self.train.labels),
            self.batch_size,
            self.driver.local_positions(self.batch_size),
        )
        batches = range(step, self.total_steps)
        self._chunks = _Chunks(self.driver, self.train, order, batches, self.size, self.workers)

    def call_end(self, step: int) -> int:
        """The end of the chunk."""
        if self._chunks is None or not self._chunks.reaches(step):
            return step + 1  # the first one
        return self._chunks.end(step)

    def place(self, split: AnySplit) -> AnySplit:
        """Leaves the images where they are."""
        return split

    def close(self) -> None:
        """Ends the workers."""
        self.evaluate.close()
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None


@dataclasses.dataclass(eq=False)
class StreamedEvaluate:
    """Evaluates images while threads read them.

    Attributes:
      driver: where the program runs.
      batch_size: examples in the whole batch.
      program: from :func:`make_evaluate`, for chunks.
    """

    driver: Driver
    batch_size: int
    program: Evaluate

    def __post_init__(self) -> None:
        self._chunks: _Chunks | None = None
        self._read: object = None

    def __call__(
        self,
        variables: Variables,
        examples: AnySplit,
        first: int,
        num_batches: int,
        number: int,
    ) -> EvaluationSums:
        """Returns the sums over batches, as the program of :func:`make_evaluate` does."""
        first, end, last = int(first), int(first + num_batches), -(-int(number) // self.batch_size)
        if self._chunks is None or self._read is not examples or not self._chunks.reaches(first):
            self.close()
            positions = self.driver.local_positions(self.batch_size)
            order = InOrder(int(number), self.batch_size, positions)
            size = steps_per_chunk(examples, self.driver, self.batch_size, last - first)
            batches = range(first, last)
            self._chunks = _Chunks(self.driver, examples, order, batches, size, 0)
            self._read = examples
        total: EvaluationSums | None = None
        while first < end:
            chunk = self._chunks.take(first)
            amount = min(end, chunk.batches.stop) - first
            numbers = (first, amount, number, chunk.batches.start)
            sums = jax.device_get(self.program(variables, chunk.examples, *map(np.int32, numbers)))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            first += amount
        if end >= last:
            self.close()
        assert total is not None  # there is at least one batch
        return total

    def close(self) -> None:
        """Ends the threads."""
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = self._read = None


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Batches on the devices, with their numbers."""

    batches: range
    examples: Batch


class _Chunks:
    """Chunks in order; the next is read and placed while the current one is used.

    The first chunks hold fewer batches, so that the devices start soon.
    """

    def __init__(
        self,
        driver: Driver,
        split: AnySplit,
        order: Order,
        batches: range,
        size: int,
        workers: int,
    ):
        self._driver, self._batches, self._size = driver, batches, size
        self._closing, self._coming = False, batches[:1]
        with contextlib.ExitStack() as opened:
            self._read = opened.enter_context(open_stream(split, order, batches, workers=workers))
            # The only thread that reads.
            self._thread = opened.enter_context(concurrent.futures.ThreadPoolExecutor(1))
            self._opened = opened.pop_all()
        self._chunk: _Chunk | None = None
        self._next = self._thread.submit(self._load, self._coming)

    def reaches(self, number: int) -> bool:
        """Whether the batch with this number is in the current chunk or a later one."""
        first = self._batches.start if self._chunk is None else self._chunk.batches.start
        return first <= number < self._batches.stop

    def end(self, number: int) -> int:
        """Returns the end of the chunk, the current or the next, that holds this batch."""
        present = self._chunk is not None and number in self._chunk.batches
        return self._chunk.batches.stop if self._chunk and present else self._coming.stop

    def take(self, number: int) -> _Chunk:
        """Returns the chunk that holds the batch with this number; see :meth:`reaches`."""
        while self._chunk is None or number not in self._chunk.batches:
            self._chunk = self._next.result()
            size = min(self._size, 4 * len(self._coming))
            self._coming = range(self._coming.stop, self._batches.stop)[:size]
            if self._coming:
                self._next = self._thread.submit(self._load, self._coming)
        return self._chunk

    def _load(self, batches: range) -> _Chunk:
        read: Iterator[Split] = itertools.islice(self._read, len(batches))
        images: list[Any] = []
        labels: list[Any] = []
        for batch in read:
            if self._closing:
                break
            images.append(np.array(batch.images))
            labels.append(np.array(batch.labels))
        # The first and the last chunks are padded, because the program's shapes are fixed.
        images += images[-1:] * (self._size - len(images))
        labels += labels[-1:] * (self._size - len(labels))
        stacked: Any = (np.stack(images), np.stack(labels))
        chunk = Batch(*stacked)
        return _Chunk(batches, self._driver.place_chunk(chunk))

    def close(self) -> None:
        """Waits for the batch that is being read, and stops reading."""
        self._closing = True
        self._next.cancel()
        self._opened.close()
