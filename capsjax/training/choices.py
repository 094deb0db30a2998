"""What the options choose, and every check of them that needs the data or the devices."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from capsjax import models
from capsjax.data import Dataset, Pairs, Shifted, Split, Task
from capsjax.data.transforms import Fill
from capsjax.errors import ConfigError
from capsjax.routing import algorithm
from capsjax.training.config import TrainConfig
from capsjax.training.objectives import LOSSES, Objective, choose_loss
from capsjax.training.programs import Driver, make_driver
from capsjax.training.step import paper_optimizer


def choose_model(config: TrainConfig, dataset: Dataset) -> models.ModelConfig:
    """Returns the preset's configuration with the options' fields, for the images of a data set.

    Raises:
      ConfigError: an option does not go with the network, or the images do not.
    """
    chosen = {"routing": config.routing, "num_iterations": config.num_iterations}
    overrides: dict[str, Any] = {name: v for name, v in chosen.items() if v is not None}
    preset = models.configure(config.preset)
    if not config.reconstruction:
        if not getattr(preset, "decoder_features", ()):
            raise ConfigError(f"--no-reconstruction: {config.preset} has no decoder anyway")
        overrides["decoder_features"] = ()
    for name in overrides:
        if not hasattr(preset, name):
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is for capsule networks, not for {config.preset}")
    try:
        preset = models.configure(config.preset, **overrides)
    except ValueError as error:
        raise _option_error(error) from None
    routing = getattr(preset, "routing", "")
    if config.num_iterations is not None and not algorithm(routing).iterates:
        raise ConfigError(f"--num-iterations is not for routing {routing!r}, which makes one pass")
    try:
        return models.configure(
            config.preset,
            **overrides,
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            dtype=config.dtype,
        )
    except ValueError as error:
        raise ConfigError(f"data set {dataset.name} does not suit the network: {error}") from None


def hold_out(
    train: Split, number: int | None, *, stratified: bool = True
) -> tuple[Split, Split | None]:
    """Splits images for validation off the training images.

    Which ones does not depend on a run's seed, so that runs with different seeds share them.

    Args:
      train: images and labels.
      number: how many to hold out; a tenth when None.
      stratified: whether to hold out the same share of each class, and at least one image of each
        class of several if so many are held out; otherwise, and where images may be of several
        classes, they are drawn whatever their class.

    Returns:
      What is left for training, and the images for validation or None.

    Raises:
      ConfigError: nothing would be left to train on.

    Example:
      >>> import numpy as np
      >>> from capsjax.data import Split
      >>> from capsjax.training import hold_out
      >>> split = Split(np.zeros((50, 28, 28, 1), np.uint8), np.arange(50) % 10)
      >>> train, validation = hold_out(split, None)
      >>> len(train.labels), len(validation.labels)
      (45, 5)
    """
    total = len(train.labels)
    number = total // 10 if number is None else number
    if number >= total:
        raise ConfigError(
            f"--validation must be less than the number of training images, {total}, got {number}"
        )
    if not number:
        return train, None
    order = np.random.default_rng(0).permutation(total)
    chosen = np.arange(total) < number
    if stratified and train.labels.ndim == 1:
        # The first ones of each class in the random order, each class sorted together.
        labels = train.labels[order]
        by_class = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        rank = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen[by_class] = rank < np.repeat(_shares(counts, number), counts)
    held, kept = np.sort(order[chosen]), np.sort(order[~chosen])
    return (
        Split(train.images[kept], train.labels[kept]),
        Split(train.images[held], train.labels[held]),
    )


def _shares(counts: np.ndarray, number: int) -> np.ndarray:
    """How many of each class to hold out: in proportion, by the method of largest remainders."""
    quotas = number * counts / counts.sum()
    most = np.maximum(counts - 1, 0)  # one of each class remains to train on
    if most.sum() < number:
        most = counts
    least = np.minimum(most, 1)
    if least.sum() > number:
        least = np.zeros_like(most)
    shares = np.clip(np.floor(quotas).astype(int), least, most)
    while shares.sum() < number:
        shares[np.argmax(np.where(shares < most, quotas - shares, -np.inf))] += 1
    while shares.sum() > number:
        shares[np.argmin(np.where(shares > least, quotas - shares, np.inf))] -= 1
    return shares


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Returns Adam with the options' learning rates."""
    return paper_optimizer(
        config.learning_rate,
        decay_rate=config.decay_rate,
        decay_steps=config.decay_steps,
        floor=config.min_learning_rate,
    )


def choose_task(dataset: Dataset, max_shift: int | None, fill: Fill | None = None) -> Task:
    """Returns the data set's task, with another largest shift and fill if there are.

    Raises:
      ConfigError: images of this data set are not shifted, or not so far, or are not filled.
    """
    task = dataset.task
    if fill is not None:
        if not isinstance(task, Shifted):
            raise ConfigError(
                f"--fill is for training images that are shifted, not for data set {dataset.name}"
            )
        task = dataclasses.replace(task, fill=fill)
    if max_shift is None:
        return task
    if not isinstance(task, Shifted | Pairs):
        raise ConfigError(f"--max-shift is not for data set {dataset.name}, which moves its images")
    smallest = min(dataset.image_shape[:2])
    if max_shift >= smallest:
        raise ConfigError(
            f"--max-shift must be below the images' {smallest} pixels, got {max_shift}"
        )
    return dataclasses.replace(task, max_shift=max_shift)


def count_batches(train: Split, batch_size: int) -> int:
    """Returns the number of whole batches of training images.

    Raises:
      ConfigError: there is none.
    """
    if batch_size > len(train.labels):
        raise ConfigError(
            f"--batch-size must be at most the number of training images, {len(train.labels)}, got"
            f" {batch_size}"
        )
    return len(train.labels) // batch_size


def choose_driver(name: str, devices: int | None, batch_size: int | None = None) -> Driver:
    """Returns the driver over the first so many devices, all of them when None.

    Raises:
      ConfigError: there are not so many, or the batch cannot be divided among them.
    """
    available = jax.devices()
    if devices is not None and devices > len(available):
        raise ConfigError(
            f"--devices must be at most {len(available)}, the number of"
            f" {available[0].platform} devices, got {devices}"
        )
    chosen = None if devices is None else available[:devices]
    try:
        return make_driver(name, batch_size=batch_size, devices=chosen)
    except ValueError as error:
        raise _option_error(error) from None


def choose_objective(
    loss: str | None, preset: str, model: models.ModelConfig, *, several_classes: bool
) -> Objective:
    """Returns the loss of this name; the one that the preset's source trains with when None.

    Raises:
      ConfigError: the loss does not go with the network or the data set.
    """
    try:
        return LOSSES[choose_loss(loss, preset, model, several_classes=several_classes)]
    except ValueError as error:
        raise _option_error(error) from None


def check_test_size(dataset: Dataset, number: int | None) -> None:
    """Raises a ConfigError if a number of test images is given for a set that has its own."""
    if number is not None and not dataset.task.is_made:
        raise ConfigError(
            f"--test-size is for data sets whose images are made, {dataset.name} has"
            f" {len(dataset.test.labels):,} test images"
        )
    if number is not None and number >= 2**31:
        raise ConfigError(f"--test-size must be below 2,147,483,648, got {number:,}")


def check_data_dir(name: str, data_dir: Path | None) -> None:
    """Raises a ConfigError if a directory is given for the data set that needs none."""
    if name == "mnist_5k" and data_dir is not None:
        raise ConfigError(
            f"--data-dir has no effect on data set {name}, which comes with the package; name the"
            f" data set in {data_dir} by --dataset"
        )


def match_classes(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """Returns the data set with labels that count these classes, matched by name.

    Raises:
      ConfigError: the data set has a class of another name.
    """
    if dataset.class_names == tuple(class_names):
        return dataset
    position = {name: n for n, name in enumerate(class_names)}
    for name in dataset.class_names:
        if name not in position:
            several = ", ".join(class_names[:12]) + (", …" if len(class_names) > 12 else "")
            raise ConfigError(
                f"data set {dataset.name} has a class {name!r}, which is none of the run's classes:"
                f" {several}"
            )
    new_labels = np.array([position[name] for name in dataset.class_names], np.int32)

    def matched(split: Split) -> Split:
        if split.labels.ndim > 1:
            several = np.zeros((len(split.labels), len(class_names)), bool)
            several[:, new_labels] = split.labels
            return Split(split.images, several)
        labels = new_labels[split.labels]
        if dataset.task.classes_per_image == 1:
            return Split(split.images, labels)
        order = np.argsort(labels, kind="stable")  # which drawing pairs requires
        return Split(split.images[order], labels[order])

    return dataclasses.replace(
        dataset,
        train=matched(dataset.train),
        test=matched(dataset.test),
        class_names=tuple(class_names),
    )


def check_model(config: TrainConfig, model: models.ModelConfig) -> None:
    """Raises a ConfigError if an option has no effect on a network that is given."""
    options = {"routing": None, "num_iterations": None, "reconstruction": True}
    for name, default in options.items():
        if getattr(config, name) != default:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} has no effect on a network whose configuration is given")
    if config.dtype not in ("float32", model.dtype):
        raise ConfigError(
            f"--dtype has no effect on a network whose configuration is given: {model.dtype}, got"
            f" {config.dtype}"
        )


def check_dataset(dataset: Dataset, model: models.ModelConfig) -> None:
    """Raises a ConfigError unless the network has these images' shape and number of classes."""
    if not len(dataset.test.labels):
        raise ConfigError(f"data set {dataset.name} has no test images")
    if dataset.image_shape != model.image_shape:
        found, expected = ("x".join(map(str, x)) for x in (dataset.image_shape, model.image_shape))
        raise ConfigError(
            f"data set {dataset.name} has images of {found}, the network takes {expected}"
        )
    if dataset.num_classes != model.num_classes:
        raise ConfigError(
            f"data set {dataset.name} has {dataset.num_classes} classes, the network has"
            f" {model.num_classes}"
        )


def _option_error(error: ValueError) -> ConfigError:
    """The same error, with the argument that it begins with named as an option."""
    return ConfigError(re.sub(r"^\w+", lambda m: "--" + m[0].replace("_", "-"), str(error)))
