"""Object discovery: two slots separate two overlapping digits, without labels.

The features at all positions vote for two capsules, between which attention routing divides them.
Each capsule draws a shape no larger than a digit and moves it; both drawings reconstruct the
picture. Most drawings show one digit, blurred. Run: python examples/object_discovery.py
After Locatello et al., *Object-Centric Learning with Slot Attention*, NeurIPS 2020.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from capsjax.data import load
from capsjax.nn import DenseCapsules


def place(shapes, corners):
    """Places shapes ``[..., 20, 20]`` at corners ``[..., 2]`` of canvases ``[..., 40, 40]``."""
    away = jnp.arange(40)[:, None] - jnp.arange(20) - corners[..., None, None]
    rows, columns = jnp.moveaxis(nnx.relu(1 - jnp.abs(away)), -3, 0)  # linear interpolation
    return rows @ shapes @ columns.mT


def pairs(key, images, number):
    """Draws two digits at random positions, ``[B, 2, 40, 40]``, and the picture of both."""
    digits = images[jax.random.randint(key, (number, 2), 0, len(images))]
    digits = place(digits, jax.random.randint(jax.random.fold_in(key, 1), (number, 2, 2), 0, 21))
    return digits, digits.sum(1).clip(0, 1)


class Slots(nnx.Module):
    """Maps pictures ``[B, 40, 40]`` to the slots' drawings ``[B, 2, 40, 40]`` and their error."""

    def __init__(self, rngs):
        convs = nnx.Conv(1, 64, (8, 8), 4, rngs=rngs), nnx.Conv(64, 64, (3, 3), rngs=rngs)
        self.encoder = nnx.Sequential(convs[0], nnx.relu, convs[1], nnx.relu)
        self.slots = DenseCapsules(100, 64, 2, 24, routing="attention", rngs=rngs)
        self.hidden, self.shape = nnx.Linear(24, 256, rngs=rngs), nnx.Linear(256, 400, rngs=rngs)
        self.corner = nnx.Linear(24, 2, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, pictures):
        """Encodes, routes, draws."""
        poses = self.slots(self.encoder(pictures[..., None]).reshape(-1, 100, 64)).poses
        shapes = nnx.sigmoid(self.shape(nnx.relu(self.hidden(poses))) - 2)  # dark at first
        # One slot starts on the left and one on the right; otherwise both learn the same.
        corners = 10 + 10 * jnp.tanh(self.corner(poses) + jnp.array([[[0, -0.5], [0, 0.5]]]))
        drawings = place(shapes.reshape(-1, 2, 20, 20), corners)
        return drawings, jnp.square(1 - (1 - drawings).prod(1) - pictures).mean()


def separation(layers, digits):
    """Share of one digit's pixels that are in the layer of that digit, for the best matching."""
    first, second = digits[:, 0] > 0.5, digits[:, 1] > 0.5
    correct = ((layers[:, 0] > layers[:, 1]) == first).mean((1, 2), where=first != second)
    return jnp.maximum(correct, 1 - correct).mean()


@nnx.jit
def step(model, optimizer, images, key):
    """One update on 64 new pictures."""
    optimizer.update(model, nnx.grad(lambda model: model(pairs(key, images, 64)[1])[1])(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    steps, data, model = parser.parse_args().steps, load("mnist_5k"), Slots(nnx.Rngs(0))
    train, test = (jnp.array(s.images[:, 4:24, 4:24, 0] / 255.0) for s in (data.train, data.test))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    for number in range(steps):
        step(model, optimizer, train, jax.random.key(number))
    digits, pictures = pairs(jax.random.key(steps), test, 1000)
    drawings, error = nnx.jit(Slots.__call__)(model, pictures)
    left = (jnp.cumsum(pictures.sum(1), -1) < pictures.sum((1, 2))[:, None] / 2)[:, None]
    slots, halves = (separation(x, digits) for x in (drawings, jnp.stack([left, ~left], 1)))
    print(f"squared error {error:.4f}; correct pixels: slots {slots:.1%}, halves {halves:.1%}")
