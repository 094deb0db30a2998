"""The data set in the package, which needs no download and no TFDS."""

import importlib.resources

import numpy as np

from capsjax.data.dataset import Dataset, Split


def load_mnist_5k() -> Dataset:
    """Returns a balanced subset of MNIST with 4000 training and 1000 test images of 28x28x1.

    It holds the first 400 images of each digit of MNIST's train split and the first 100 of each
    digit of its test split. MNIST is by Yann LeCun, Corinna Cortes and Christopher J.C. Burges; its
    licence is commonly stated as CC BY-SA 3.0.

    Example:
      >>> from capsjax.data import load
      >>> digits = load("mnist_5k")
      >>> digits
      Dataset('mnist_5k': 4000 train and 1000 test images of 28x28x1, 10 classes)
      >>> print(digits.train.labels[:5])
      [5 0 4 1 9]
    """
    resource = importlib.resources.files("capsjax.data").joinpath("mnist_5k.npz")
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        train, test = (
            Split(stored[f"{name}_images"][..., None], stored[f"{name}_labels"].astype(np.int32))
            for name in ("train", "test")
        )
    return Dataset("mnist_5k", train, test, class_names=tuple("0123456789"))
