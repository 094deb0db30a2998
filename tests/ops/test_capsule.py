import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import FLOATS, all_finite, assert_close
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from capsjax import exponential_squash, length, squash
from capsjax.ops.capsule import squash_channels


@pytest.mark.parametrize("dtype", FLOATS)
def test_squash_is_the_paper_s_formula(dtype):
    s = np.random.default_rng(0).normal(size=(5, 7, 8)).astype(jnp.dtype(dtype))
    v = squash(s)
    assert v.dtype == dtype
    assert_close(v, references.squash(s.astype(np.float64)), terms=8)


def test_squash_of_a_unit_vector_is_one_half():
    v = squash(jnp.array([[1.0, 0, 0], [0.6, 0, 0.8]]))
    np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 0.5, rtol=1e-6)


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.sampled_from([1e-4, 1.0, 50.0]),
)
def test_squash_and_length_over_shapes_axes_and_dtypes(shape, data, dtype, magnitude):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    s = np.random.default_rng(1).normal(size=shape) * magnitude
    s = s.astype(jnp.dtype(dtype))
    exact = s.astype(np.float64)
    v, lengths = jax.jit(lambda s: (squash(s, axis), length(s, axis)))(s)
    assert v.shape == s.shape
    assert v.dtype == lengths.dtype == dtype
    assert_close(v, references.squash(exact, axis), terms=s.shape[axis], scale=1.0)
    assert_close(lengths, np.linalg.norm(exact, axis=axis), terms=s.shape[axis])
    # Shorter than one in exact arithmetic; rounding of a long vector may reach it.
    longest = np.linalg.norm(np.asarray(v, np.float32), axis=axis).max()
    assert longest <= 1 + float(jnp.finfo(dtype).eps)


def test_squash_runs_over_the_given_axis():
    s = jnp.array([[3.0, 0], [4.0, 1.0]])
    np.testing.assert_allclose(squash(s, 0)[:, 0], np.array([3, 4]) / 5 * 25 / 26, rtol=1e-6)
    np.testing.assert_allclose(squash(s, 0)[:, 1], [0, 0.5], rtol=1e-6)


@functools.cache
def with_gradient(function):
    """The function's results, and the gradient of their sum, as one program."""

    def loss(s):
        out = function(s)
        return out.astype(jnp.float32).sum(), out

    @jax.jit
    def both(s):
        gradient, out = jax.grad(loss, has_aux=True)(s)
        return out, gradient

    return both


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("function", [squash, length])
@pytest.mark.parametrize("value", [0.0, 1e-8, 1e4])
def test_values_and_gradients_are_finite(dtype, function, value):
    s = np.full((3, 8), value).astype(jnp.dtype(dtype))
    out, gradient = with_gradient(function)(s)
    assert all_finite((out, gradient))
    if not s.any():  # 1e-8 is zero in float16
        np.testing.assert_array_equal(out, 0)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("function", [squash, length])
def test_a_zero_vector_among_others_harms_none(function):
    s = jnp.array([[0.0, 0, 0], [1.0, 2, 3]])
    gradient = jax.jit(jax.grad(lambda s: function(s).sum()))
    alone = gradient(s[1:])
    np.testing.assert_array_equal(gradient(s)[0], 0)
    np.testing.assert_allclose(gradient(s)[1:], alone, rtol=1e-6)
    # Forward mode and second derivatives too.
    assert jnp.isfinite(jax.jvp(function, (s,), (jnp.ones_like(s),))[1]).all()
    assert jnp.isfinite(jax.jit(jax.hessian(lambda s: function(s).sum()))(s)).all()


@pytest.mark.parametrize("function", [squash, length, exponential_squash])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_spoils_no_other_vector(function, value):
    s = np.array([[value, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], np.float32)
    run = with_gradient(function)
    out, gradient = map(np.asarray, run(s))
    expected = np.inf if function is length and np.isinf(value) else np.nan
    np.testing.assert_array_equal(out[0], np.full_like(out[0], expected))
    assert np.isnan(gradient[0, 0])
    # Beside a vector that is finite; its program is the same.
    np.testing.assert_array_equal(out[1:], run(np.concatenate([s[2:], s[1:]]))[0][1:])
    assert np.isfinite(gradient[1:]).all()


def test_the_direction_of_a_vector_too_long_to_measure_is_not_zero():
    assert jnp.isnan(exponential_squash(jnp.array([1e20, 1.0]))).all()


def test_long_vectors_approach_length_one():
    long = jnp.full((1, 4), 1e15)
    np.testing.assert_allclose(length(squash(long)), 1, rtol=1e-6)
    np.testing.assert_allclose(length(squash(long, epsilon=1e-7)), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_under_strict_dtype_promotion(dtype):
    s = jnp.ones((2, 3), dtype)
    with jax.numpy_dtype_promotion("strict"):
        assert squash(s, epsilon=1e-7).dtype == squash(s).dtype == length(s).dtype == dtype


@pytest.mark.parametrize("function", [squash, length])
def test_gradients(function):
    s = jax.random.normal(jax.random.key(0), (3, 4))
    check_grads(
        jax.jit(function), (s,), order=2, modes=("fwd", "rev"), eps=1e-2, atol=1e-2, rtol=1e-2
    )


def test_epsilon_is_added_under_the_square_root():
    s = np.random.default_rng(2).normal(size=(3, 5))
    squared = (s**2).sum(-1, keepdims=True)
    expected = squared / (1 + squared) * s / np.sqrt(squared + 0.5)
    assert_close(squash(s.astype(np.float32), epsilon=0.5), expected, terms=5)
    gradient = jax.grad(lambda s: squash(s, epsilon=1e-7).sum())(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("function", [squash, length])
def test_bad_arguments_are_named_while_tracing(function):
    with pytest.raises(TypeError, match="must be a floating-point array, got dtype int32"):
        jax.jit(function)(jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="axis 2 is out of bounds"):
        function(jnp.ones((2, 3)), 2)


def test_negative_epsilon():
    with pytest.raises(ValueError, match="epsilon must be at least 0, got -1"):
        squash(jnp.ones(3), epsilon=-1)
    with pytest.raises(ValueError, match="epsilon must be at least 0, got -1"):
        squash(jnp.ones(3), epsilon=np.array(-1.0))


def test_epsilon_may_be_traced():
    s = jax.random.normal(jax.random.key(0), (3, 5))
    for epsilon in (0.0, 0.5):
        expected = squash(s, epsilon=epsilon)
        np.testing.assert_allclose(jax.jit(squash)(s, epsilon=epsilon), expected, rtol=1e-6)
        zero, back = jax.vjp(lambda s, epsilon=epsilon: jax.jit(squash)(s, epsilon=epsilon), 0 * s)
        np.testing.assert_array_equal(zero, 0)
        np.testing.assert_array_equal(back(s)[0], 0)
        variable = nnx.Param(jnp.float32(epsilon))
        for function in (squash, jax.jit(squash)):
            np.testing.assert_allclose(function(s, epsilon=variable), expected, rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        s = np.random.default_rng(3).normal(size=(2, 8))
        np.testing.assert_allclose(squash(s), references.squash(s), rtol=1e-14)
        assert length(s).dtype == np.float64


def squashed(channels):
    """Capsules of three neighbouring channels each."""
    return squash_channels(channels, 3, lambda x: x.reshape(*x.shape[:-1], x.shape[-1] // 3, 3))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(12,), (2, 5, 12), (0, 2, 2, 12), (3, 2, 2, 3)])
def test_channels_are_squashed_as_capsules_by_products(as_on_tpu, shape, dtype):
    channels = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    d_out = jnp.asarray(
        np.random.default_rng(1).normal(size=(*shape[:-1], shape[-1] // 3, 3)), dtype
    )
    out, pull_back = jax.vjp(squashed, channels)
    expected, pull_back_expected = jax.vjp(squash, channels.reshape(d_out.shape))
    assert out.dtype == dtype
    assert_close(out, expected, terms=3)
    assert_close(pull_back(d_out)[0].reshape(d_out.shape), pull_back_expected(d_out)[0], terms=12)


def test_derivatives_of_squashed_channels(as_on_tpu):
    channels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6)))
    check_grads(squashed, (channels,), order=2, modes=("fwd", "rev"))
    zero = jnp.zeros((2, 6)).at[0, :3].set(1.0)
    assert all_finite(jax.grad(lambda x: jnp.sum(squashed(x)))(zero))


@pytest.mark.parametrize(("platform", "products"), [("cpu", 0), ("cuda", 0), ("tpu", 2)])
def test_only_tpus_squash_channels_by_products(platform, products):
    traced = jax.jit(squashed).trace(jnp.ones((2, 4, 4, 12)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == products


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "HIGH"), ("float32", "HIGHEST")])
def test_products_with_ones_keep_more_digits_than_the_channels(dtype, precision):
    traced = jax.jit(squashed).trace(jnp.ones((2, 4, 4, 12), dtype))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count(f"precision = [{precision}, {precision}]") == 2


def test_a_matrix_of_many_types_is_not_made():
    traced = jax.jit(squashed).trace(jnp.ones((2, 3 * 1024)))
    assert "dot_general" not in traced.lower(lowering_platforms=("tpu",)).as_text()
