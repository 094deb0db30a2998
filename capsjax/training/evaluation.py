"""Evaluating a network on a whole test set; a run's from its directory."""

import csv
import dataclasses
import io
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from capsjax.data import Batch, Dataset, Sampler, Split, is_right
from capsjax.files import write_text
from capsjax.training import choices
from capsjax.training.config import EvaluateConfig
from capsjax.training.loading import load_images, read_run, restore
from capsjax.training.objectives import Objective
from capsjax.training.programs import Driver, Evaluate, Pace, as_batch, make_evaluate
from capsjax.training.step import Apply, Variables, split_abstract


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
      loss: mean of the objective, with the true classes as the decoder's target.
      wrong: number of wrong predictions.
      count: number of examples, every one counted once.
      class_wrong: number of wrong predictions for examples of each class.
      class_count: number of examples of each class; one of several classes counts for each.
    """

    loss: float
    wrong: int
    count: int
    class_wrong: tuple[int, ...] = ()
    class_count: tuple[int, ...] = ()

    @property
    def error(self) -> float:
        """Share of wrong predictions."""
        return self.wrong / self.count

    @property
    def class_errors(self) -> tuple[float, ...]:
        """Share of wrong predictions for examples of each class; NaN where there are none."""
        pairs = zip(self.class_wrong, self.class_count, strict=True)
        return tuple(wrong / count if count else math.nan for wrong, count in pairs)

    @property
    def balanced_error(self) -> float:
        """Mean of the classes' errors, over the classes that have examples."""
        return float(np.nanmean(self.class_errors))


@dataclasses.dataclass(frozen=True)
class CheckpointEvaluation:
    """An evaluation and its subject.

    Attributes:
      run_dir: the run's directory, or the name of a network that comes with the package.
      step: of the checkpoint; None for a network that comes with the package.
      dataset: name of the data set whose test images were used.
      test: the evaluation.
      class_names: names of the network's classes.
    """

    run_dir: Path
    step: int | None
    dataset: str
    test: Evaluation
    class_names: tuple[str, ...]


def evaluate(config: EvaluateConfig, *, dataset: Dataset | None = None) -> CheckpointEvaluation:
    """Evaluates a run's checkpoint on a whole test set.

    The classes of other data than the run's are those of the same names.

    Args:
      config: the options.
      dataset: the images; loaded by the options when None.

    Returns:
      The evaluation; every test image is counted once.

    Raises:
      ConfigError: an option is invalid, the network does not take these images, they have other
        classes, or the run's own data set has changed.
      capsjax.data.DataError: the data set is missing or damaged.
      CheckpointError: the checkpoint cannot be read.
    """
    opened = _open(config, dataset)
    if config.predictions is None:
        test = _count(opened)
    else:
        scores, labels, losses = _predict(opened)
        test = _summarise(scores, labels, losses)
        _write_predictions(config.predictions, opened, scores, labels)
    return CheckpointEvaluation(config.run_dir, opened.step, opened.name, test, opened.class_names)


def predict_test(
    config: EvaluateConfig, *, dataset: Dataset | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Predicts a whole test set with a run's checkpoint, one batch after the other.

    Args:
      config: the options.
      dataset: the images; loaded by the options when None.

    Returns:
      The scores, float32 ``[N, J]``, and the labels, int32 ``[N]``; ``[N, 2]`` for pairs;
      bool ``[N, J]`` for any number of classes.

    Raises:
      ConfigError: as in :func:`evaluate`; so are the other errors.
    """
    opened = _open(config, dataset)
    scores, labels, _ = _predict(opened)
    if config.predictions is not None:
        _write_predictions(config.predictions, opened, scores, labels)
    return scores, labels


def _count(opened: "_Opened") -> Evaluation:
    """Evaluates on the devices, which return nothing but sums."""
    program = make_evaluate(
        opened.apply, opened.objective, opened.sampler, opened.driver, batch_size=opened.batch_size
    )
    found = count_errors(
        program,
        opened.variables,
        opened.driver.replicate(as_batch(opened.test)),
        opened.number,
        batch_size=opened.batch_size,
    )
    assert found is not None  # only a request to stop ends it early, and there is none
    return found[0]


def _predict(opened: "_Opened") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scores, the labels and the losses of the test images."""
    examples = opened.driver.replicate(as_batch(opened.test))

    @jax.jit
    def predict(
        variables: Variables, examples: Batch, numbers: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        sample = opened.sampler.test(examples, numbers)
        prediction, _ = opened.apply(variables, sample.images, target=sample.masks)
        losses = opened.objective(prediction, sample.target, sample.drawings)
        return prediction.scores, sample.labels, losses

    size, last = opened.batch_size, opened.number - 1
    batches = [
        jax.device_get(
            predict(opened.variables, examples, np.minimum(first + np.arange(size), last))
        )
        for first in range(0, opened.number, size)
    ]
    scores, labels, losses = map(np.concatenate, zip(*batches, strict=True))
    return scores[: opened.number], labels[: opened.number], losses[: opened.number]


def _summarise(scores: np.ndarray, labels: np.ndarray, losses: np.ndarray) -> Evaluation:
    """The evaluation that the predictions of all test images make."""
    wrong = ~np.asarray(is_right(scores, labels))
    shown = labels
    if labels.dtype != bool:
        classes = np.arange(scores.shape[1])
        shown = (labels.reshape(len(labels), -1, 1) == classes).any(axis=1)
    return Evaluation(
        float(losses.mean(dtype=np.float64)),
        int(wrong.sum()),
        len(wrong),
        tuple(shown[wrong].sum(axis=0).tolist()),
        tuple(shown.sum(axis=0).tolist()),
    )


def _write_predictions(
    path: Path, opened: "_Opened", scores: np.ndarray, labels: np.ndarray
) -> None:
    """Writes a line of CSV for each test image; several classes in an image are joined by +."""
    names, order = opened.class_names, np.argsort(-scores, axis=1, kind="stable")
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["image", "label", "prediction", *(f"score of {name}" for name in names)])
    for n, label in enumerate(labels):
        true = np.flatnonzero(label) if labels.dtype == bool else np.atleast_1d(label)
        predicted = order[n, : len(true)]
        classes = ("+".join(names[c] for c in sorted(some)) for some in (true, predicted))
        lines.writerow([n, *classes, *scores[n].tolist()])
    write_text(path, text.getvalue())


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A run's network and the test images to try it on."""

    apply: Apply
    variables: Variables
    objective: Objective
    sampler: Sampler
    driver: Driver
    batch_size: int
    name: str
    class_names: tuple[str, ...]
    test: Split
    number: int
    step: int | None


def _open(config: EvaluateConfig, dataset: Dataset | None) -> _Opened:
    run = read_run(config.run_dir)
    started, model = run.train, run.model
    driver = choices.choose_driver(config.driver, config.devices)
    share = len(driver.devices)
    dataset = load_images(
        run,
        dataset,
        name=config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        channels=config.channels,
    )
    choices.check_test_size(dataset, config.test_size)
    own = dataset.name == run.data.name
    # Pairs are shifted in test too, by as much as the run's.
    task = choices.choose_task(dataset, started.max_shift if own else None)
    apply, _ = split_abstract(model)
    step, variables = restore(config.run_dir, config.checkpoint, run, driver)
    number = len(dataset.test.labels) if config.test_size is None else config.test_size
    return _Opened(
        apply=apply,
        variables=variables,
        objective=choices.choose_objective(
            started.loss if own else None,
            started.preset,
            model,
            several_classes=dataset.has_several_classes,
        ),
        sampler=Sampler(task, model.num_classes),
        driver=driver,
        batch_size=-(-min(config.batch_size, number) // share) * share,
        name=dataset.name,
        class_names=dataset.class_names,
        test=dataset.test,
        number=number,
        step=step,
    )


def count_errors(
    evaluate: Evaluate,
    variables: Variables,
    examples: Batch,
    number: int,
    *,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Evaluation] | None:
    """Evaluates the first test samples; None if asked to stop on the way.

    Args:
      evaluate: from :func:`make_evaluate`.
      variables: the arrays of the network, or of one for each seed.
      examples: what the samples are made of, on the devices.
      number: of samples.
      batch_size: that of the program.
      should_stop: asked between calls of the devices.

    Returns:
      An evaluation for each seed.
    """
    batches = -(-number // batch_size)
    pace, first, total = Pace(batches), 0, (0.0, 0, 0, 0, 0)
    while first < batches:
        if should_stop():
            return None
        amount, start = pace.amount(batches - first), time.monotonic()
        sums = jax.device_get(
            evaluate(variables, examples, np.int32(first), np.int32(amount), np.int32(number))
        )
        pace.observe(amount, time.monotonic() - start)
        total = tuple(a + b for a, b in zip(total, sums, strict=True))
        first += amount
    seeds = total if np.ndim(total[0]) else [np.asarray(x)[None] for x in total]
    return [
        Evaluation(
            float(loss) / int(examples),
            int(wrong),
            int(examples),
            tuple(class_wrong.tolist()),
            tuple(class_examples.tolist()),
        )
        for loss, wrong, examples, class_wrong, class_examples in zip(*seeds, strict=True)
    ]
