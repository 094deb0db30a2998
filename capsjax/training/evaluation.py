"""Evaluating a finished or running run from its directory."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax import models
from capsjax.data import (
    Batch,
    Cropped,
    Dataset,
    Pairs,
    Shifted,
    Split,
    evaluation_samples,
    load,
    source_of,
)
from capsjax.errors import ConfigError
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.config import EvaluateConfig
from capsjax.training.drivers import make_driver
from capsjax.training.objectives import choose_loss
from capsjax.training.run_directory import DataDescription, RunDirectory
from capsjax.training.session import (
    Evaluation,
    Evaluator,
    check_dataset,
    check_test_size,
    choose_devices,
    choose_task,
    make_optimizer,
    option_error,
)
from capsjax.training.step import TrainState, init_state, split_network


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """An evaluation, and of what.

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


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Evaluates a run's checkpoint on a whole test set.

    Args:
      config: the options.

    Returns:
      The evaluation; every test image is counted once.

    Raises:
      ConfigError: an option cannot be, or the images are not such as the network takes.
      capsjax.data.DataError: the data set cannot be had.
      CheckpointError: the checkpoint cannot be read.
    """
    started, model, data = RunDirectory(config.run_dir).read_config()
    name = config.dataset or started.dataset
    # A run's own directory goes with its own data set only, or with what is made of the same.
    data_dir = config.data_dir or (
        started.data_dir if source_of(name) == source_of(started.dataset) else None
    )
    devices = choose_devices(config.devices)
    share = 1 if config.driver == "jit" else len(devices or jax.devices())
    batch_size = -(-config.batch_size // share) * share
    try:
        driver = make_driver(config.driver, batch_size=batch_size, devices=devices)
    except ValueError as error:
        raise option_error(error) from None
    dataset = load(name, data_dir=data_dir)
    check_dataset(dataset, model)
    check_test_size(dataset, config.test_size)
    # Pairs are shifted in test too, by as much as the run's.
    task = choose_task(dataset, started.max_shift if name == started.dataset else None)
    if name == started.dataset and dataset.class_names != data.class_names:
        raise ConfigError(
            f"data set {name} has the classes {', '.join(dataset.class_names)}, the run was"
            f" trained on {', '.join(data.class_names)}"
        )
    apply, variables = split_network(models.build(model, rngs=nnx.Rngs(0)))
    like = driver.replicate(init_state(variables, make_optimizer(started)))
    step, state = restore(RunDirectory(config.run_dir), config.checkpoint, like)
    several = task.classes_per_image > 1
    loss = choose_loss(
        started.loss if name == started.dataset else None,
        started.preset,
        model,
        several_classes=several,
    )
    evaluator = Evaluator(apply, loss, driver, batch_size, model, task)
    test = evaluator(state, dataset.test, number=config.test_size)
    assert test is not None  # only a request to stop ends it early, and there is none
    return Evaluated(config.run_dir, step, name, test)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained network, and the data set that it was trained on.

    Attributes:
      network: with the parameters of the checkpoint.
      dataset: the run's.
      test: images that the network is tested on; of a network for pairs single ones.
      step: of the checkpoint; 0 for a network that comes with the package.
    """

    network: models.Network
    dataset: Dataset
    test: Split
    step: int


def load_network(run_dir: Path, checkpoint: str | int = "last") -> Loaded:
    """Reads a run's network, and the data set that goes with it.

    Args:
      run_dir: the run's directory; or, where there is none, the name of a network that comes with
        the package, which goes with the digits in it.
      checkpoint: ``"last"``, ``"best"`` (by validation error), or a step.

    Returns:
      :class:`Loaded`; the network normalises with the running statistics.

    Raises:
      ConfigError: the directory holds no run, the data set is not the run's, or the network is
        shown no images that could be drawn.
      capsjax.data.DataError: the data set cannot be had.
      CheckpointError: the checkpoint cannot be read.
    """
    if not run_dir.exists() and str(run_dir) in models.pretrained():
        digits = load("mnist_5k")
        return Loaded(models.load_pretrained(str(run_dir)), digits, digits.test, 0)
    if not run_dir.exists():
        raise ConfigError(
            f"{run_dir} is no run directory, and no network that comes with the package"
            f" ({', '.join(models.pretrained())})"
        )
    started, model, data = RunDirectory(run_dir).read_config()
    dataset = load(started.dataset, data_dir=started.data_dir)
    check_dataset(dataset, model)
    data.check(DataDescription.of(dataset))
    network = models.build(model, rngs=nnx.Rngs(0))
    _, variables = split_network(network)
    like = init_state(variables, make_optimizer(started))
    step, state = restore(RunDirectory(run_dir), checkpoint, like)
    for values in state.variables:
        nnx.update(network, values)
    network.eval()
    return Loaded(network, dataset, _as_shown(dataset), step)


def _as_shown(dataset: Dataset) -> Split:
    """Test images as a network is shown them, on the host."""
    images, labels = dataset.test
    if isinstance(dataset.task, Pairs):
        return Split(np.asarray(dataset.task.singly(jnp.asarray(images))), labels)
    if isinstance(dataset.task, Shifted):
        return dataset.test
    if isinstance(dataset.task, Cropped):
        raise ConfigError(
            f"networks for {dataset.name} are shown standardised images, which figures cannot show"
        )
    split = Batch(jnp.asarray(images), jnp.asarray(labels))
    numbers = jnp.arange(len(labels))
    sample, found = evaluation_samples(
        dataset.task, split, numbers, num_classes=dataset.num_classes
    )
    shown = jnp.round(sample.images * 255).astype(jnp.uint8)
    return Split(np.asarray(shown), np.asarray(found))


def restore(directory: RunDirectory, which: str | int, like: TrainState) -> tuple[int, TrainState]:
    """Reads the last, the best or a numbered checkpoint of a run, and tells its step."""
    checkpoints = Checkpoints(directory.checkpoints, read_only=True)
    try:
        step = checkpoints.choose(which)
        return step, checkpoints.restore(step, like)
    finally:
        checkpoints.close()
