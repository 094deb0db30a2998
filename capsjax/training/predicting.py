"""``capsjax predict``: predicts the classes of image files."""

import dataclasses
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from capsjax.data import white_of
from capsjax.data.image_files import list_images, widened
from capsjax.errors import ConfigError, DataError
from capsjax.files import write_csv
from capsjax.options import check_types, expand_paths, require, require_at_least, require_folder
from capsjax.training.classifier import Classifier, load_classifier

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Predict the classes of images with a trained network."""

    run_dir: Path
    """Run directory, or mnist_small for the network in the package."""

    images: tuple[Path, ...]
    """Images to read: files; directories, with their subdirectories; or .npy files of arrays [N, H,
    W, C] or [N, H, W] in the network's shape."""

    checkpoint: str = "last"
    """Checkpoint: last, best (lowest validation error), or a step."""

    output: Path | None = None
    """CSV file to write, with the prediction and the scores of all classes for each image."""

    threshold: float | None = None
    """Predict all classes with at least this score, for networks of several classes per image. By
    default, the class with the highest score is predicted, or the two highest for multi_mnist."""

    image_size: int | None = None
    """Rows and columns to which images are scaled for a network that sees only their center. By
    default, 32 for networks trained on cifar10."""

    batch_size: int = 100
    """Images per batch."""

    def __post_init__(self) -> None:
        """Checks the options that can be checked without the network."""
        check_types(self)
        expand_paths(self, "images", "output", remote=("run_dir",))
        require_at_least(self, 1, "batch_size", "image_size")
        require(self, "threshold", not math.isnan(self.threshold or 0), "a number")
        require_folder(self, "output")
        if not self.images:
            raise ConfigError("needs images: files or directories")


class Predictions(NamedTuple):
    """Predictions of images.

    Attributes:
      names: paths of the images; for one in an array its index follows, as in ``digits.npy[3]``.
      scores: scores of the classes, float32 ``[N, J]``; a higher score means a likelier class. For
        regression, the predicted numbers.
      classes: indices of the predicted classes of each image; None for regression.
      class_names: names of the classes, in the order of the scores.
      unreadable: number of images that could not be read; a warning named each.
    """

    names: list[str]
    scores: npt.NDArray[np.float32]
    classes: list[tuple[int, ...]] | None
    class_names: tuple[str, ...]
    unreadable: int

    def label(self, n: int) -> str:
        """Returns the names of the predicted classes of image n, joined by +."""
        assert self.classes is not None
        return "+".join(self.class_names[c] for c in self.classes[n])

    def lines(self) -> Iterator[str]:
        """Yields a table of the predicted classes and their scores, one line per image."""
        rows: list[tuple[str, ...]]
        if self.classes is None:
            rows = [(*self.class_names, "image")]
            rows += [
                (*(f"{x:.4f}" for x in scores), name)
                for name, scores in zip(self.names, self.scores, strict=True)
            ]
        else:
            rows = [("score", "class", "image")]
            for n, name in enumerate(self.names):
                best = "+".join(f"{self.scores[n, c]:.4f}" for c in self.classes[n])
                rows.append((best or "-", self.label(n) or "none", name))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for *cells, name in rows:
            yield "  ".join([*(f"{c:{w}}" for c, w in zip(cells, widths, strict=False)), name])


def predict(config: PredictConfig) -> Predictions:
    """Predicts the classes of images with a run's network; the run's data set is not needed.

    Images are read as in an ``image_folder``; see :meth:`Classifier.read_image`. An image that
    cannot be read is named in a warning and left out.

    Args:
      config: the options.

    Returns:
      :class:`Predictions`, in the order of the images.

    Raises:
      ConfigError: an option is invalid, the directory holds no run, or as in
        :func:`load_classifier`.
      capsjax.data.DataError: an image or a directory is missing, or a directory holds no images.
      CheckpointError: the checkpoint cannot be read.
    """
    files = [file for path in config.images for file in list_images(path)]
    classifier = load_classifier(config.run_dir, config.checkpoint, image_size=config.image_size)
    if classifier.is_regression and config.threshold is not None:
        raise ConfigError("--threshold is for classes, not for a network that predicts numbers")
    reader = _Reader(classifier)
    names: list[str] = []
    scores = [np.empty((0, len(classifier.class_names)), np.float32)]
    images = reader.images(files)
    while batch := list(itertools.islice(images, config.batch_size)):
        # The last of several batches is padded to the size of the others, to avoid a compilation.
        size = config.batch_size if names else len(batch)
        names += [name for name, _ in batch]
        scores.append(_score(classifier, [pixels for _, pixels in batch], size))
    reader.report()
    joined = np.concatenate(scores)
    predictions = Predictions(
        names,
        joined,
        None
        if classifier.is_regression
        else _classes(joined, classifier.classes_per_image or 1, config.threshold),
        classifier.class_names,
        reader.unreadable,
    )
    if config.output is not None:
        _write(config.output, predictions)
    return predictions


def _score(
    classifier: Classifier, images: Sequence[npt.NDArray[Any]], batch_size: int
) -> npt.NDArray[np.float32]:
    """Scores a batch in the widest of its dtypes, padded to `batch_size`."""
    dtype = np.result_type(*images)
    stacked = np.stack([widened(pixels, dtype) for pixels in images])
    positions = np.minimum(np.arange(batch_size), len(images) - 1)
    return classifier(stacked[positions], batch_size=batch_size)[: len(images)]


def _classes(
    scores: npt.NDArray[np.float32], number: int, threshold: float | None
) -> list[tuple[int, ...]]:
    """Returns the classes with the highest scores, in ascending order."""
    if threshold is not None:
        return [tuple(np.flatnonzero(row >= threshold).tolist()) for row in scores]
    order = np.argsort(-scores, axis=1, kind="stable")
    return [tuple(row) for row in np.sort(order[:, :number]).tolist()]


class _Reader:
    """Reads images for a network, and counts the unreadable ones."""

    def __init__(self, classifier: Classifier):
        self._classifier = classifier
        self._lost: Counter[str] = Counter()
        self.unreadable = 0

    def images(self, files: Sequence[Path]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yields names and pixels of the readable images."""
        for file in files:
            try:
                if file.suffix == ".npy":
                    for n, pixels in enumerate(self._array(file)):
                        yield f"{file}[{n}]", np.asarray(pixels)
                else:
                    yield str(file), self._classifier.read_image(file, lost=self._lost)
            except (DataError, OSError) as error:
                self.unreadable += 1
                _log.warning("%s", error)

    def report(self) -> None:
        """Warns about images that lose data."""
        for what, number in self._lost.items():
            _log.warning("reads %s: %s files", what, f"{number:,}")

    def _array(self, file: Path) -> npt.NDArray[Any]:
        """The images of an array."""
        try:
            images = np.load(file, allow_pickle=False)
            if not isinstance(images, np.ndarray):
                raise ValueError("it is an archive (.npz) of arrays")
            images = images[..., None] if images.ndim == 3 else images
            shape = self._classifier.image_shape
            if images.shape[1:] != shape:
                raise ValueError(
                    f"shape must be [N, {', '.join(map(str, shape))}], got {list(images.shape)}"
                )
            if white_of(images.dtype) == 1 and not (
                images.min(initial=0) >= 0 and images.max(initial=0) <= 1
            ):
                raise ValueError("floating-point pixels must lie in [0, 1]")
        except (ValueError, TypeError, EOFError) as error:
            raise DataError(f"cannot read {file} as an array of images: {error}") from None
        return images


def _write(path: Path, predictions: Predictions) -> None:
    """Writes a CSV line for each image."""
    names, scores = predictions.class_names, predictions.scores.tolist()
    if predictions.classes is None:
        heading = ["image", *(f"prediction of {name}" for name in names)]
        rows = ([name, *values] for name, values in zip(predictions.names, scores, strict=True))
    else:
        heading = ["image", "prediction", *(f"score of {name}" for name in names)]
        lines = enumerate(zip(predictions.names, scores, strict=True))
        rows = ([name, predictions.label(n), *values] for n, (name, values) in lines)
    write_csv(path, heading, rows)
