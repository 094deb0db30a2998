import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from capsjax.ops.bias import add_bias


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    "shape", [(4,), (5, 4), (3, 6, 4), (2, 3, 5, 4), (2, 3, 1, 2, 4), (0, 3, 3, 4)]
)
def test_as_by_broadcasting(shape, as_on_tpu):
    x, bias, d_out = normal(*shape), normal(shape[-1], seed=1), normal(*shape, seed=2)
    out, pull_back = jax.vjp(add_bias, x, bias)
    np.testing.assert_array_equal(out, x + jnp.broadcast_to(bias, shape))
    d_x, d_bias = pull_back(d_out)
    np.testing.assert_array_equal(d_x, d_out)
    expected = np.asarray(d_out, np.float64).reshape(-1, shape[-1]).sum(0)
    np.testing.assert_allclose(d_bias, expected, rtol=1e-5, atol=1e-6)


def test_derivatives(as_on_tpu):
    check_grads(add_bias, (normal(2, 3, 5, 4), normal(4)), order=2, modes=("fwd", "rev"))


def test_under_vmap(as_on_tpu):
    xs, biases, d_out = normal(3, 2, 4, 4, 5), normal(3, 5), normal(3, 2, 4, 4, 5, seed=1)

    def gradient(x, bias, d_out):
        return jax.vjp(add_bias, x, bias)[1](d_out)[1]

    d_biases = jax.vmap(gradient)(xs, biases, d_out)
    np.testing.assert_allclose(d_biases, d_out.sum((1, 2, 3)), rtol=1e-5, atol=1e-6)


def test_a_bias_is_not_rounded_before_it_is_added(as_on_tpu):
    x, bias = normal(2, 3, 5, 64, dtype=jnp.bfloat16), normal(64, seed=1)
    out = add_bias(x, bias)
    expected = (np.asarray(x, np.float32) + np.asarray(bias)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(out, expected)
    assert jnp.any(out != x + jnp.broadcast_to(bias.astype(x.dtype), x.shape))


def test_a_sum_in_bfloat16_is_rounded_once(as_on_tpu):
    # Added one by one in bfloat16, ones stay at 256.
    d_out = jnp.ones((8, 20, 20, 2), jnp.bfloat16)
    d_bias = jax.vjp(add_bias, d_out, jnp.ones(2))[1](d_out)[1]
    assert d_bias.dtype == jnp.float32
    np.testing.assert_array_equal(d_bias, 3200.0)


@pytest.mark.parametrize("shape", [(1001, 2), (8, 11, 13, 2)])
def test_a_sum_for_a_bias_in_bfloat16_is_rounded_once(shape):
    d_out = jnp.full(shape, 1.003)
    d_bias = jax.vjp(add_bias, d_out, jnp.zeros(2, jnp.bfloat16))[1](d_out)[1]
    np.testing.assert_array_equal(d_bias, d_out.reshape(-1, 2).sum(0).astype(jnp.bfloat16))


def test_a_gradient_of_one_argument_keeps_nothing():
    x, bias = normal(2, 4, 4, 3), normal(3)
    for function, argument in (
        (lambda x: add_bias(x, bias), x),
        (lambda bias: add_bias(x, bias), bias),
    ):
        assert jax.tree.leaves(jax.vjp(function, argument)[1]) == []


def test_without_implicit_promotion():
    with jax.numpy_dtype_promotion("strict"):
        out = add_bias(normal(2, 4, 4, 3, dtype=jnp.bfloat16), normal(3))
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 0), ("tpu", 1)])
def test_only_tpus_multiply_by_ones(platform, convolutions):
    def gradient(x, bias):
        return jax.grad(lambda bias: jnp.sum(jnp.square(add_bias(x, bias))))(bias)

    traced = jax.jit(gradient).trace(normal(2, 4, 4, 3), normal(3))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions
