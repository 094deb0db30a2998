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
