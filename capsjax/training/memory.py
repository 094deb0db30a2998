"""Estimates the memory of training from shapes, before anything is built."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from capsjax import models
from capsjax.machine import machine_memory
from capsjax.training.drivers import Driver
from capsjax.training.step import Apply, Variables, split_abstract


class Memory(NamedTuple):
    """Bytes that training takes: on one device, or in total for CPU devices, which share memory.

    The estimate is made from shapes. The compiler's temporaries add to it, and fusion saves some.

    Attributes:
      num_parameters: number of parameters of one network.
      state: bytes of parameters, gradients and the optimizer's state.
      activations: bytes that the forward pass keeps for the backward pass.
      examples: bytes of the training images.
      limit: bytes available, or None if unknown.
    """

    num_parameters: int
    state: int
    activations: int
    examples: int
    limit: int | None

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.state + self.activations + self.examples

    @property
    def fits(self) -> bool:
        """Whether it fits; True if the limit is unknown."""
        return self.limit is None or self.total <= self.limit

    def __str__(self) -> str:
        """Describes the estimate in one line, and warns in a second one if it does not fit."""
        limit = "" if self.limit is None else f" of {_gigabytes(self.limit)}"
        line = (
            f"{self.num_parameters:,} parameters; training takes about {_gigabytes(self.total)}"
            f"{limit} of memory, estimated from shapes: parameters, gradients and optimizer"
            f" state {_gigabytes(self.state)}, activations {_gigabytes(self.activations)}, training"
            f" images {_gigabytes(self.examples)}"
        )
        if not self.fits:
            line += (
                "\nwarning: this does not fit; a smaller --batch-size needs less for activations,"
                " and --preset large_images has few parameters at any image size"
            )
        return line


def estimate_memory(
    model: models.ModelConfig,
    driver: Driver,
    *,
    batch_size: int,
    examples: int = 0,
    num_seeds: int = 1,
    optimizer: optax.GradientTransformation | None = None,
) -> Memory:
    """Estimates the memory of training by tracing the network, without computing anything.

    Args:
      model: the network's configuration.
      driver: where training runs.
      batch_size: examples per step, over all devices.
      examples: bytes of the training images.
      num_seeds: number of runs that train together.
      optimizer: an optax transformation; when None, Adam.

    Example:
      >>> from capsjax import models
      >>> from capsjax.training import estimate_memory, make_driver
      >>> model = models.configure("large_images", image_shape=(224, 224, 3))
      >>> memory = estimate_memory(model, make_driver("jit"), batch_size=32)
      >>> memory.num_parameters, memory.state
      (469312, 7508996)
    """
    devices = len(driver.devices)
    apply, shapes = split_abstract(model)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    kept = jax.eval_shape((optimizer or optax.adam(0.0)).init, shapes.params)
    state = 2 * _bytes(shapes.params) + _bytes(kept)
    activations = _activations(apply, model, -(-batch_size // devices))
    # Virtual CPU devices share the machine's memory.
    here = driver.local_devices
    share = len(here) if here[0].platform == "cpu" else 1
    return Memory(
        num_parameters,
        share * num_seeds * state,
        share * num_seeds * activations,
        share * examples,
        device_memory(here[0]),
    )


@functools.lru_cache(maxsize=64)
def _activations(apply: Apply, model: models.ModelConfig, batch_size: int) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    _, (params, batch_stats) = split_abstract(model)

    def kept(params: chex.ArrayTree, batch_stats: chex.ArrayTree, images: jax.Array) -> object:
        def forward(params: chex.ArrayTree) -> list[jax.Array]:
            target = jnp.zeros((batch_size, model.num_classes))
            keys = jax.random.split(jax.random.key(0), batch_size)
            variables = Variables(params, batch_stats)
            prediction, _ = apply(variables, images, train=True, target=target, keys=keys)
            return jax.tree.leaves((prediction.scores, prediction.reconstruction))

        return jax.vjp(forward, params)[1]

    images = jax.ShapeDtypeStruct((batch_size, *model.image_shape), jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(kept, params, batch_stats, images))
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}  # also kept, but not copied
    return _bytes([x for x in leaves if x.shape not in shapes])


def _bytes(arrays: chex.ArrayTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def device_memory(device: jax.Device) -> int | None:
    """Bytes of memory of a device, or of the machine for a CPU; None if unknown."""
    if device.platform == "cpu":
        return machine_memory()
    limit: int | None = (device.memory_stats() or {}).get("bytes_limit")
    return limit


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
