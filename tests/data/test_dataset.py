import dataclasses

import numpy as np
import pytest

from capsjax.data import Cropped, DataError, Dataset, Pairs, Placed, Shifted, Split
from capsjax.data.stored import Names


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
        (
            split(dtype=np.int64),
            split(),
            "train.images must be uint8, uint16 or float32 .*, got int",
        ),
        (Split(split().images - np.float32(1), split().labels), split(), r"\[0, 1\] .* -1.0..-1.0"),
        (split(), Split(split().images * np.float32("nan"), split().labels), r"got nan..nan"),
        (split(), split(3), r"test.labels must lie in 0..1, got 0..2"),
        (split(), split(size=5), "test images must have the shape"),
        (split(), Split(split().images, np.zeros(2, np.int64)), "test.labels must be int32"),
        (split(), Split(split().images, np.zeros(3, np.int32)), r"test.labels must be int32 \[2\]"),
    ],
)
def test_wrong_arrays_are_named(train, test, text):
    with pytest.raises(ValueError, match=text):
        Dataset("tiny", train, test, ("a", "b"))


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (Pairs(3), "images must be at most 3 x 3, the size of the canvas, got 4 x 4"),
        (Placed(3), "images must be at most 3 x 3"),
        (Cropped(5), "images must be at least 5 x 5, the part that is cropped, got 4 x 4"),
    ],
)
def test_images_that_do_not_suit_the_task_are_refused(task, text):
    with pytest.raises(ValueError, match=text):
        Dataset("tiny", split(), split(), ("a", "b"), task)


def test_any_number_of_classes():
    several = Split(split().images, np.array([[True, True], [False, False]]))
    assert Dataset("tiny", several, several, ("a", "b")).has_several_classes
    assert not Dataset("tiny", split(), split(), ("a", "b")).has_several_classes
    for train, names, task, text in (
        (several, ("a", "b", "c"), Pairs(), r"or bool or float32 \[2, 3\], got bool \[2, 2\]"),
        (several, ("a", "b"), Pairs(), "train.labels must be class indices to draw pairs"),
        (split(), ("a", "b"), Shifted(), "labels of both splits must have the same dtype"),
    ):
        with pytest.raises(ValueError, match=text):
            Dataset("tiny", train, several, names, task)


def test_names_of_classes_differ():
    with pytest.raises(ValueError, match="class_names must differ, got 'b' more than once"):
        Dataset("tiny", split(), split(), ("a", "b", "b"))


def test_labels_that_are_no_array_are_named():
    with pytest.raises(TypeError, match="train.labels must be an int32 array, got list"):
        Dataset("tiny", split()._replace(labels=[0, 1]), split(), ("a", "b"))


def test_an_error_is_one_line():
    assert str(DataError("first\n  * second\n")) == "first * second"


def test_many_names_are_a_sequence():
    names = Names(["cat/1.png", "döner.png", "", "dog/2.png"])
    assert list(names) == ["cat/1.png", "döner.png", "", "dog/2.png"]
    assert (names[-1], names[np.int64(1)]) == ("dog/2.png", "döner.png")
    assert list(names[1::2]) == ["döner.png", "dog/2.png"]
    for index in (4, -5):
        with pytest.raises(IndexError):
            names[index]
