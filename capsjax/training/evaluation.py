"""Evaluates a run's network on a whole test set."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from capsjax.data import Batch, Dataset, Sampler, is_right
from capsjax.data.dataset import AnySplit
from capsjax.data.stream import InOrder, open_stream
from capsjax.files import write_csv
from capsjax.models import Prediction
from capsjax.ops._checks import check_callable
from capsjax.options import check_types, expand_paths, require_at_least, require_folder
from capsjax.training import choices, processes
from capsjax.training.config import ChannelsNumber, check_dataset_name
from capsjax.training.counting import Evaluation, count_errors
from capsjax.training.data_description import DataDescription
from capsjax.training.drivers import Driver, DriverName, local
from capsjax.training.feeding import StreamedEvaluate
from capsjax.training.inputs import InputName, choose_stream
from capsjax.training.loading import load_images, read_run, restore
from capsjax.training.objectives import Metric, Objective
from capsjax.training.programs import (
    as_batch,
    make_evaluate,
    measure,
)
from capsjax.training.step import Apply, Variables, split_abstract


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a run's checkpoint on the whole test set."""

    run_dir: Path
    """Run directory, or mnist_small for the network in the package."""

    checkpoint: str = "last"
    """Checkpoint: last, best (lowest validation error), or a step."""

    dataset: str | None = None
    """Evaluate on the test images of this data set. By default, that of the run."""

    data_dir: Path | None = None
    """Directory of prepared data sets or of images, or an .npz file. By default, that of the
    run."""

    image_size: int | None = None
    """Rows and columns of the images of image_folder and tfds:. By default, those of the run."""

    channels: ChannelsNumber | None = None
    """Channels of the images of image_folder and tfds:. By default, those of the run."""

    test_size: int | None = None
    """Number of test images to generate for multi_mnist, expanded_mnist and affine_mnist. By
    default, as many as the data set has."""

    batch_size: int = 100
    """Examples per batch, over all devices together; rounded up to a multiple of their number."""

    driver: DriverName = "pmap"
    """How the evaluation runs: pmap, shard, or jit (one device)."""

    devices: int | None = None
    """Use only this many devices, the first ones. By default, all, or one for jit."""

    input: InputName | None = None
    """Where the test images are: resident (all on every device) or stream. By default, chosen by
    size; see `capsjax train --help`."""

    predictions: Path | None = None
    """CSV file to write, with the classes, the prediction and the scores of each test image."""

    def __post_init__(self) -> None:
        """Checks the options that can be checked without data and devices."""
        check_types(self)
        expand_paths(self, "data_dir", "predictions", remote=("run_dir",))
        check_dataset_name(self.dataset)
        require_at_least(self, 1, "batch_size", "devices", "test_size", "image_size")
        require_folder(self, "predictions")


@dataclasses.dataclass(frozen=True)
class CheckpointEvaluation:
    """An evaluation, and what was evaluated.

    Attributes:
      run_dir: the run's directory, or the name of a network in the package.
      step: step of the checkpoint; None for a network in the package.
      dataset: name of the data set whose test images were used.
      test: the evaluation.
      class_names: names of the network's classes.
    """

    run_dir: Path
    step: int | None
    dataset: str
    test: Evaluation
    class_names: tuple[str, ...]


def evaluate(
    config: EvaluateConfig,
    *,
    dataset: Dataset | None = None,
    objective: Objective | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> CheckpointEvaluation:
    """Evaluates a run's checkpoint on a whole test set.

    Classes of another data set are matched with the run's by name.

    Args:
      config: the options.
      dataset: the images; loaded as the options say when None.
      objective: loss per example; the run's when None. The loss is NaN if the run was trained with
        an objective given in Python, and none is given here.
      metrics: other values per example, ``(prediction, target) -> [B]``, by name.

    Returns:
      The evaluation, which counts every test image once.

    Raises:
      ConfigError: an option is invalid, the network does not take these images, their classes are
        not the run's, or the run's data set has changed.
      capsjax.data.DataError: the data set is missing or damaged.
      CheckpointError: the checkpoint cannot be read.
    """
    if objective is not None:
        check_callable(objective=objective)
    with processes.together():
        opened = _open(config, dataset, objective, metrics)
        if config.predictions is None:
            test = _count(opened)
        else:
            scores, labels, losses, values = _predict(opened)
            test = _summarise(scores, labels, losses, values)
            _write_predictions(config.predictions, opened, scores, labels)
    return CheckpointEvaluation(config.run_dir, opened.step, opened.name, test, opened.class_names)


def predict_test(
    config: EvaluateConfig, *, dataset: Dataset | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Predicts a whole test set with a run's checkpoint, batch by batch.

    Args:
      config: the options.
      dataset: the images; loaded by the options when None.

    Returns:
      The scores, float32 ``[N, J]``, and the labels, int32 ``[N]``; ``[N, 2]`` for pairs;
      bool ``[N, J]`` for any number of classes; float32 ``[N, J]`` for numbers to predict.

    Raises:
      ConfigError: as in :func:`evaluate`, which lists the other errors too.
    """
    with processes.together():
        opened = _open(config, dataset)
        scores, labels, _, _ = _predict(opened)
        if config.predictions is not None:
            _write_predictions(config.predictions, opened, scores, labels)
    return scores, labels


def _count(opened: "_Opened") -> Evaluation:
    """Evaluates on the devices, which return only sums."""
    program = make_evaluate(
        opened.apply,
        opened.objective,
        opened.sampler,
        opened.driver,
        batch_size=opened.batch_size,
        metrics=opened.metrics,
        streamed=opened.streamed,
    )
    with contextlib.ExitStack() as stack:
        examples: Batch | AnySplit = opened.test
        if opened.streamed:
            program = StreamedEvaluate(opened.driver, opened.batch_size, program)
            stack.callback(program.close)
        else:
            examples = opened.driver.replicate(as_batch(opened.test.read()))
        found = count_errors(
            program, opened.variables, examples, opened.number, batch_size=opened.batch_size
        )
    assert found is not None  # nothing asks it to stop
    return found[0]


def _predict(
    opened: "_Opened",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The scores, labels, losses and metrics of the test images."""
    # Each process predicts everything on one device.
    device, variables = jax.local_devices()[0], local(opened.variables)
    draw = opened.sampler.test_batch if opened.streamed else opened.sampler.test

    @jax.jit
    def predict(
        variables: Variables, examples: Batch, numbers: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
        sample = draw(examples, numbers)
        prediction, _ = opened.apply(variables, sample.images, target=sample.masks)
        losses, values = measure(prediction, sample, opened.objective, opened.metrics)
        return prediction.scores, sample.labels, losses, values

    size = opened.batch_size
    order = InOrder(opened.number, size, np.arange(size))
    numbers = range(-(-opened.number // size))
    with contextlib.ExitStack() as stack:
        if opened.streamed:
            read = stack.enter_context(open_stream(opened.test, order, numbers, workers=0))
            parts: Iterable[Batch] = (jax.device_put(as_batch(split), device) for split in read)
        else:
            parts = itertools.repeat(jax.device_put(as_batch(opened.test.read()), device))
        batches = [
            jax.device_get(predict(variables, part, order(n)))
            for n, part in zip(numbers, parts, strict=False)
        ]
    # The last batch repeats the last image.
    whole: tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]] = jax.tree.map(
        lambda *parts: np.concatenate(parts)[: opened.number], *batches
    )
    return whole


def _summarise(
    scores: np.ndarray, labels: np.ndarray, losses: np.ndarray, values: dict[str, np.ndarray]
) -> Evaluation:
    """Computes the evaluation from the predictions of all test images."""
    loss = float(losses.mean(dtype=np.float64))
    means = {name: float(value.mean(dtype=np.float64)) for name, value in values.items()}
    if labels.dtype == np.float32:  # numbers to predict
        none = (0,) * scores.shape[1]
        return Evaluation(loss, None, len(labels), none, none, means)
    wrong = ~np.asarray(is_right(scores, labels))
    shown = labels
    if labels.dtype != bool:
        classes = np.arange(scores.shape[1])
        shown = (labels.reshape(len(labels), -1, 1) == classes).any(axis=1)
    return Evaluation(
        loss,
        int(wrong.sum()),
        len(wrong),
        tuple(shown[wrong].sum(axis=0).tolist()),
        tuple(shown.sum(axis=0).tolist()),
        means,
    )


def _write_predictions(
    path: Path, opened: "_Opened", scores: np.ndarray, labels: np.ndarray
) -> None:
    """Writes a CSV line for each test image, with several classes of an image joined by +.

    An image is named by its file, or else by its index. For regression, a line has the numbers and
    their predictions.
    """
    if not processes.is_first():
        return
    names, order = opened.class_names, np.argsort(-scores, axis=1, kind="stable")
    images = range(len(labels)) if opened.files is None else opened.files
    if opened.is_regression:
        numbers = (f"{kind} of {name}" for kind in ("label", "prediction") for name in names)
        lines = zip(images, labels.tolist(), scores.tolist(), strict=True)
        write_csv(path, ["image", *numbers], ([image, *x, *y] for image, x, y in lines))
        return

    def classes(n: int) -> Iterator[str]:
        label = labels[n]
        true = np.flatnonzero(label) if labels.dtype == bool else np.atleast_1d(label)
        for some in (true, order[n, : len(true)]):
            yield "+".join(names[c] for c in sorted(some))

    heading = ["image", "label", "prediction", *(f"score of {name}" for name in names)]
    lines = zip(images, map(classes, range(len(labels))), scores.tolist(), strict=True)
    write_csv(path, heading, ([image, *both, *values] for image, both, values in lines))


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A run's network, and the test images to evaluate it on."""

    apply: Apply
    variables: Variables
    objective: Objective
    metrics: Mapping[str, Metric]
    sampler: Sampler
    driver: Driver
    batch_size: int
    name: str
    class_names: tuple[str, ...]
    test: AnySplit
    files: Sequence[str] | None
    streamed: bool
    number: int
    step: int | None
    is_regression: bool


def _open(
    config: EvaluateConfig,
    dataset: Dataset | None,
    objective: Objective | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> _Opened:
    processes.check_options(config, "data_dir", "predictions")
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
        input=config.input,
    )
    choices.check_test_size(dataset, config.test_size)
    if processes.number() > 1:
        DataDescription.of(dataset).check_alike()
    own = dataset.name == run.data.name
    # Pairs are shifted in tests too, as far as in the run.
    task = choices.choose_task(dataset, started.max_shift if own else None)
    apply, _ = split_abstract(model)
    step, variables = restore(config.run_dir, config.checkpoint, run, driver)
    number = len(dataset.test.labels) if config.test_size is None else config.test_size
    if objective is None and "objective" in run.custom:
        objective = _unknown_loss
    if objective is None:
        loss = started.loss if own else None
        objective = choices.choose_objective(loss, started.preset, model, dataset)
    sampler = Sampler(task, model.num_classes)
    streamed = choose_stream(config.input, dataset, sampler, several_seeds=False)
    return _Opened(
        apply=apply,
        variables=variables,
        objective=objective,
        metrics=choices.choose_metrics(metrics, dataset.is_regression),
        sampler=sampler,
        driver=driver,
        batch_size=-(-min(config.batch_size, number) // share) * share,
        name=dataset.name,
        class_names=dataset.class_names,
        test=dataset.test,
        files=None if task.is_made else dataset.test_files,
        streamed=streamed is not None,
        number=number,
        step=step,
        is_regression=dataset.is_regression,
    )


def _unknown_loss(prediction: Prediction, target: jax.Array, images: jax.Array) -> jax.Array:
    """Stands in for an objective that was given in Python in training and is missing now."""
    del target, images
    return jnp.full(prediction.scores.shape[:-1], jnp.nan)
