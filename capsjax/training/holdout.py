"""Holding training images out for validation."""

from typing import TypeVar, cast

import numpy as np

from capsjax.data.dataset import AnySplit
from capsjax.errors import ConfigError

Examples = TypeVar("Examples", bound=AnySplit)


def hold_out(
    train: Examples, number: int | None, *, stratified: bool = True
) -> tuple[Examples, Examples | None]:
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
    return cast(Examples, train.take(kept)), cast(Examples, train.take(held))


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
