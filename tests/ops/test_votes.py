import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import FLOATS, assert_close
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from capsjax import dense_votes, matrix_votes

SIZE = st.integers(1, 5)


@given(
    sizes=st.tuples(SIZE, SIZE, SIZE, SIZE),
    leading=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from(FLOATS),
)
def test_every_pair_has_its_own_matrix(sizes, leading, dtype):
    children, k, parents, d = sizes
    rng = np.random.default_rng(0)
    poses = rng.normal(size=(*leading, children, k)).astype(jnp.dtype(dtype))
    weights = rng.normal(size=(children, k, parents, d)).astype(jnp.dtype(dtype))
    votes = dense_votes(poses, weights)
    flat = poses.astype(np.float64).reshape(-1, children, k)
    expected = [references.dense_votes(p, weights.astype(np.float64)) for p in flat]
    assert votes.dtype == dtype
    assert_close(votes, np.reshape(expected, (*leading, children, parents, d)), terms=k)


def test_dtypes_promote():
    votes = dense_votes(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3, 4, 5)))
    assert votes.dtype == jnp.float32


def test_gradients():
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 4), (3, 4, 2, 5))]
    check_grads(jax.jit(dense_votes), arguments, order=2, eps=1e-2, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("poses", "weights", "match"),
    [
        ((3, 4), (3, 4, 2), r"weights must have shape \[I, K, J, D\], got shape \(3, 4, 2\)"),
        ((5, 4), (3, 4, 2, 2), r"poses must have shape .*\[..., 3, 4\].*got shape \(5, 4\)"),
        ((4,), (3, 4, 2, 2), r"poses must have shape .* got shape \(4,\)"),
    ],
)
def test_wrong_shapes_are_named_while_tracing(poses, weights, match):
    with pytest.raises(ValueError, match=match):
        jax.jit(dense_votes)(jnp.ones(poses), jnp.ones(weights))


def test_wrong_dtypes_are_named():
    with pytest.raises(TypeError, match="poses must be a floating-point array, got dtype int32"):
        dense_votes(jnp.ones((3, 4), int), jnp.ones((3, 4, 2, 2)))
    with pytest.raises(TypeError, match="weights must be a floating-point array"):
        dense_votes(jnp.ones((3, 4)), jnp.ones((3, 4, 2, 2), int))


def test_matrix_votes_are_products_of_matrices():
    rng = np.random.default_rng(0)
    poses, weights = rng.normal(size=(2, 3, 9)), rng.normal(size=(3, 3, 4, 3))
    votes = matrix_votes(jnp.float32(poses), jnp.float32(weights))
    assert votes.shape == (2, 3, 4, 9)
    for b, i, j in np.ndindex(2, 3, 4):
        expected = poses[b, i].reshape(3, 3) @ weights[i, :, j]
        np.testing.assert_allclose(votes[b, i, j].reshape(3, 3), expected, rtol=1e-4, atol=1e-5)


def test_bad_matrices_are_named():
    with pytest.raises(
        ValueError, match=r"weights must have shape \[I, n, J, n\], got .*\(3, 2, 4, 5"
    ):
        matrix_votes(jnp.ones((3, 4)), jnp.ones((3, 2, 4, 5)))
    with pytest.raises(
        ValueError, match=r"poses must have shape .*3, 4\] to match weights .*\(3, 5\)"
    ):
        matrix_votes(jnp.ones((3, 5)), jnp.ones((3, 2, 4, 2)))
