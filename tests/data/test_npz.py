"""Data sets in one file, for machines without TFDS."""

import dataclasses
import sys

import numpy as np
import pytest

from capsjax.data import DataError, Pairs, Split, load, save_npz


def test_replaces_the_prepared_set_and_the_sets_made_from_it(tmp_path, monkeypatch):
    digits = dataclasses.replace(load("mnist_5k"), name="mnist")
    path = tmp_path / "digits.npz"
    save_npz(digits, str(path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    mnist = load("mnist", data_dir=path)
    np.testing.assert_array_equal(mnist.train.images, digits.train.images)
    np.testing.assert_array_equal(mnist.test.labels, digits.test.labels)
    assert (mnist.name, mnist.class_names) == ("mnist", digits.class_names)
    pairs = load("multi_mnist", data_dir=path)
    assert pairs.task == Pairs()
    assert pairs.image_shape == (36, 36, 1)
    assert (np.diff(pairs.train.labels) >= 0).all()
    # The same digits, in another order.
    assert pairs.train.images.sum() == digits.train.images.sum()


def test_a_file_replaces_one_set_only(tmp_path):
    path = tmp_path / "digits.npz"
    save_npz(load("mnist_5k"), path)
    for name, expected in (
        ("fashion_mnist", "fashion_mnist"),
        ("affnist", "affnist"),
        ("image_folder", "image_folder"),
        ("multi_mnist", "mnist"),
    ):
        with pytest.raises(DataError, match=f"file must hold {expected}, got mnist_5k"):
            load(name, data_dir=path)
    save_npz(dataclasses.replace(load("mnist_5k"), name="affnist"), path)
    assert load("affnist", data_dir=path).name == "affnist"
    with pytest.raises(ValueError, match=r"path must end in \.npz, got digits"):
        save_npz(load("mnist_5k"), "digits")


def test_pairs_need_two_classes_in_order(tmp_path):
    digits = load("mnist_5k")
    with pytest.raises(ValueError, match="train.labels must be sorted and have several classes"):
        dataclasses.replace(digits, task=Pairs())
    zeros = digits.train.labels == 0
    ones = Split(digits.train.images[zeros], digits.train.labels[zeros])
    path = tmp_path / "zeros.npz"
    save_npz(dataclasses.replace(digits, name="mnist", train=ones), path)
    with pytest.raises(DataError, match="multi_mnist cannot be made from .*train.labels must"):
        load("multi_mnist", data_dir=path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no zip"])
def test_a_missing_or_damaged_file_is_one_line(tmp_path, content):
    path = tmp_path / "digits.npz"
    with pytest.raises(DataError, match=r"mnist cannot be read from .*digits\.npz"):
        load("mnist", data_dir=path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mnist cannot be read from .*digits\.npz") as error:
        load("mnist", data_dir=path)
    assert "\n" not in str(error.value)
