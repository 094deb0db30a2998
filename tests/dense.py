"""Arguments of `dense_capsules`, and its values with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from comparing import assert_close

from capsjax import dense_capsules
from capsjax.bench import CAPSULE_SIZES

CHILDREN, IN_FEATURES, PARENTS, FEATURES = 35, 3, 4, 5
PAPER = CAPSULE_SIZES["paper"].batch, CAPSULE_SIZES["paper"].layer


def arguments(*leading, shape=(CHILDREN, IN_FEATURES, PARENTS, FEATURES), dtype="float32", seed=0):
    """Poses and weights whose votes are of about one."""
    rng = np.random.default_rng(seed)
    poses = rng.normal(size=(*leading, *shape[:2]))
    weights = rng.normal(size=shape) / np.sqrt(shape[1])
    # Converted on the host, which compiles nothing.
    return tuple(jnp.asarray(x.astype(jnp.dtype(dtype))) for x in (poses, weights))


def bias_of(parents=PARENTS, features=FEATURES):
    return jnp.asarray(np.random.default_rng(3).normal(size=(parents, features)), jnp.float32)


def loss(poses, weights, bias=None, **options):
    """Of fixed directions, so that no gradient is zero by symmetry."""
    return loss_and_results(poses, weights, bias, **options)[0]


def loss_and_results(poses, weights, bias=None, **options):
    """The loss, with poses and activations besides."""
    routed = dense_capsules(poses, weights, bias=bias, **options)
    poses, activations = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in routed[:2])
    direction = jnp.cos(jnp.arange(poses.size, dtype=poses.dtype)).reshape(poses.shape)
    return jnp.vdot(poses, direction) + jnp.sum(activations[..., 0]), routed[:2]


STATIC = ("implementation", "num_iterations", "leaky", "stop_gradient")


@functools.partial(jax.jit, static_argnames=STATIC)
def with_gradients(implementation, poses, weights, bias=None, **options):
    function = functools.partial(loss_and_results, implementation=implementation, **options)
    argnums = (0, 1) if bias is None else (0, 1, 2)
    return jax.value_and_grad(function, argnums, has_aux=True)(poses, weights, bias)


def assert_same(actual, expected, dtype, terms):
    """Equal but for rounding to the dtype, relative to the largest number of all."""
    leaves = jax.tree.leaves(expected)
    largest = max(1.0, *(np.abs(np.asarray(x, np.float64)).max(initial=0) for x in leaves))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), leaves, strict=True):
        assert_close(a, b, dtype=dtype, terms=terms, scale=largest)
