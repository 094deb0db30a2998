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
    with pytest.raises(TypeError, match="dataset must be a Dataset, got 3"):
        save_npz(3, path)
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        load(3)


ARRAYS = {
    "train_images": np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3),
    "train_labels": np.array([[0], [2], [1], [2]], np.int64),
    "test_images": np.zeros((2, 2, 3), np.uint8),
    "test_labels": np.array([1.0, 0.0]),
}


def stored(path, **changes):
    arrays = {**ARRAYS, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_own_arrays(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    stored(tmp_path / "own.npz")
    dataset = load("npz", data_dir="~/own.npz")
    assert (dataset.name, dataset.class_names) == ("own", ("0", "1", "2"))
    assert dataset.image_shape == (2, 3, 1)
    assert dataset.train.labels.tolist() == [0, 2, 1, 2]
    np.testing.assert_array_equal(dataset.train.images[..., 0], ARRAYS["train_images"])
    assert dataset.train.images.dtype == np.uint8
    save_npz(dataset, "~/again.npz")
    again = load("npz", data_dir=tmp_path / "again.npz")
    assert (again.name, again.class_names) == ("own", dataset.class_names)


@pytest.mark.parametrize(
    ("dtype", "loaded"), [(">u2", np.uint16), ("float64", np.float32), ("float16", np.float32)]
)
def test_images_of_other_dtypes(tmp_path, dtype, loaded, caplog):
    images = (ARRAYS["train_images"] / (1 if dtype == ">u2" else 32)).astype(dtype)
    path = stored(
        tmp_path / "a.npz", train_images=images, val_images=images, class_names=["a", "b", "c"]
    )
    dataset = load("npz", data_dir=path)
    assert dataset.train.images.dtype == loaded
    np.testing.assert_array_equal(dataset.train.images[..., 0], images)
    assert dataset.class_names == ("a", "b", "c")
    assert f"npz does not use the arrays val_images in {path}" in caplog.text


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"train_labels": None, "y": [1]},
            "must hold the arrays train_images, train_labels, test_images, test_labels, and may"
            " hold class_names: train_labels missing, got train_images, test_images, test_labels,"
            " y",
        ),
        (
            {"train_images": np.zeros((4, 2))},
            r"train.images must be .* \[N, H, W, C\], got float32",
        ),
        ({"train_images": np.full((4, 2, 3), 255.0)}, r"must lie in \[0, 1\] as float32, got 255"),
        ({"train_images": np.zeros((4, 2, 3), int)}, "train.images must be uint8, uint16 or float"),
        ({"train_images": np.zeros((3, 2, 3), np.uint8)}, r"train.labels must be int32 \[3\]"),
        ({"test_labels": [0.5, np.nan]}, r"test_labels must be class indices.* float64 \[2\] such"),
        ({"test_labels": ["cat", "dog"]}, r"test_labels must be class .*\['cat', 'dog'\]"),
        ({"test_labels": [0, 2**40]}, "test_labels must be class indices"),
        ({"test_labels": [[0, 2], [1, 1]]}, r"test_labels of shape \[2, 2\] must be 0 or 1, got"),
        ({"test_labels": [0, -1]}, r"test.labels must lie in 0..2, got -1..0"),
        (
            {"test_labels": [0, 10**9]},
            "must hold class_names, as the labels of 6 images go up to 1",
        ),
        ({"class_names": ["a"]}, r"train.labels must lie in 0..0, got 0..2"),
    ],
)
def test_arrays_that_are_no_data_set_are_one_line(tmp_path, changes, match):
    path = stored(tmp_path / "own.npz", **changes)
    with pytest.raises(DataError, match=match) as error:
        load("npz", data_dir=path)
    assert "\n" not in str(error.value)


def test_any_number_of_classes_in_an_image(tmp_path):
    labels = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    path = stored(tmp_path / "mnist.npz", train_labels=labels, test_labels=labels[:2] * 1.0)
    dataset = load("npz", data_dir=path)
    assert (dataset.train.labels == (labels == 1)).all()
    assert dataset.class_names == ("0", "1", "2")
    with pytest.raises(DataError, match="multi_mnist cannot be made from .* several classes for"):
        load("multi_mnist", data_dir=path)


def test_large_images_are_not_put_on_a_small_canvas(tmp_path):
    images = np.zeros((2, 300, 300), np.uint8)
    path = stored(
        tmp_path / "mnist.npz",
        train_images=images,
        train_labels=[0, 1],
        test_images=images,
        test_labels=[0, 1],
    )
    for name in ("multi_mnist", "expanded_mnist"):
        with pytest.raises(DataError, match=f"{name} cannot be made .* at most .*, got 300 x 300"):
            load(name, data_dir=path)


def test_saving_leaves_other_files_alone(tmp_path, monkeypatch):
    kept = tmp_path / "digits.tmp"
    kept.write_text("mine")
    path = tmp_path / "digits.npz"
    save_npz(load("mnist_5k"), path)
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_npz(load("mnist_5k"), path)
    assert kept.read_text() == "mine"
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"digits.tmp", "digits.npz"}


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
