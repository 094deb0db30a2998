import dataclasses

import numpy as np
import pytest

from capsjax.data import DataError, Dataset, Split


def split(number=2, size=4, dtype=np.uint8):
    return Split(np.zeros((number, size, size, 1), dtype), np.arange(number, dtype=np.int32))


def test_properties():
    dataset = Dataset("tiny", split(), split(), ("a", "b"))
    assert dataset.num_classes == 2
    assert dataset.image_shape == (4, 4, 1)
    assert repr(dataset) == "Dataset('tiny': 2 train and 2 test images of 4x4x1, 2 classes)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.name = "other"


@pytest.mark.parametrize(
    ("train", "test", "text"),
    [
        (split(dtype=np.float32), split(), "train.images must be uint8"),
        (split(), split(3), r"test.labels must lie in 0..1, got 0..2"),
        (split(), split(size=5), "test images must have the shape"),
        (split(), Split(split().images, np.zeros(2, np.int64)), "test.labels must be int32"),
        (split(), Split(split().images, np.zeros(3, np.int32)), r"test.labels must be int32 \[2\]"),
    ],
)
def test_wrong_arrays_are_named(train, test, text):
    with pytest.raises(ValueError, match=text):
        Dataset("tiny", train, test, ("a", "b"))


def test_labels_that_are_no_array_are_named():
    with pytest.raises(TypeError, match="train.labels must be an int32 array, got list"):
        Dataset("tiny", split()._replace(labels=[0, 1]), split(), ("a", "b"))


def test_an_error_is_one_line():
    assert str(DataError("first\n  * second\n")) == "first * second"
