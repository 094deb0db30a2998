"""Holds out training images for validation."""

from typing import TypeVar, cast

import numpy as np

from capsjax.data.dataset import AnySplit
from capsjax.errors import ConfigError

Examples = TypeVar("Examples", bound=AnySplit)


def hold_out(
    train: Examples, number: int | None, *, stratified: bool = True
) -> tuple[Examples, Examples | None]:
    """Holds out training images for validation.

    The choice does not depend on the run's seed, so that runs with different seeds share it.

    Args:
      train: images and labels.
      number: number of images to hold out; a tenth when None.
      stratified: whether to hold out the same fraction of each class, and at least one image of
        each class with several images if `number` allows it. Otherwise, and if images may show
        several classes, images are drawn regardless of class.

    Returns:
      The remaining training images, and the validation images or None.

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
    if not total:
        raise ConfigError("the data set has no training images")
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
        # Takes the first images of each class in the random order.
        labels = train.labels[order]
        by_class = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        rank = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen[by_class] = rank < np.repeat(_shares(counts, number), counts)
    held, kept = np.sort(order[chosen]), np.sort(order[~chosen])
    return cast(Examples, train.take(kept)), cast(Examples, train.take(held))


def _shares(counts: np.ndarray, number: int) -> np.ndarray:
    """Returns how many of each class to hold out, by the method of largest remainders."""
    quotas = number * counts / counts.sum()
    most = np.maximum(counts - 1, 0)  # one of each class remains for training
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
