"""Loads a run's configuration, network and images from its directory."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax import models
from capsjax.data import Cropped, Dataset, Pairs, Sampler, Shifted, Split, is_name, load, source_of
from capsjax.data.dataset import AnySplit
from capsjax.errors import ConfigError
from capsjax.training import choices, processes
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.config import TrainConfig
from capsjax.training.data_description import DataDescription
from capsjax.training.drivers import Driver
from capsjax.training.inputs import InputName, load_dataset
from capsjax.training.programs import as_batch
from capsjax.training.run_directory import RunConfig, RunDirectory
from capsjax.training.step import Variables, split_abstract, split_network

_SHOWN = 1000  # test images read from disk for figures


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A trained network and the data set that it was trained on.

    Attributes:
      network: the network, with the parameters of the checkpoint.
      dataset: the run's data set.
      test: the network's test images, the first thousand of a streamed set; single images for a
        network of pairs.
      step: step of the checkpoint; None for a network in the package.
    """

    network: models.Network
    dataset: Dataset
    test: Split
    step: int | None


def load_network(
    run_dir: Path,
    checkpoint: str | int = "last",
    *,
    dataset: Dataset | None = None,
    data_dir: Path | None = None,
) -> TrainedNetwork:
    """Loads a run's network and its data set.

    Args:
      run_dir: the run's directory; if there is no such directory, the name of a network in the
        package, whose data set is ``mnist_5k``.
      checkpoint: ``"last"``, ``"best"`` (by validation error), or a step.
      dataset: images to use instead of the run's; their class names must be among the run's.
      data_dir: directory of the run's data set; the one used in training when None.

    Returns:
      A :class:`TrainedNetwork`, which normalises with the running statistics.

    Raises:
      ConfigError: the directory holds no run, the data set is not the run's, or the network's
        inputs cannot be shown in figures.
      capsjax.data.DataError: the data set is missing or damaged.
      CheckpointError: the checkpoint cannot be read.
    """
    run = read_run(run_dir)
    dataset = load_images(run, dataset, data_dir=data_dir)
    network = nnx.eval_shape(lambda: models.build(run.model, rngs=nnx.Rngs(0)))
    driver = choices.choose_driver("jit", None)
    step, variables = restore(run_dir, checkpoint, run, driver)
    for values in variables:
        nnx.update(network, values)
    network.eval()
    return TrainedNetwork(network, dataset, _as_shown(dataset), step)


def _as_shown(dataset: Dataset) -> Split:
    """The network's test images on the host."""
    images, labels = test = _some(dataset.test)
    if labels.ndim > 1:
        kind = "numbers to predict" if dataset.is_regression else "any number of classes per image"
        raise ConfigError(f"data set {dataset.name} has {kind}, which figures cannot show")
    if isinstance(dataset.task, Pairs):
        return Split(np.asarray(dataset.task.singly(jnp.asarray(images))), labels)
    if isinstance(dataset.task, Shifted):
        return test
    if isinstance(dataset.task, Cropped):
        raise ConfigError(
            f"networks for {dataset.name} take standardised images, which figures cannot show"
        )
    sampler = Sampler(dataset.task, dataset.num_classes)
    sample = jax.jit(lambda *given: sampler.test(*given))(as_batch(test), np.arange(len(labels)))
    return Split(np.asarray(sample.images), np.asarray(sample.labels))


def _some(split: AnySplit) -> Split:
    """The whole split if it is in memory; the first thousand images of one on disk."""
    return (
        split
        if isinstance(split, Split)
        else split.take(np.arange(min(_SHOWN, len(split.labels)))).read()
    )


def load_own(
    run: RunConfig,
    data_dir: Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    input: InputName | None = None,
) -> Dataset:
    """Loads the data set that a run was trained on, from `data_dir` if given.

    Raises:
      ConfigError: the run's data set was given in Python.
      capsjax.data.DataError: it is missing or damaged.
    """
    if not is_name(run.dataset):
        raise ConfigError(
            f"the run in {run.train.run_dir} was trained on a data set given in Python,"
            f" {run.dataset}; pass it as dataset=..."
        )
    choices.check_data_dir(run.dataset, data_dir)
    return load_dataset(
        run.dataset,
        input,
        data_dir=data_dir or run.train.data_dir,
        image_size=image_size or run.train.image_size,
        channels=channels or run.train.channels,
    )


def load_images(
    run: RunConfig,
    dataset: Dataset | None,
    *,
    name: str | None = None,
    data_dir: Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    input: InputName | None = None,
) -> Dataset:
    """Returns the given or named data set with the run's classes, else the run's own."""
    own = dataset is None and name is None and data_dir is None
    if dataset is None and name in (None, run.dataset):
        dataset = load_own(run, data_dir, image_size=image_size, channels=channels, input=input)
    elif dataset is None:
        assert name is not None
        choices.check_data_dir(name, data_dir)
        # The run's directory serves only its own data set, and sets generated from the same one.
        known = is_name(run.dataset) and source_of(name) == source_of(run.dataset)
        if data_dir is None and known:
            data_dir = run.train.data_dir
        dataset = load_dataset(
            name, input, data_dir=data_dir, image_size=image_size, channels=channels
        )
    if not own:
        if dataset.is_regression != run.data.is_regression:
            kind = "numbers to predict" if dataset.is_regression else "classes"
            raise ConfigError(f"data set {dataset.name} has {kind}, unlike the run's data")
        dataset = choices.match_classes(dataset, run.data.class_names)
    choices.check_dataset(dataset, run.model)
    if own:
        run.data.check(DataDescription.of(dataset))
    return dataset


def is_packaged(run_dir: Path) -> bool:
    """Whether this is the name of a network in the package, and not a directory."""
    return str(run_dir) in models.pretrained() and not RunDirectory(run_dir).exists()


def read_run(run_dir: Path) -> RunConfig:
    """Returns the configuration of a run, or of a network in the package."""
    if is_packaged(run_dir):
        about, digits = models.about_pretrained(str(run_dir)), load("mnist_5k")
        model = models.configure(about.preset, **about.overrides)
        train = TrainConfig(preset=about.preset, dataset="mnist_5k")
        return RunConfig(train, model, DataDescription.of(digits))
    if not RunDirectory(run_dir).exists():
        raise ConfigError(
            f"{run_dir} is neither a run directory nor a network in the package"
            f" ({', '.join(models.pretrained())})"
        )
    return RunDirectory(run_dir).read_config()


def restore(
    run_dir: Path, which: str | int, run: RunConfig, driver: Driver
) -> tuple[int | None, Variables]:
    """Returns the step and the arrays of a checkpoint; no step for a packaged network.

    Raises:
      ConfigError: a checkpoint is named for a packaged network.
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    if is_packaged(run_dir):
        if which != "last":
            raise ConfigError(f"{run_dir} has no checkpoints, got checkpoint {which}")
        _, variables = split_network(models.load_pretrained(str(run_dir)))
        return None, driver.replicate(variables)
    _, like = split_abstract(run.model)
    folder, steps = RunDirectory(run_dir).checkpoints, []

    def read() -> Variables:
        checkpoints = Checkpoints(folder, read_only=True, run=run.shaping())
        try:
            steps.append(checkpoints.choose(which))
            return checkpoints.restore_variables(steps[0], like)
        finally:
            checkpoints.close()

    variables = driver.replicate(processes.share(read, like))
    return processes.first(lambda: steps[0], int), variables
