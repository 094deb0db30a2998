"""A small network and a small part of the embedded digits, so that a run takes seconds."""

import dataclasses

import numpy as np
import pytest

from capsjax.data import Dataset, Split, load
from capsjax.models import CapsNetConfig


@pytest.fixture(scope="session")
def digits() -> Dataset:
    full = load("mnist_5k")

    def some(split: Split, number: int) -> Split:
        chosen = np.random.default_rng(0).permutation(len(split.labels))[:number]
        return Split(split.images[chosen], split.labels[chosen])

    return Dataset("mnist_5k", some(full.train, 180), some(full.test, 101), full.class_names)


@pytest.fixture(scope="session")
def tiny() -> CapsNetConfig:
    """Without a decoder, which with the run's picture is a third of what a run compiles."""
    return CapsNetConfig(
        conv_features=8,
        conv_strides=3,
        primary_types=2,
        primary_features=4,
        primary_kernel=3,
        class_features=4,
        decoder_features=(),
    )


@pytest.fixture(scope="session")
def tiny_with_decoder(tiny) -> CapsNetConfig:
    return dataclasses.replace(tiny, decoder_features=(16,))
