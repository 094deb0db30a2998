"""Turns options into objects, with all checks that need the data or the devices."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import chex
import jax
import msgspec
import numpy as np
import optax

from capsjax import models
from capsjax.data import Dataset, Pairs, Shifted, Task
from capsjax.data.dataset import AnySplit
from capsjax.data.transforms import Fill
from capsjax.errors import ConfigError
from capsjax.ops._checks import check_callable
from capsjax.options import check_default, flag
from capsjax.routing import algorithm
from capsjax.training.config import ClassWeights, TrainConfig
from capsjax.training.drivers import Driver, make_driver
from capsjax.training.objectives import LOSSES, Metric, Objective, absolute_error, choose_loss
from capsjax.training.optimizers import freeze


def choose_model(config: TrainConfig, dataset: Dataset) -> models.ModelConfig:
    """Returns the preset's configuration, adapted to the options and to the data set's images.

    Raises:
      ConfigError: an option or the images do not fit the network.
    """
    chosen = {"routing": config.routing, "num_iterations": config.num_iterations}
    overrides: dict[str, Any] = {name: v for name, v in chosen.items() if v is not None}
    preset = models.configure(config.preset)
    fields = _fields(config, preset)
    if not config.reconstruction:
        if not getattr(preset, "decoder_features", ()):
            raise ConfigError(
                f"--no-reconstruction has no effect on {config.preset}, which has no decoder"
            )
        overrides["decoder_features"] = ()
        if "decoder_features" in fields:
            raise ConfigError("--override decoder_features has no effect without reconstruction")
    for name in overrides:
        if not hasattr(preset, name):
            raise ConfigError(f"{flag(name)} is for capsule networks, not for {config.preset}")
    overrides |= fields
    try:
        preset = models.configure(config.preset, **overrides)
    except ValueError as error:
        if re.split(r"\W", str(error))[0] in fields:
            raise ConfigError(f"--override: {error}") from None
        raise _option_error(error) from None
    routing = getattr(preset, "routing", "")
    if config.num_iterations is not None and not algorithm(routing).iterates:
        raise ConfigError(
            f"--num-iterations has no effect on routing {routing!r}, which makes a single pass"
        )
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


# Fields of a network's configuration that --override cannot set, and what determines them.
_DECIDED = {
    "image_shape": "the data set",
    "num_classes": "the data set",
    "dtype": "--dtype",
    "routing": "--routing",
    "num_iterations": "--num-iterations",
}


def _fields(config: TrainConfig, preset: models.ModelConfig) -> dict[str, Any]:
    """Values by field of the network's configuration, from --override."""
    kinds, fields = get_type_hints(type(preset)), {}
    known = [field.name for field in dataclasses.fields(preset) if field.name not in _DECIDED]
    for text in config.override or ():
        name, _, value = text.partition("=")
        if name in _DECIDED:
            raise ConfigError(
                f"--override cannot set {name}, which {_DECIDED[name]} determines, got {text!r}"
            )
        if name not in known:
            raise ConfigError(
                f"--override must name a field of {config.preset}: {', '.join(known)}; got {text!r}"
            )
        if name in fields:
            raise ConfigError(f"--override sets {name} twice")
        several = get_origin(kinds[name]) is tuple
        values: Any = [v for v in value.split(",") if v] if several else value
        try:
            fields[name] = msgspec.convert(values, kinds[name], strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--override {text}: {error}") from None
    return fields


def choose_task(dataset: Dataset, max_shift: int | None, fill: Fill | None = None) -> Task:
    """Returns the data set's task, with this largest shift and fill where they are not None.

    Raises:
      ConfigError: images of this data set are not shifted, or are too small for the shift.
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
        raise ConfigError(
            f"--max-shift has no effect on data set {dataset.name}, whose images are not shifted"
        )
    smallest = min(dataset.image_shape[:2])
    if max_shift >= smallest:
        raise ConfigError(
            f"--max-shift must be below the images' {smallest} pixels, got {max_shift}"
        )
    return dataclasses.replace(task, max_shift=max_shift)


def count_batches(train: AnySplit, batch_size: int) -> int:
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
    """Returns a driver over the first devices; over all of them when None.

    Raises:
      ConfigError: there are too few devices, the batch cannot be divided among them, or several
        processes have different numbers of devices or would not all take part.
    """
    available = jax.devices()
    counts = collections.Counter(device.process_index for device in available)
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"process {process} has {count}" for process, count in counts.items())
        raise ConfigError(f"all processes must have the same number of devices: {numbers}")
    if len(counts) > 1 and devices not in (None, len(available)):
        raise ConfigError(
            f"--devices must be all {len(available)} with several processes, got {devices}"
        )
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
    loss: str | None, preset: str, model: models.ModelConfig, dataset: Dataset
) -> Objective:
    """Returns the loss of this name; when None, that of the preset's paper or code.

    Raises:
      ConfigError: the loss does not fit the network or the data set.
    """
    try:
        name = choose_loss(
            loss,
            preset,
            model,
            several_classes=dataset.has_several_classes,
            regression=dataset.is_regression,
        )
    except ValueError as error:
        raise _option_error(error) from None
    return LOSSES[name]


def check_numbers(model: models.ModelConfig, dataset: Dataset) -> None:
    """Raises a ConfigError if there are numbers to predict that lie outside the scores' range."""
    if not dataset.is_regression or isinstance(model, models.BaselineConfig):
        return
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    low, high = labels.min(), labels.max()
    if not 0 <= low <= high <= 1:
        raise ConfigError(
            f"data set {dataset.name} has numbers to predict from {low:g} to {high:g}, but the"
            " scores of capsule networks lie in [0, 1]; scale the numbers, or pass train() an"
            " objective on the poses"
        )


def choose_class_weights(
    weights: ClassWeights, dataset: Dataset, train: AnySplit
) -> tuple[float, ...] | None:
    """Returns the weight of each class; None for equal ones.

    Raises:
      ConfigError: the number of weights is not that of the classes, or a class has no training
        images.
    """
    if weights is None:
        return None
    if dataset.is_regression:
        raise ConfigError("--class-weights is for classes, not for numbers to predict")
    if weights != "balanced":
        if len(weights) != dataset.num_classes:
            raise ConfigError(
                f"--class-weights must be {dataset.num_classes} numbers, one for each class, got"
                f" {len(weights)}"
            )
        return weights
    labels = train.labels
    several = labels.ndim > 1
    counts = labels.sum(0) if several else np.bincount(labels, minlength=dataset.num_classes)
    for name, count in zip(dataset.class_names, counts, strict=True):
        if not count:
            raise ConfigError(f"--class-weights balanced: class {name!r} has no training images")
    return tuple((counts.sum() / (len(counts) * counts)).tolist())


def choose_metrics(
    metrics: Mapping[str, Metric] | None, is_regression: bool
) -> Mapping[str, Metric]:
    """Returns the given metrics; when None, the absolute error for regression, else none."""
    if metrics is None:
        return {"absolute_error": absolute_error} if is_regression else {}
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(f"metrics must be a dict of functions by name, got {metrics!r}")
    for name in ("loss", "error", "count", "metrics"):
        if name in metrics:
            raise ValueError(f"metrics must not be named {name!r}, a name that is already in use")
    check_callable(**{f"metrics[{name!r}]": metric for name, metric in metrics.items()})
    return metrics


def freeze_parts(
    optimizer: optax.GradientTransformation, params: chex.ArrayTree, parts: Sequence[str]
) -> optax.GradientTransformation:
    """Returns an optimizer that leaves these parts unchanged; see :func:`freeze`.

    Raises:
      ConfigError: the network has no such part, or nothing is left to train.
    """
    try:
        return freeze(optimizer, params, parts)
    except ValueError as error:
        raise _option_error(error) from None


def check_test_size(dataset: Dataset, number: int | None) -> None:
    """Raises a ConfigError if a number of test images is given for a set that has a fixed one."""
    if number is not None and not dataset.task.is_made:
        raise ConfigError(
            f"--test-size is for data sets whose images are generated; {dataset.name} has"
            f" {len(dataset.test.labels):,} test images"
        )
    if number is not None and number >= 2**31:
        raise ConfigError(f"--test-size must be below 2,147,483,648, got {number:,}")


def check_data_dir(name: str, data_dir: Path | None) -> None:
    """Raises a ConfigError if a directory is given for the packaged data set."""
    if name == "mnist_5k" and data_dir is not None:
        raise ConfigError(
            f"--data-dir has no effect on data set {name}, which is part of the package; name the"
            f" data set in {data_dir} with --dataset"
        )


def match_classes(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """Returns the data set with its labels renumbered to these classes, matched by name.

    Raises:
      ConfigError: the data set has a class that is not among these.
    """
    if dataset.class_names == tuple(class_names):
        return dataset
    if dataset.is_regression and set(dataset.class_names) != set(class_names):
        raise ConfigError(
            f"data set {dataset.name} has the numbers {', '.join(dataset.class_names)}, but the"
            f" run predicts {', '.join(class_names)}"
        )
    position = {name: n for n, name in enumerate(class_names)}
    for name in dataset.class_names:
        if name not in position:
            several = ", ".join(class_names[:12]) + (", …" if len(class_names) > 12 else "")
            raise ConfigError(
                f"data set {dataset.name} has a class {name!r}, which is not among the run's"
                f" classes: {several}"
            )
    new_labels = np.array([position[name] for name in dataset.class_names], np.int32)

    def matched(split: AnySplit) -> AnySplit:
        if split.labels.ndim > 1:
            several: Any = np.zeros((len(split.labels), len(class_names)), split.labels.dtype)
            several[:, new_labels] = split.labels
            return split._replace(labels=several)
        labels = new_labels[split.labels]
        if dataset.task.classes_per_image == 1:
            return split._replace(labels=labels)
        order = np.argsort(labels, kind="stable")  # drawing pairs needs sorted labels
        return split._replace(labels=labels).take(order)

    return dataclasses.replace(
        dataset,
        train=matched(dataset.train),
        test=matched(dataset.test),
        class_names=tuple(class_names),
    )


def check_model(config: TrainConfig, model: models.ModelConfig) -> None:
    """Raises a ConfigError if an option has no effect because the network is given."""
    where = "on a network whose configuration is given"
    check_default(config, where, "routing", "num_iterations", "reconstruction", "override")
    if config.dtype not in ("float32", model.dtype):
        raise ConfigError(
            f"--dtype has no effect on a network whose configuration is given: that has dtype"
            f" {model.dtype}, got {config.dtype}"
        )


def check_dataset(dataset: Dataset, model: models.ModelConfig) -> None:
    """Raises a ConfigError unless the network fits the shape and the classes of the images."""
    if not len(dataset.test.labels):
        raise ConfigError(f"data set {dataset.name} has no test images")
    if dataset.image_shape != model.image_shape:
        found, expected = ("x".join(map(str, x)) for x in (dataset.image_shape, model.image_shape))
        raise ConfigError(
            f"data set {dataset.name} has images of {found}, but the network takes {expected}"
        )
    if dataset.num_classes != model.num_classes:
        raise ConfigError(
            f"data set {dataset.name} has {dataset.num_classes} classes, but the network"
            f" has {model.num_classes}"
        )


def _option_error(error: ValueError) -> ConfigError:
    """The same error, with its first word, an argument, written as an option."""
    return ConfigError(re.sub(r"^\w+", lambda m: flag(m[0]), str(error)))
