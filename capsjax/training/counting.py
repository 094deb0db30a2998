"""Counts errors: the result of an evaluation, and the loop that computes it."""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import numpy as np

from capsjax.data import Batch
from capsjax.data.dataset import AnySplit
from capsjax.training import processes
from capsjax.training.programs import Evaluate, EvaluationSums, Pace, unstack
from capsjax.training.step import Variables


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
      loss: mean loss; the decoder receives the true classes.
      wrong: number of wrong predictions; None where the labels are numbers to predict.
      count: number of examples; each is counted once.
      class_wrong: number of wrong predictions for examples of each class.
      class_count: number of examples of each class; an example with several classes counts for each
        of them.
      metrics: mean of each metric, by name.
    """

    loss: float
    wrong: int | None
    count: int
    class_wrong: tuple[int, ...] = ()
    class_count: tuple[int, ...] = ()
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def error(self) -> float:
        """Error rate; NaN where the labels are numbers to predict."""
        return math.nan if self.wrong is None else self.wrong / self.count

    @property
    def class_errors(self) -> tuple[float, ...]:
        """Error rate for the examples of each class; NaN for classes without examples."""
        pairs = zip(self.class_wrong, self.class_count, strict=True)
        return tuple(wrong / count if count else math.nan for wrong, count in pairs)

    @property
    def balanced_error(self) -> float:
        """Mean error rate over the classes that have examples; NaN if there are none."""
        errors = [error for error in self.class_errors if not math.isnan(error)]
        return sum(errors) / len(errors) if errors else math.nan


def count_errors(
    evaluate: Evaluate,
    variables: Variables,
    examples: Batch | AnySplit,
    number: int,
    *,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Evaluation] | None:
    """Evaluates the first test samples.

    Args:
      evaluate: from :func:`make_evaluate`, or that of a feed.
      variables: the arrays of the network; stacked over seeds if there are several.
      examples: what the samples are made from, as `evaluate` takes it.
      number: number of samples.
      batch_size: batch size of the program.
      should_stop: called between dispatches; True stops the evaluation.

    Returns:
      An evaluation for each seed, or None if it was stopped.
    """
    batches = -(-number // batch_size)
    pace, first, total = Pace(batches), 0, None
    classifies = not np.issubdtype(examples.labels.dtype, np.floating)
    while first < batches:
        if should_stop():
            return None
        amount = processes.decide(pace.amount(batches - first))
        start = time.monotonic()
        sums: EvaluationSums = jax.device_get(
            evaluate(variables, examples, np.int32(first), np.int32(amount), np.int32(number))
        )
        pace.observe(amount, time.monotonic() - start)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        first += amount
    assert total is not None  # there is at least one batch
    return [
        Evaluation(
            float(sums.loss) / int(sums.examples),
            int(sums.wrong) if classifies else None,
            int(sums.examples),
            tuple(sums.class_wrong.tolist()),
            tuple(sums.class_examples.tolist()),
            {name: float(value) / int(sums.examples) for name, value in sums.metrics.items()},
        )
        for sums in unstack(total, np.size(total.loss))
    ]
