"""The network that comes with the package."""

import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax import models
from capsjax.data import load, scale_pixels
from capsjax.models.trained import _rounded, rounded, save_pretrained

NAMES = models.pretrained()


def test_there_is_one():
    assert "mnist_small" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_is_small_and_no_pickle(name):
    resource = importlib.resources.files("capsjax.models").joinpath(f"{name}.npz")
    with resource.open("rb") as file:
        assert len(file.read()) < 2e6
        file.seek(0)
        with np.load(file, allow_pickle=False) as stored:
            assert all(stored[key] is not None for key in stored.files)


@pytest.mark.parametrize("name", NAMES)
def test_tells_digits(name):
    about = models.about_pretrained(name)
    network = capsjax.load_pretrained(name)
    digits = load("mnist_5k").test
    predict = jax.jit(lambda images: network(scale_pixels(images)).scores.argmax(-1))
    error = np.mean(predict(jnp.asarray(digits.images)) != digits.labels)
    # A tenth of the test images that the stored error was measured on.
    assert abs(error - about.test_error) < 4 * np.sqrt(about.test_error / 1000) + 1e-3
    assert about.command.startswith("capsjax train")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(network))} == {jnp.dtype(jnp.float32)}


def test_what_is_saved_is_what_is_loaded(tmp_path, monkeypatch):
    network = models.create("small", rngs=nnx.Rngs(0), conv_features=8, decoder_features=(4,))
    about = models.About(
        "small",
        {"conv_features": 8, "decoder_features": (4,)},
        "mnist",
        tuple("0123456789"),
        0.5,
        10,
        "capsjax train",
        "2026-01-01",
    )
    save_pretrained(network, about, tmp_path / "mine.npz")
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    assert models.pretrained() == ("mine",)
    assert models.about_pretrained("mine") == about
    loaded = models.load_pretrained("mine")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(rounded(network)))


def test_rounding_is_to_the_nearest():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_allclose(_rounded(values), values, rtol=2.0**-8 * 1.1)
    np.testing.assert_array_equal(_rounded(np.zeros(3)), 0)


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match="name must be one of mnist_small, got 'mnist_large'"):
        capsjax.load_pretrained("mnist_large")
    with pytest.raises(AttributeError, match="no attribute 'load_trained'"):
        capsjax.load_trained  # noqa: B018
