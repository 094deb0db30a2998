"""Evaluating a network on a whole test set; a run's from its directory."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax import models
from capsjax.data import Batch, Cropped, Dataset, Pairs, Sampler, Shifted, Split, load, source_of
from capsjax.errors import ConfigError
from capsjax.training import choices
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.config import EvaluateConfig, TrainConfig
from capsjax.training.objectives import Objective
from capsjax.training.programs import Driver, Evaluate, Pace, as_batch, make_evaluate
from capsjax.training.run_directory import DataDescription, RunDirectory
from capsjax.training.step import Apply, Variables, init_state, split_network


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
      loss: mean of the objective, with the true classes as the decoder's target.
      wrong: number of wrong predictions.
      count: number of examples, every one counted once.
    """

    loss: float
    wrong: int
    count: int

    @property
    def error(self) -> float:
        """Share of wrong predictions."""
        return self.wrong / self.count


@dataclasses.dataclass(frozen=True)
class CheckpointEvaluation:
    """An evaluation and its subject.

    Attributes:
      run_dir: the run's directory.
      step: of the checkpoint.
      dataset: name of the data set whose test images were used.
      test: the evaluation.
    """

    run_dir: Path
    step: int
    dataset: str
    test: Evaluation


def evaluate(config: EvaluateConfig, *, dataset: Dataset | None = None) -> CheckpointEvaluation:
    """Evaluates a run's checkpoint on a whole test set.

    Args:
      config: the options.
      dataset: the images; loaded by the options when None.

    Returns:
      The evaluation; every test image is counted once.

    Raises:
      ConfigError: an option is invalid, or the network does not take these images.
      capsjax.data.DataError: the data set is missing or damaged.
      CheckpointError: the checkpoint cannot be read.
    """
    opened = _open(config, dataset)
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
    return CheckpointEvaluation(config.run_dir, opened.step, opened.name, found[0])


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
    examples = opened.driver.replicate(as_batch(opened.test))

    @jax.jit
    def predict(
        variables: Variables, examples: Batch, numbers: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        sample = opened.sampler.test(examples, numbers)
        return opened.apply(variables, sample.images)[0].scores, sample.labels

    size, last = opened.batch_size, opened.number - 1
    batches = [
        jax.device_get(
            predict(opened.variables, examples, np.minimum(first + np.arange(size), last))
        )
        for first in range(0, opened.number, size)
    ]
    scores, labels = map(np.concatenate, zip(*batches, strict=True))
    return scores[: opened.number], labels[: opened.number]


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
    test: Split
    number: int
    step: int


def _open(config: EvaluateConfig, dataset: Dataset | None) -> _Opened:
    directory = RunDirectory(config.run_dir)
    started, model, data = directory.read_config()
    name = config.dataset or started.dataset
    own = name == started.dataset
    driver = choices.choose_driver(config.driver, config.devices)
    share = len(driver.devices)
    if dataset is None:
        # A run's own directory goes with its own data set only, or with what is made of the same.
        same_source = source_of(name) == source_of(started.dataset)
        data_dir = config.data_dir or (started.data_dir if same_source else None)
        dataset = load(
            name,
            data_dir=data_dir,
            image_size=config.image_size or (started.image_size if own else None),
            channels=config.channels or (started.channels if own else None),
        )
    choices.check_dataset(dataset, model)
    choices.check_test_size(dataset, config.test_size)
    if own and dataset.class_names != data.class_names:
        raise ConfigError(
            f"data set {name} has the classes {', '.join(dataset.class_names)}, the run was"
            f" trained on {', '.join(data.class_names)}"
        )
    # Pairs are shifted in test too, by as much as the run's.
    task = choices.choose_task(dataset, started.max_shift if own else None)
    network = models.build(model, rngs=nnx.Rngs(0))
    apply, step, variables = _restore(directory, config.checkpoint, started, network, driver)
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
        batch_size=-(-config.batch_size // share) * share,
        name=name,
        test=dataset.test,
        number=len(dataset.test.labels) if config.test_size is None else config.test_size,
        step=step,
    )


def _restore(
    directory: RunDirectory,
    which: str | int,
    started: TrainConfig,
    network: models.Network,
    driver: Driver,
) -> tuple[Apply, int, Variables]:
    """The network as a function, and the step and the arrays of a checkpoint."""
    apply, variables = split_network(network)
    like = driver.replicate(init_state(variables, choices.make_optimizer(started)))
    checkpoints = Checkpoints(directory.checkpoints, read_only=True)
    try:
        step = checkpoints.choose(which)
        return apply, step, checkpoints.restore(step, like).variables
    finally:
        checkpoints.close()


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
    pace, first, total = Pace(batches), 0, (0.0, 0, 0)
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
    return [
        Evaluation(float(loss) / int(examples), int(wrong), int(examples))
        for loss, wrong, examples in zip(*map(np.atleast_1d, total), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A trained network and the data set that it was trained on.

    Attributes:
      network: with the parameters of the checkpoint.
      dataset: the run's.
      test: the network's test images; single ones for a network for pairs.
      step: of the checkpoint; 0 for a network that comes with the package.
    """

    network: models.Network
    dataset: Dataset
    test: Split
    step: int


def load_network(run_dir: Path, checkpoint: str | int = "last") -> TrainedNetwork:
    """Reads a run's network, and the data set that goes with it.

    Args:
      run_dir: the run's directory; or, where there is none, the name of a network that comes with
        the package, which goes with the digits in it.
      checkpoint: ``"last"``, ``"best"`` (by validation error), or a step.

    Returns:
      :class:`TrainedNetwork`; the network normalises with the running statistics.

    Raises:
      ConfigError: the directory holds no run, the data set is not the run's, or the network's
        input cannot be drawn.
      capsjax.data.DataError: the data set is missing or damaged.
      CheckpointError: the checkpoint cannot be read.
    """
    if not run_dir.exists() and str(run_dir) in models.pretrained():
        digits = load("mnist_5k")
        return TrainedNetwork(models.load_pretrained(str(run_dir)), digits, digits.test, 0)
    if not run_dir.exists():
        raise ConfigError(
            f"{run_dir} is no run directory, and no network that comes with the package"
            f" ({', '.join(models.pretrained())})"
        )
    started, model, data = RunDirectory(run_dir).read_config()
    dataset = load(
        started.dataset,
        data_dir=started.data_dir,
        image_size=started.image_size,
        channels=started.channels,
    )
    choices.check_dataset(dataset, model)
    data.check(DataDescription.of(dataset))
    network = models.build(model, rngs=nnx.Rngs(0))
    driver = choices.choose_driver("jit", None)
    _, step, variables = _restore(RunDirectory(run_dir), checkpoint, started, network, driver)
    for values in variables:
        nnx.update(network, values)
    network.eval()
    return TrainedNetwork(network, dataset, _as_shown(dataset), step)


def _as_shown(dataset: Dataset) -> Split:
    """The network's test images on the host."""
    images, labels = dataset.test
    if labels.ndim > 1:
        raise ConfigError(
            f"data set {dataset.name} has any number of classes in an image, which figures cannot"
            " show"
        )
    if isinstance(dataset.task, Pairs):
        return Split(np.asarray(dataset.task.singly(jnp.asarray(images))), labels)
    if isinstance(dataset.task, Shifted):
        return dataset.test
    if isinstance(dataset.task, Cropped):
        raise ConfigError(
            f"networks for {dataset.name} take standardised images, which figures cannot show"
        )
    sampler = Sampler(dataset.task, dataset.num_classes)
    sample = sampler.test(as_batch(dataset.test), jnp.arange(len(labels)))
    return Split(np.asarray(sample.images), np.asarray(sample.labels))
