"""Trained networks in the package."""

import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from capsjax.files import replacing
from capsjax.models.presets import Network, build, configure

_FOLDER = "capsjax.models"
# Bits kept of the ten-bit half-precision mantissa. Zeros in the others compress well and change no
# prediction on the test set.
_BITS = 7


@dataclasses.dataclass(frozen=True)
class About:
    """A description of a trained network.

    Attributes:
      preset: the preset of the network.
      overrides: fields of the configuration that differ from the preset.
      dataset: the data set it was trained and tested on.
      classes: class names.
      test_error: error rate of the stored parameters on the test set.
      test_count: number of test images.
      command: the command that trained it.
      date: date of the training.
    """

    preset: str
    overrides: dict[str, Any]
    dataset: str
    classes: tuple[str, ...]
    test_error: float
    test_count: int
    command: str
    date: str


def pretrained() -> tuple[str, ...]:
    """Returns the names of the networks that :func:`load_pretrained` can load.

    Example:
      >>> from capsjax import models
      >>> models.pretrained()
      ('mnist_small',)
    """
    files = importlib.resources.files(_FOLDER).iterdir()
    return tuple(sorted(f.name.removesuffix(".npz") for f in files if f.name.endswith(".npz")))


def about_pretrained(name: str) -> About:
    """Returns the description of a trained network.

    Example:
      >>> from capsjax import models
      >>> models.about_pretrained("mnist_small").dataset
      'mnist'
    """
    return _read(name)[0]


def load_pretrained(name: str = "mnist_small") -> Network:
    """Loads a trained network of the package.

    :func:`about_pretrained` describes its data set and test error.

    Args:
      name: one of :func:`pretrained`.

    Returns:
      A Flax NNX module with float32 parameters, such as :class:`CapsNet`.

    Raises:
      ValueError: ``name`` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import capsjax
      >>> from capsjax.data import load, scale_pixels
      >>> network = capsjax.load_pretrained()
      >>> digits = load("mnist_5k").test
      >>> images = scale_pixels(jnp.asarray(digits.images[:8]))
      >>> scores = jax.jit(network)(images).scores
      >>> print(scores.argmax(-1), digits.labels[:8])
      [7 2 1 0 4 1 4 9] [7 2 1 0 4 1 4 9]
    """
    about, arrays = _read(name)
    config = configure(about.preset, **about.overrides)
    network: Network = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    state = nnx.state(network)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(np.asarray(arrays[".".join(map(str, path))], np.float32))
    nnx.update(network, state)
    network.eval()
    return network


def rounded(network: Network) -> Network:
    """Rounds the parameters in place, as :func:`save_pretrained` does; returns the network."""
    state = nnx.state(network)
    for _, variable in nnx.to_flat_state(state):
        variable.set_value(_rounded(np.asarray(variable[...])).astype(np.float32))
    nnx.update(network, state)
    return network


def save_pretrained(network: Network, about: About, path: Path) -> None:
    """Writes a network's parameters to a compressed file, rounded to half precision."""
    arrays: dict[str, Any] = {
        ".".join(map(str, key)): _rounded(np.asarray(variable[...]))
        for key, variable in nnx.to_flat_state(nnx.state(network))
    }
    with replacing(path) as file:
        np.savez_compressed(file, about=np.array(json.dumps(dataclasses.asdict(about))), **arrays)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest half-precision numbers whose last bits are zero."""
    bits = values.astype(np.float16).view(np.uint16)
    cut = 10 - _BITS
    rounded = (bits + np.uint16(1 << (cut - 1))) >> cut << cut
    return rounded.astype(np.uint16).view(np.float16)


def _read(name: str) -> tuple[About, dict[str, np.ndarray]]:
    if name not in pretrained():
        raise ValueError(f"name must be one of {', '.join(pretrained())}, got {name!r}")
    resource = importlib.resources.files(_FOLDER).joinpath(f"{name}.npz")
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        values = json.loads(str(stored["about"]))
        arrays = {key: stored[key] for key in stored.files if key != "about"}
    values["classes"] = tuple(values["classes"])
    values["overrides"] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in values["overrides"].items()
    }
    return About(**values), arrays
