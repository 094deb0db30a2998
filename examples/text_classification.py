"""Text classification with capsules, in pure functions: which library does a docstring belong to?

Every word votes for every library, and its couplings show which library it supports. Leaky routing
lets a word support none. Run: python examples/text_classification.py
Zhao et al., *Investigating Capsule Networks with Dynamic Routing for Text Classification*, 2018.
"""

import argparse
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capsjax import dynamic_routing, margin_loss

MODULES = {
    "python": "argparse asyncio datetime inspect itertools json math os random shutil threading",
    "numpy": "numpy numpy.fft numpy.linalg numpy.ma numpy.polynomial numpy.random",
    "jax": "jax jax.lax jax.nn jax.numpy jax.random jax.scipy.special jax.tree_util",
    "flax": "flax.linen flax.nnx flax.traverse_util",
    "optax": "optax optax.contrib optax.losses optax.projections optax.tree",
}
SIZE, ADAM, NAMES = 24, optax.adam(5e-3), {*MODULES, "np", "jnp", "lax", "linen", "nnx", "xla"}


def docstrings():
    """Returns each docstring's first words, without names of libraries, and its library."""
    found = {}
    for label, names in enumerate(MODULES.values()):
        for module in map(importlib.import_module, names.split()):
            for item in filter(callable, vars(module).values()):
                words = re.findall("[a-z]+", (item.__doc__ or "").lower())
                found.setdefault(tuple(w for w in words if w not in NAMES)[:SIZE], set()).add(label)
    texts = sorted(text for text, labels in found.items() if text and len(labels) == 1)
    return texts, np.eye(len(MODULES), dtype=np.float32)[[min(found[text]) for text in texts]]


def route(params, ids):
    """Routes word ids ``[B, T]``, padded with 0, to libraries ``[B, J]``."""
    votes = jnp.einsum("btk,kjd->btjd", params["embedding"][ids], params["transform"])
    return dynamic_routing(votes, where=ids > 0, leaky=True)


@jax.jit
def step(params, state, ids, targets):
    """One update of the parameters and of Adam's state on the margin loss of a batch."""
    grads = jax.grad(lambda p: margin_loss(route(p, ids).activations, targets).mean())(params)
    updates, state = ADAM.update(grads, state)
    return optax.apply_updates(params, updates), state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    steps, (texts, targets) = parser.parse_args().steps, docstrings()
    random = np.random.default_rng(0)
    train, test = np.split(random.permutation(len(texts)), [len(texts) * 4 // 5])
    words = ["(none)", "(unknown)", *sorted({word for row in train for word in texts[row]})]
    index = {word: i for i, word in enumerate(words)}
    ids = np.array([[index.get(w, 1) for w in t] + [0] * (SIZE - len(t)) for t in texts])
    params = {"embedding": 0.3 * random.normal(size=(len(words), 32))}
    params["transform"] = 0.1 * random.normal(size=(32, len(MODULES), 8))
    state = ADAM.init(params)
    for rows in random.choice(train, (steps, 64)):
        unknown = (random.random((64, SIZE)) < 0.5) & (ids[rows] > 0)  # against overfitting
        params, state = step(params, state, np.where(unknown, 1, ids[rows]), targets[rows])
    _, lengths, coupling = jax.jit(route)(params, ids[test])
    bags = np.stack([np.bincount(row, minlength=len(words)) for row in ids]).astype(np.float32)
    ridge = bags[train].T @ bags[train] + np.eye(len(words), dtype=np.float32)
    linear = bags[test] @ np.linalg.solve(ridge, bags[train].T @ targets[train])
    found = {"capsules": lengths, "ridge": linear, "most frequent": targets[train].mean(0)}
    for name, scores in found.items():
        print(f"{name}: test error {(scores.argmax(-1) != targets[test].argmax(-1)).mean():.1%}")
    for j, library in enumerate(MODULES):
        support = np.bincount(ids[test].ravel(), (coupling[..., j] - coupling.mean(-1)).ravel())
        print(f"{library}:", *(words[i] for i in support.argsort()[:-7:-1]))
