"""Routing as the pooling layer of a Vision Transformer.

The same tiny transformer is trained twice on 4,000 digits: with a linear layer over the mean of its
16 tokens, and with routing. There every token votes for every class, and the length of a class
capsule is the score. Run: python examples/vit_pooling.py
The transformer follows Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from capsjax.data import load, random_shift, scale_pixels
from capsjax.nn import DenseCapsules

TOKENS, WIDTH, CLASSES, BATCH = 16, 64, 10, 64


class ViT(nnx.Module):
    """Tokens ``[B, 16, 64]`` of patches, two pre-norm transformer blocks, and a head."""

    def __init__(self, head: nnx.Module, rngs: nnx.Rngs):
        self.embed = nnx.Conv(1, WIDTH, (7, 7), strides=7, rngs=rngs)
        self.positions = nnx.Param(0.02 * rngs.params.normal((1, TOKENS, WIDTH)))
        self.residuals = nnx.List([])
        for _ in range(2):
            attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
            up, down = nnx.Linear(WIDTH, 256, rngs=rngs), nnx.Linear(256, WIDTH, rngs=rngs)
            for layers in ([attention], [up, nnx.gelu, down]):
                self.residuals.append(nnx.Sequential(nnx.LayerNorm(WIDTH, rngs=rngs), *layers))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = head

    def __call__(self, images):
        """Applies the network to images ``[B, 28, 28, 1]``."""
        tokens = self.embed(images).reshape(-1, TOKENS, WIDTH) + self.positions[...]
        for residual in self.residuals:
            tokens = tokens + residual(tokens)
        return self.head(self.norm(tokens))


@nnx.jit
def step(model, optimizer, images, labels, key):
    """One update on a random batch, each digit shifted by up to two pixels."""
    keys = jax.random.split(key, BATCH + 1)
    rows = jax.random.randint(keys[0], (BATCH,), 0, len(images))
    batch, targets = random_shift(keys[1:], scale_pixels(images[rows]), max_shift=2), labels[rows]

    def loss(model):
        logits = model(batch)
        if isinstance(model.head, DenseCapsules):
            logits = 8 * logits.activations  # lengths are below 1; a margin loss does not train
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    optimizer.update(model, nnx.grad(loss)(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps of each training")
    steps, data = parser.parse_args().steps, load("mnist_5k")
    train, test = (jax.tree.map(jnp.asarray, split) for split in (data.train, data.test))
    mean = nnx.Sequential(lambda x: x.mean(axis=1), nnx.Linear(WIDTH, CLASSES, rngs=nnx.Rngs(1)))
    # Only the reference implementation returns the couplings.
    routed = DenseCapsules(TOKENS, WIDTH, CLASSES, 16, rngs=nnx.Rngs(1), implementation="reference")
    for name, head in (("mean", mean), ("capsule", routed)):
        model = ViT(head, nnx.Rngs(0))
        schedule = optax.cosine_decay_schedule(1e-3, steps)
        optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=0.05), wrt=nnx.Param)
        for number in range(steps):
            step(model, optimizer, *train, jax.random.key(number))
        found = nnx.jit(ViT.__call__)(model, scale_pixels(test.images))
        scores = found.activations if name == "capsule" else found
        print(f"{name} pooling: test error {(scores.argmax(-1) != test.labels).mean():.1%}")
    own = found.coupling[jnp.arange(len(test.labels)), :, test.labels].sum(-1).mean()
    print(f"routing gives the digit's own class {own:.1f} of {TOKENS} tokens, chance is 1.6")
