"""Data sets as one file, for machines without TFDS."""

import sys

import numpy as np
import pytest

from capsjax.data import DataError, Pairs, load, save_npz


def test_stands_for_the_prepared_set_and_for_what_is_made_of_it(tmp_path, monkeypatch):
    digits = load("mnist_5k")
    path = tmp_path / "digits.npz"
    save_npz(digits, path)
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


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no zip"])
def test_a_file_that_is_none_is_one_line(tmp_path, content):
    path = tmp_path / "digits.npz"
    with pytest.raises(DataError, match=r"mnist cannot be read from .*digits\.npz"):
        load("mnist", data_dir=path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mnist cannot be read from .*digits\.npz") as error:
        load("mnist", data_dir=path)
    assert "\n" not in str(error.value)
