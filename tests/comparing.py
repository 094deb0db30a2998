"""Tolerances as functions of the dtype and of how many terms were added up."""

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float32", "bfloat16", "float16")


def all_finite(tree):
    """Whether all numbers are finite; on the host, where no program is compiled for it."""
    return all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


def assert_close(actual, expected, *, terms=1, dtype=None, scale=None, **tolerances):
    """Asserts that results in a narrow dtype equal a float64 reference.

    Rounding of n terms that add up grows like √n; sixteen roundings of the dtype, relative to the
    largest expected number, leave room for the operations around the sum.
    """
    expected = np.asarray(expected, np.float64)
    eps = float(jnp.finfo(dtype or jnp.asarray(actual).dtype).eps)
    largest = scale or max(1e-30, float(np.abs(expected).max(initial=0)))
    tolerance = 16 * eps * np.sqrt(terms) * largest
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, **{"rtol": 0, "atol": tolerance, **tolerances}
    )


def assert_gradients(function, *arguments, forward=False, rtol=1e-6):
    """Asserts that gradients are those of differences along one direction, in float64.

    One program gives them all, which is why this is not `jax.test_util.check_grads`: values and
    reverse-mode gradients, and forward-mode ones if asked for.
    """
    rng = np.random.default_rng(7)
    arguments = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
    step = jax.tree.map(lambda x: 1e-6 * rng.normal(size=x.shape), arguments)

    def scalar(arguments):
        leaves = jax.tree.leaves(function(*arguments))
        # Fixed directions, so that no gradient is zero by symmetry.
        return sum(jnp.vdot(jnp.cos(jnp.arange(x.size, dtype=x.dtype)), x.ravel()) for x in leaves)

    @jax.jit
    def program(arguments):
        value, gradient = jax.value_and_grad(scalar)(arguments)
        return value, gradient, jax.jvp(scalar, (arguments,), (step,))[1] if forward else None

    _, gradient, tangent = program(arguments)
    after, before = (
        program(jax.tree.map(lambda x, dx, sign=sign: x + sign * dx, arguments, step))[0]
        for sign in (1, -1)
    )
    expected = (float(after) - float(before)) / 2
    products = jax.tree.map(lambda g, dx: np.vdot(g, dx), gradient, step)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=rtol)
    if forward:
        np.testing.assert_allclose(tangent, expected, rtol=rtol)
