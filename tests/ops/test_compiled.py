"""Calls outside of jit compile once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import arguments
from flax import nnx

import capsjax
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.routing import algorithm, algorithms, register, unregister

X = jnp.arange(3.0)


@pytest.fixture
def function():
    """A decorated function and the list of its executions, each of which traces or computes."""
    executions = []

    @compiled_outside_jit
    def scaled(x, factor=2, *, more=None, name="", change=None):
        executions.append((factor, name))
        x = x * factor if change is None else change(x * factor)
        return x if more is None else x + more[0]

    return scaled, executions


def test_equal_calls_share_a_program(function):
    scaled, executions = function
    for _ in range(2):
        np.testing.assert_array_equal(scaled(X), 2 * X)
        np.testing.assert_array_equal(scaled(np.asarray(X), more=(X, None)), 3 * X)
    assert len(executions) == 2
    scaled(X[:2])
    scaled(X, name="other")
    scaled(X.astype(jnp.bfloat16))
    assert len(executions) == 5


def test_options_that_are_equal_keep_their_types(function):
    scaled, executions = function
    for factor in (1, True, 1.0, np.float32(1), np.int32(1)):
        scaled(X, factor)
    assert [type(factor) for factor, _ in executions] == [int, bool, float, np.float32, np.int32]


def test_gradients_share_a_program_too(function):
    scaled, executions = function
    gradient = jax.grad(lambda x: scaled(x, more=(x,)).sum())
    for _ in range(3):
        np.testing.assert_array_equal(gradient(X), [3, 3, 3])
    assert len(executions) == 1
    np.testing.assert_array_equal(jax.hessian(lambda x: scaled(x * x).sum())(X), 4 * np.eye(3))


def test_within_jit_the_function_is_part_of_the_program(function):
    scaled, _ = function
    for f in (scaled, jax.grad(lambda x: scaled(x).sum())):
        assert "jit" not in str(jax.make_jaxpr(f)(X))
    # An array that is known does not change that.
    assert "jit" not in str(jax.make_jaxpr(lambda x: scaled(x, more=(X,)))(X))


def test_other_arguments_reach_the_function_as_they_are(function):
    scaled, executions = function
    for _ in range(2):
        scaled(X, change=jnp.negative)
        np.testing.assert_array_equal(jax.vmap(scaled)(X), 2 * X)
        assert scaled([1.0], 2) == [1.0, 1.0]
        assert scaled(np.asarray(["a"], object)).tolist() == ["aa"]
        scaled(X, jnp.float32(3))
        scaled(X, np.array(3))
        scaled(X, float("nan"))
    assert len(executions) == 14
    assert isinstance(executions[5][0], np.ndarray)
    for mask in (np.ones(1), np.zeros(1)):  # equal types with metadata that cannot be compared
        np.testing.assert_array_equal(scaled(nnx.Param(X, mask=mask)), 2 * X)


ARRAY = np.random.default_rng(0).normal(size=(6, 4, 5)).astype("f4")


@pytest.mark.parametrize(
    ("votes", "options"),
    [
        (ARRAY.astype(">f4"), {}),
        (np.ma.masked_array(ARRAY, ARRAY > 1), {}),
        (ARRAY.astype("S"), {}),
        (ARRAY, {"where": np.ma.masked_array(np.ones(6, bool), np.ones(6, bool))}),
        (ARRAY, {"where": np.ones(6)}),
        (ARRAY, {"num_iterations": np.array([3])}),
        (ARRAY, {"num_iterations": jnp.float32(3)}),
        (ARRAY, {"iterations": 3}),
    ],
)
def test_errors_are_those_of_the_function(votes, options):
    capsjax.dynamic_routing(ARRAY)  # a program of this shape exists
    with pytest.raises(TypeError) as expected:
        capsjax.dynamic_routing.__wrapped__(votes, **options)
    with pytest.raises(TypeError) as got:
        capsjax.dynamic_routing(votes, **options)
    assert str(got.value) == str(expected.value)


def test_nan_is_passed_on():
    routed = capsjax.dynamic_routing(ARRAY, logits=float("nan"))
    assert all(np.isnan(x).all() for x in routed)


def test_a_trace_is_that_of_the_registered_algorithm():
    dynamic = algorithm("dynamic")

    def times(factor):
        def passes(votes, **options):
            return dynamic.passes(votes * factor, **options)

        return dataclasses.replace(dynamic, name="mine", passes=passes, fused=None)

    for factor in (1.0, 10.0):
        register(times(factor))
        try:
            found = capsjax.routing_trace(ARRAY, routing="mine")
        finally:
            unregister("mine")
        expected = capsjax.dynamic_routing(factor * ARRAY)
        np.testing.assert_allclose(found.poses[-1], expected.poses, rtol=1e-5)
    with pytest.raises(ValueError, match="routing must be one of"):
        capsjax.routing_trace(ARRAY, routing="mine")


def test_no_routing_function_compiles_twice():
    calls = {}
    for name in algorithms():
        arrays, options = arguments(name, 2)
        calls[name] = functools.partial(algorithm(name).function, *arrays, **options)
    votes, poses = jnp.ones((2, 6, 4, 5)), jnp.ones((2, 6, 5))
    calls["dense"] = functools.partial(capsjax.dense_capsules, poses, jnp.ones((6, 5, 4, 5)))
    calls["trace"] = functools.partial(capsjax.routing_trace, votes)
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for call in calls.values():
            jax.block_until_ready(call())
        assert compiled
        compiled.clear()
        again = {name for name, call in calls.items() if compiles(call, compiled)}
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not again


def compiles(call, compiled):
    """Whether a call adds to the compilations."""
    before = len(compiled)
    jax.block_until_ready(call())
    return len(compiled) > before
