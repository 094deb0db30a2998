import subprocess
import sys

import numpy as np
import pytest

from capsjax.data import Cropped, DataError, Pairs, Shifted, load, names
from capsjax.data.sources import task_of

from . import conftest


def test_names():
    assert names() == (
        "mnist_5k",
        "mnist",
        "fashion_mnist",
        "kmnist",
        "cifar10",
        "svhn_cropped",
        "smallnorb",
        "multi_mnist",
        "expanded_mnist",
        "affine_mnist",
        "affnist",
        "image_folder",
        "npz",
    )


def test_tasks():
    tasks = (Pairs(), Cropped(24), Shifted(2))
    assert tuple(map(task_of, ("multi_mnist", "cifar10", "mnist_5k"))) == tasks


@pytest.mark.parametrize(
    ("name", "closest"),
    [("mnist5k", "mnist_5k"), ("MNIST", "mnist"), ("fashion-mnist", "fashion_mnist")],
)
def test_an_unknown_name_is_answered_with_the_closest(name, closest):
    with pytest.raises(DataError) as error:
        load(name)
    assert str(error.value) == (
        f"unknown data set {name!r}, expected one of {', '.join(names())}, or tfds:NAME of a "
        f"prepared set; did you mean {closest!r}?"
    )


def test_a_name_unlike_all_others_gets_no_suggestion():
    with pytest.raises(DataError, match="prepared set$"):
        load("zzzz")


def test_options_of_folders_are_refused_elsewhere():
    with pytest.raises(DataError, match="--image-size and --channels are for image_folder and"):
        load("mnist_5k", image_size=28)
    with pytest.raises(DataError, match=r"'own.npz'; load a file as npz with data_dir='own.n"):
        load("own.npz")
    with pytest.raises(DataError, match="npz needs --data-dir"):
        load("npz")


def test_embedded_set_is_balanced():
    dataset = load()
    assert dataset.name == "mnist_5k"
    assert dataset.train.images.shape == (4000, 28, 28, 1)
    assert dataset.test.images.shape == (1000, 28, 28, 1)
    assert np.bincount(dataset.train.labels).tolist() == [400] * 10
    assert np.bincount(dataset.test.labels).tolist() == [100] * 10


@pytest.mark.parametrize(
    ("split", "prefix", "per_class"), [("train", "train", 400), ("test", "t10k", 100)]
)
def test_embedded_set_is_the_first_of_each_class(originals, split, prefix, per_class):
    images = conftest.read_original(originals / "mnist" / f"{prefix}-images-idx3-ubyte.gz")
    labels = conftest.read_original(originals / "mnist" / f"{prefix}-labels-idx1-ubyte.gz")
    ours = getattr(load(), split)
    for digit in range(10):
        expected = images[labels == digit][:per_class]
        np.testing.assert_array_equal(ours.images[ours.labels == digit][..., 0], expected)


def test_import_needs_neither_tfds_nor_pillow():
    code = (
        "import sys; sys.modules.update(tensorflow_datasets=None, PIL=None, requests=None);"
        "from capsjax.data import load; print(load())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Dataset('mnist_5k'")
