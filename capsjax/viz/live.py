"""The explorer's network: answers the page's requests with JSON values."""

import base64
import io
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capsjax.data import scale_pixels
from capsjax.training import TrainedNetwork
from capsjax.viz.anatomy import Anatomy, check_traced, dissect
from capsjax.viz.draw import diagram_of, overlay, save
from capsjax.viz.perturb import decoder_of, reconstruct
from capsjax.viz.theme import ThemeName


class Live:
    """Serves one trained network to any number of threads, one computation at a time.

    Args:
      loaded: the network and the data set of a run.

    Raises:
      ValueError: the network has no decoder, or its routing cannot be traced.
    """

    def __init__(self, loaded: TrainedNetwork):
        self.network = check_traced(loaded.network)
        decoder_of(self.network)
        self.dataset, self.test = loaded.dataset, loaded.test
        self.step = loaded.step
        self._lock = threading.Lock()
        # Compiles both functions, so that the first request is as fast as the others.
        self.look(np.zeros(self.network.config.image_shape, np.uint8))
        self.decode([0.0] * self.network.config.class_features, 0)

    def about(self) -> dict[str, Any]:
        """Returns the description that the page starts with."""
        config = self.network.config
        return {
            "dataset": self.dataset.name,
            "classes": list(self.dataset.class_names),
            "shape": list(config.image_shape),
            "grid": list(config.grid),
            "types": config.primary_types,
            "features": config.class_features,
            "iterations": config.num_iterations,
            "test_images": len(self.test.labels),
            "labels": self.test.labels.tolist(),
            "step": self.step,
        }

    def test_image(self, index: int, other: int | None = None) -> np.ndarray:
        """Returns a test image, or two overlaid test images, in the data set's dtype."""
        images = self.test.images
        for number in (index, other):
            if number is not None and not 0 <= number < len(images):
                raise ValueError(f"test image must be from 0 to {len(images) - 1}, got {number}")
        return images[index] if other is None else overlay(images[index], images[other])

    def _anatomy(self, image: np.ndarray) -> Anatomy:
        shape = self.network.config.image_shape
        if image.shape != shape:
            got, expected = (" x ".join(map(str, s)) for s in (image.shape, shape))
            raise ValueError(f"image must be {expected} pixels, got {got}")
        return dissect(self.network, scale_pixels(jnp.asarray(image)))

    def look(self, image: np.ndarray) -> dict[str, Any]:
        """Returns the network's results for an image ``[H, W, C]``, and its pixels as 0 to 255."""
        with self._lock:
            anatomy = self._anatomy(image)
            number = anatomy.poses.shape[0]
            each = reconstruct(
                self.network,
                jnp.broadcast_to(anatomy.poses, (number, *anatomy.poses.shape)),
                jnp.arange(number),
            )
        return {
            "pixels": _pixels(scale_pixels(jnp.asarray(image))).ravel().tolist(),
            "lengths": _values(anatomy.lengths),
            "poses": _values(anatomy.poses),
            "coupling": _values(anatomy.trace.coupling),
            "activations": _values(anatomy.trace.activations),
            "reconstructions": _pixels(each).reshape(number, -1).tolist(),
        }

    def decode(self, pose: list[float], parent: int) -> list[int]:
        """Returns the reconstruction from one class capsule, as pixels from 0 to 255."""
        config = self.network.config
        values = np.asarray(pose, np.float32)
        if values.shape != (config.class_features,) or not np.isfinite(values).all():
            raise ValueError(f"pose must be {config.class_features} finite numbers, got {pose}")
        if not isinstance(parent, int) or not 0 <= parent < config.num_classes:
            raise ValueError(f"class must be from 0 to {config.num_classes - 1}, got {parent}")
        poses = np.zeros((config.num_classes, config.class_features), np.float32)
        poses[parent] = values
        with self._lock:
            image = reconstruct(self.network, jnp.asarray(poses), jnp.asarray(parent))
        pixels: list[int] = _pixels(image).ravel().tolist()
        return pixels

    def diagram(self, image: np.ndarray, classes: list[int] | None, theme: ThemeName) -> str:
        """Returns the routing diagram of an image as SVG."""
        with self._lock:
            anatomy = self._anatomy(image)
            figure = diagram_of(
                self.network,
                anatomy,
                class_names=self.dataset.class_names,
                classes=classes,
                num_children=6,
                theme=theme,
            )
            buffer = io.StringIO()
            save(figure, buffer)
        return buffer.getvalue()

    def decoder_weights(self) -> list[dict[str, Any]]:
        """Returns the decoder's parameters in base64, for a page that works without a server."""
        weights = []
        for layer in decoder_of(self.network).layers:
            assert layer.bias is not None  # all layers of the decoder have a bias
            kernel, bias = layer.kernel[...], layer.bias[...]
            weights.append(
                {"shape": list(kernel.shape), "kernel": _base64(kernel), "bias": _base64(bias)}
            )
        return weights


def _values(array: jax.Array) -> Any:
    """Converts an array to nested lists of numbers with seven digits, as many as float32 holds."""
    flat = np.asarray(array, np.float32)
    return np.array([float(f"{x:.7g}") for x in flat.ravel()]).reshape(flat.shape).tolist()


def _pixels(array: jax.Array) -> np.ndarray:
    return np.round(np.clip(np.asarray(array, np.float32), 0, 1) * 255).astype(np.uint8)


def _base64(array: jax.Array) -> str:
    return base64.b64encode(np.asarray(array, "<f4").tobytes()).decode()
