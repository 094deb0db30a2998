import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import FLOATS, assert_close
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from capsjax import margin_loss, reconstruction_loss, spread_loss

LENGTHS = np.array([[-0.3, 0.3, 0.9], [1.2, 0.5, -0.5]])
LABELS = np.array([[0, 0, 1], [1, 1, 1]])
TERMS = np.array([[0, 0.02, 0], [0, 0.16, 1.96]])


def test_margin_loss_terms():
    lengths = LENGTHS.astype(np.float32)
    for k in range(3):
        only = np.arange(3) == k
        terms = margin_loss(lengths, LABELS, where=jnp.broadcast_to(only, (2, 3)))
        np.testing.assert_allclose(terms, TERMS[:, k], atol=1e-7)
    np.testing.assert_allclose(margin_loss(lengths, LABELS), TERMS.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(references.margin_terms(LENGTHS, LABELS), TERMS, atol=1e-12)


def test_margin_loss_does_not_normalise_the_lengths():
    # All lengths reach the margin, so the loss is zero; after a softmax it would not be.
    assert margin_loss(jnp.array([0.95, 0.95]), jnp.array([1, 1])) == 0


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    data=st.data(),
    dtype=st.sampled_from(FLOATS),
    label_dtype=st.sampled_from(["int32", "float32", "bool", "bfloat16"]),
)
def test_margin_loss_over_shapes_axes_and_dtypes(shape, data, dtype, label_dtype):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.default_rng(0)
    lengths = rng.uniform(-0.2, 1.3, shape).astype(jnp.dtype(dtype))
    labels = rng.integers(0, 2, shape).astype(jnp.dtype(label_dtype))
    options = {"m_plus": 0.8, "m_minus": 0.2, "lambda_": 0.25}
    loss = jax.jit(lambda *x: margin_loss(*x, axis=axis, **options))(lengths, labels)
    expected = references.margin_terms(
        lengths.astype(np.float64), labels.astype(np.float64), **options
    ).sum(axis)
    assert loss.dtype == dtype
    assert loss.shape == expected.shape
    assert_close(loss, expected, terms=shape[axis])


@pytest.mark.parametrize("name", ["m_plus", "m_minus", "lambda_"])
def test_margins_and_weights_are_single_numbers(name):
    lengths, labels = jnp.full((2, 2), 0.5), jnp.eye(2)
    np.testing.assert_array_equal(
        margin_loss(lengths, labels, **{name: jnp.float32(0.75)}),
        margin_loss(lengths, labels, **{name: 0.75}),
    )
    np.testing.assert_array_equal(
        jax.jit(margin_loss)(lengths, labels, **{name: nnx.Param(jnp.float32(0.75))}),
        margin_loss(lengths, labels, **{name: 0.75}),
    )
    with pytest.raises(ValueError, match=rf"{name} must be one number, got shape \(2,\)"):
        margin_loss(lengths, labels, **{name: jnp.ones(2)})
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        margin_loss(lengths, labels, **{name: jnp.float32(jnp.nan)})
    for value in (jnp.array(True), np.array(1j), jax.random.key(0)):
        with pytest.raises(TypeError, match=f"{name} must be a number, got an array of dtype"):
            margin_loss(lengths, labels, **{name: value})


@pytest.mark.parametrize("loss", [margin_loss, spread_loss])
def test_labels_and_margins_are_real_numbers(loss):
    lengths = jnp.full((2, 2), 0.5)
    keys = jax.random.split(jax.random.key(0), (2, 2))
    for labels in (keys, jnp.eye(2, dtype=complex)):
        with pytest.raises(TypeError, match="labels must be real numbers or bool, got dtype"):
            loss(lengths, labels)
    with pytest.raises(
        TypeError, match="labels must be an array of numbers or bools, got dtype <U1"
    ):
        loss(lengths, np.array([["a", "b"], ["b", "a"]]))
    if loss is spread_loss:
        for margin in (True, 1j, keys[0]):
            with pytest.raises(TypeError, match="margin must be real numbers, got dtype"):
                loss(lengths, jnp.eye(2), margin=margin)


@pytest.mark.parametrize("masked", [jnp.nan, jnp.inf, 0.3])
def test_masked_classes_have_no_loss_and_no_gradient(masked):
    where = jnp.array([True, False, True])
    lengths = jnp.array([0.5, masked, 0.5])
    labels = jnp.array([1, 0, 0])
    loss, gradient = jax.value_and_grad(lambda x: margin_loss(x, labels, where=where))(lengths)
    np.testing.assert_allclose(loss, 0.4**2 + 0.5 * 0.4**2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-0.8, 0, 0.4], rtol=1e-6)


def test_reconstruction_loss_is_a_sum_over_pixels():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 28, 28, 1))
    flat = [x.reshape(3, -1).astype(np.float32) for x in (a, b)]
    expected = ((a - b) ** 2).sum((1, 2, 3))
    assert_close(reconstruction_loss(*flat), expected, terms=784)
    images = [x.astype(np.float32) for x in (a, b)]
    assert_close(reconstruction_loss(*images, axis=(-3, -2, -1)), expected, terms=784)


@pytest.mark.parametrize("dtype", FLOATS)
def test_reconstruction_loss_sums_in_float32(dtype):
    ones, zeros = jnp.ones((2, 1024), dtype), jnp.zeros((2, 1024), dtype)
    loss = reconstruction_loss(ones, zeros)
    assert loss.dtype == dtype
    np.testing.assert_array_equal(np.asarray(loss, np.float64), 1024)


def test_masked_pixels_have_no_loss_and_no_gradient():
    where = jnp.array([True, False])
    pixels = jnp.array([0.5, jnp.inf])
    loss, gradient = jax.value_and_grad(
        lambda x: reconstruction_loss(x, jnp.zeros(2), where=where)
    )(pixels)
    assert (loss, *gradient) == (0.25, 1.0, 0.0)


@functools.cache
def with_gradient(function):
    return jax.jit(jax.value_and_grad(function))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("labels", [[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]])
@pytest.mark.parametrize("function", [margin_loss, spread_loss, reconstruction_loss])
def test_what_is_not_finite_makes_the_loss_so(function, labels, value):
    x, labels = np.array([value, 0.5, 0.2], np.float32), np.array(labels, np.float32)
    broken = np.array([value, *labels[1:]], np.float32)
    loss, gradient = with_gradient(function)(x, labels)
    assert not np.isfinite(loss)
    assert not np.isfinite(gradient[0])
    assert not np.isfinite(with_gradient(function)(labels, broken)[0])


SPREAD = [
    # One correct class: 0.5 above the first wrong class, 0.8 above the second.
    ([0.8, 0.3, 0.0], [1, 0, 0], 0.9, 0.4**2 + 0.1**2),
    ([0.8, 0.3, 0.0], [1, 0, 0], 0.2, 0.0),
    ([0.1, 0.9], [1, 0], 0.9, 1.7**2),
    # Two correct classes: all pairs of a wrong and a correct class.
    ([0.5, 0.5, 0.2], [1, 1, 0], 0.9, 2 * 0.6**2),
]


@pytest.mark.parametrize(("activations", "labels", "margin", "expected"), SPREAD)
def test_spread_loss(activations, labels, margin, expected):
    a, labels = np.array(activations, np.float32), np.array(labels)
    of = jax.jit(functools.partial(spread_loss, margin=margin), static_argnames="axis")
    np.testing.assert_allclose(of(a, labels), expected, rtol=1e-5, atol=1e-7)
    loss = of(np.stack([a, a], axis=1), np.stack([labels] * 2, axis=1), axis=0)
    np.testing.assert_allclose(loss, [expected] * 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_spread_loss_masks_classes_and_keeps_the_dtype(dtype):
    activations = jnp.array([0.5, jnp.nan, 0.25], dtype)
    labels, where = jnp.array([1, 0, 0]), jnp.array([True, False, True])
    loss, gradient = jax.value_and_grad(lambda a: spread_loss(a, labels, margin=0.75, where=where))(
        activations
    )
    assert loss.dtype == dtype
    np.testing.assert_array_equal(loss, np.float32(0.25))
    np.testing.assert_array_equal(gradient, [-1, 0, 1])


def test_gradients():
    rng = np.random.default_rng(1)
    lengths = jnp.asarray(rng.uniform(0, 1, (3, 4)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 2, (3, 4)))
    margin = jax.jit(lambda x: margin_loss(x, labels))
    check_grads(margin, (lengths,), order=1, eps=1e-3, rtol=2e-2)
    one_hot = np.eye(4, dtype=np.float32)[[0, 3, 1]]
    spread = jax.jit(lambda x: spread_loss(x, one_hot))
    check_grads(spread, (lengths,), order=1, eps=1e-3, rtol=2e-2)
    both = lengths, lengths[::-1]
    check_grads(jax.jit(reconstruction_loss), both, order=2, eps=1e-2, rtol=1e-2)


def test_bad_arguments_are_named_while_tracing():
    lengths = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"labels must be one-hot.*\(2, 3\), got shape \(2,\)"):
        jax.jit(margin_loss)(lengths, jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"labels must be one-hot.*of activations, \(2, 3\), got"):
        spread_loss(lengths, jnp.array([0, 1]))
    with pytest.raises(TypeError, match="lengths must be a floating-point array, got dtype int32"):
        margin_loss(jnp.ones((2, 3), int), lengths)
    with pytest.raises(TypeError, match="where must be a bool array, got dtype float32"):
        margin_loss(lengths, lengths, where=lengths)
    with pytest.raises(ValueError, match=r"where must broadcast to \(2, 3\), got shape \(4,\)"):
        margin_loss(lengths, lengths, where=jnp.ones(4, bool))
    with pytest.raises(TypeError, match="target must be a floating-point array, got dtype uint8"):
        jax.jit(reconstruction_loss)(lengths, jnp.ones((2, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"target must have the shape of reconstruction, \(2, 3\)"):
        reconstruction_loss(lengths, jnp.ones((2, 1)))
    images = jnp.ones((2, 4, 6, 1))
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 1\), got shape \(2, 6, 4, 1\)"):
        reconstruction_loss(images, images.swapaxes(1, 2), axis=(-3, -2, -1))
    with pytest.raises(ValueError, match="axis -3 is out of bounds for array of dimension 2"):
        reconstruction_loss(lengths, lengths, axis=(-3, -2, -1))
