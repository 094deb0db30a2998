"""Votes and dynamic routing as one function: every implementation is the plain one."""

import dataclasses
import functools
import itertools
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import FLOATS, all_finite, assert_close, assert_gradients
from dense import (
    CHILDREN,
    IN_FEATURES,
    PAPER,
    STATIC,
    arguments,
    assert_same,
    bias_of,
    loss,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, PartitionSpec

from capsjax import dense_capsules, dense_votes
from capsjax.bench import CAPSULE_SIZES
from capsjax.routing.fused import Implementation, api
from capsjax.routing.fused.blocked import Blocks
from capsjax.routing.fused.lanes import Lanes

# Those that store no votes and run everywhere; test_mosaic_gpu.py has the other one.
FAST = tuple(name for name in get_args(Implementation) if name not in ("reference", "mosaic_gpu"))
# Where the two have most of their code in common, one is in the gate.
ONE = ["blocked", pytest.param("lanes", marks=pytest.mark.slow)]


# One program for each shape, which all tests share.
routed_by = jax.jit(dense_capsules, static_argnames=STATIC)


def some_slow(cases, *fast):
    """All cases; those that are not among the fast ones run with the slow tests."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("num_iterations", [1, 2, 4])
def test_is_what_the_equations_say(implementation, num_iterations):
    poses, weights = arguments(2)
    bias, where = bias_of(), np.arange(CHILDREN) % 5 > 0
    routed = routed_by(
        poses,
        weights,
        bias=bias,
        where=where,
        num_iterations=num_iterations,
        implementation=implementation,
    )
    for n, u in enumerate(np.asarray(poses, np.float64)):
        votes = references.dense_votes(u, np.asarray(weights, np.float64))
        expected, lengths, coupling = references.dynamic_routing(
            votes, num_iterations, bias=np.asarray(bias, np.float64), where=where
        )
        np.testing.assert_allclose(routed.poses[n], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(routed.activations[n], lengths, rtol=1e-5, atol=1e-6)
        if implementation == "reference":
            np.testing.assert_allclose(routed.coupling[n], coupling, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", some_slow(CAPSULE_SIZES, "paper"))
def test_implementations_agree_at_the_benchmarked_sizes(name):
    sizes = CAPSULE_SIZES[name].reduced()
    poses, weights = arguments(sizes.batch, shape=tuple(sizes.layer))
    expected = with_gradients("reference", poses, weights)
    for implementation in FAST:
        got = with_gradients(implementation, poses, weights)
        assert_same(got, expected, "float32", terms=sizes.children * sizes.in_features)


# Leading axes, sizes, iterations, dtype, and whether leaky, with stopped gradients, biased, masked:
# each with others and without, as every case is a program of each implementation.
CASES = [
    ((), (1, 1, 1, 1), 1, "float32", False, False, False, False),
    ((2,), (70, 3, 5, 6), 3, "float32", False, True, True, True),
    ((3, 1), (33, 9, 1, 2), 2, "bfloat16", True, False, False, True),
    ((2,), (16, 2, 40, 3), 4, "float16", True, True, True, False),
]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_reference(implementation, case):
    check_against_reference(implementation, *case)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=25)
@given(
    case=st.tuples(
        st.lists(st.integers(1, 3), max_size=2),
        st.tuples(
            st.sampled_from([1, 3, 16, 33, 70]),
            st.integers(1, 9),
            st.sampled_from([1, 2, 5, 40]),
            st.integers(1, 6),
        ),
        st.integers(1, 4),
        st.sampled_from(FLOATS),
        *[st.booleans()] * 4,
    )
)
def test_values_and_gradients_with_any_options(implementation, case):
    check_against_reference(implementation, *case)


def check_against_reference(
    implementation, leading, sizes, num_iterations, dtype, leaky, stop_gradient, biased, masked
):
    poses, weights = arguments(*leading, shape=sizes, dtype=dtype)
    bias = bias_of(*sizes[2:]) if biased else None
    options = {"num_iterations": num_iterations, "leaky": leaky, "stop_gradient": stop_gradient}
    if masked:
        options["where"] = jnp.asarray(np.random.default_rng(4).random((*leading, sizes[0])) < 0.7)
    got = with_gradients(implementation, poses, weights, bias, **options)
    assert [x.dtype for x in got[1][:2]] == [jnp.dtype(dtype)] * 2
    # Of the same numbers in float32, so that only one of the two is rounded.
    wide = (x.astype(jnp.float32) for x in (poses, weights))
    expected = with_gradients("reference", *wide, bias, **options)
    assert_same(got, expected, dtype, terms=sizes[0] * sizes[1])


@pytest.mark.parametrize(
    ("implementation", "kind", "sizes"),
    [
        ("blocked", Blocks, {"block": 7}),
        pytest.param("blocked", Blocks, {"block": 16}, marks=pytest.mark.slow),
        pytest.param("lanes", Lanes, {"tiles": 1, "group": 8}, marks=pytest.mark.slow),
        ("lanes", Lanes, {"tiles": 2, "group": 8}),
    ],
)
def test_in_blocks_of_any_size_to_the_last_digits(implementation, kind, sizes, monkeypatch):
    made = []

    def in_blocks(*args, **options):
        made.append(dataclasses.replace(kind.of(*args, **options), **sizes))
        return made[-1]

    sweep = functools.partial(api._sweep, in_blocks)
    monkeypatch.setitem(api._IMPLEMENTATIONS, implementation, sweep)
    with jax.enable_x64(True):
        poses, weights = arguments(2, dtype="float64")
        bias = np.asarray(bias_of(), np.float64)
        # A function of its own: programs are kept for each function.
        fresh = jax.jit(lambda *x: with_gradients.__wrapped__(implementation, *x))
        got = fresh(poses, weights, bias)
        assert made
        expected = with_gradients("reference", poses, weights, bias)
        assert got[0][0].dtype == np.float64
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), got, expected
        )


@pytest.mark.parametrize("implementation", FAST)
def test_gradients_are_those_of_differences(implementation):
    with jax.enable_x64(True):
        poses, weights = arguments(2, shape=(6, 3, 4, 5), dtype="float64")
        function = functools.partial(loss, implementation=implementation)
        assert_gradients(function, poses, weights, bias_of())


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("sizes", "dtype", "num_iterations"),
    [
        ((20, 2, 4, 3), "float16", 10),
        ((1, 1, 1, 1), "bfloat16", 3),
    ],
)
def test_values_and_gradients_are_finite(implementation, sizes, dtype, num_iterations):
    poses, weights = (np.asarray(x, np.float32) for x in arguments(2, shape=sizes))
    ones = np.ones_like(poses), np.ones_like(weights)
    for kind in (*((poses * scale, weights) for scale in (0.0, 1e-8, 1.0, 1e4)), ones):
        given = [x.astype(jnp.dtype(dtype)) for x in kind]
        for children in (sizes[0], 1):
            where = np.arange(sizes[0]) < children
            options = {"num_iterations": num_iterations, "where": where}
            assert all_finite(with_gradients(implementation, *given, **options))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("masked", [jnp.nan, jnp.inf, 1e30])
def test_masked_children_have_no_influence_and_no_gradient(implementation, masked):
    poses, weights = arguments(2)
    where = jnp.arange(CHILDREN) != 7
    got = with_gradients(implementation, poses.at[:, 7].set(masked), weights, where=where)
    jax.tree.map(
        np.testing.assert_array_equal,
        got,
        with_gradients(implementation, poses, weights, where=where),
    )
    np.testing.assert_array_equal(got[1][0][:, 7], 0)
    np.testing.assert_array_equal(got[1][1][7], 0)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (6, 0, 4, 5), (6, 3, 0, 5), (6, 3, 4, 0)])
def test_without_children_parents_or_dimensions(sizes):
    poses, weights = arguments(2, shape=sizes)
    routed = routed_by(poses, weights)
    assert routed.poses.shape == (2, *sizes[2:])
    assert routed.coupling is None
    np.testing.assert_array_equal(routed.activations, 0)


@functools.cache
def compiled(implementation, batch, sizes, num_iterations=3):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, *sizes[:2]), sizes)]
    function = functools.partial(loss, implementation=implementation, num_iterations=num_iterations)
    return jax.jit(jax.grad(function, (0, 1))).lower(*shapes)


def temporary(implementation, batch, sizes):
    return compiled(implementation, batch, sizes).compile().memory_analysis().temp_size_in_bytes


@functools.cache
def traced(implementation, batch, sizes, gradient):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, *sizes[:2]), sizes)]
    function = functools.partial(loss, implementation=implementation)
    return jax.jit(jax.grad(function, (0, 1)) if gradient else function).trace(*shapes)


@functools.cache
def lowered(implementation, batch, sizes, platform, gradient=True):
    program = traced(implementation, batch, sizes, gradient)
    return program.lower(lowering_platforms=(platform,)).as_text()


def stores_votes(implementation, batch, sizes, platform="cpu", gradient=True):
    text = lowered(implementation, batch, sizes, platform, gradient)
    children, _, parents, features = sizes
    votes = (
        f"{batch}x{children}x{parents}x{features}",
        f"{children}x{batch}x{parents}x{features}",
        f"{children}x{batch}x{parents * features}",
    )
    computed = [line for line in text.splitlines() if re.search(r"dot_general|multiply", line)]
    return any(f"tensor<{shape}xf32>" in line for line in computed for shape in votes)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_what_is_named_is_what_runs(platform):
    sizes = (256, 4, 10, 16)
    assert stores_votes("reference", 2, sizes, platform)
    blocked, lanes = (lowered(name, 2, sizes, platform) for name in FAST)
    # Of its block of children, one has the children along the last axis and the other the batch.
    assert "tensor<10x2x1024xf32>" in blocked
    assert "tensor<10x2x1024xf32>" not in lanes
    for name in FAST:
        assert not stores_votes(name, 2, sizes, platform)


@pytest.mark.parametrize(
    ("batch", "sizes", "platform", "stored"),
    [
        (*PAPER, "cpu", False),
        (*PAPER, "tpu", False),
        (64, (1152, 8, 10, 24), "cuda", True),  # votes larger than the kernel supports
        (128, CAPSULE_SIZES["many_parents"].layer, "cuda", False),
        (2, PAPER[1], "cpu", True),  # few votes
        (2, PAPER[1], "tpu", True),
        (128, (196, 192, 10, 16), "cpu", True),  # votes smaller than poses
        (128, (196, 192, 10, 16), "tpu", False),
    ],
)
def test_what_is_chosen(batch, sizes, platform, stored):
    # Which is chosen once for values and gradients.
    assert stores_votes(None, batch, sizes, platform, gradient=False) == stored


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "HIGH"), ("float32", "HIGHEST")])
def test_the_softmax_is_more_precise_than_the_poses(dtype, precision):
    poses, weights = (jnp.ones(shape, dtype) for shape in ((2, 16, 4), (16, 4, 10, 16)))
    function = functools.partial(
        dense_capsules, implementation="lanes", precision=jax.lax.Precision.DEFAULT
    )
    text = jax.jit(function).trace(poses, weights).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count(f"precision = [{precision}, {precision}]") == 1


def test_the_program_does_not_grow_with_the_iterations():
    sizes = (256, 4, 10, 16)
    few, many = (compiled("blocked", 2, sizes, n).as_text().splitlines() for n in (3, 30))
    assert len(few) == len(many)


def test_memory_of_the_paper_s_capsules():
    assert temporary("blocked", *PAPER) <= 0.08 * temporary("reference", *PAPER)


def test_under_vmap_the_default_needs_no_more_memory_than_the_reference():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((128, 576, 8), (576, 8, 10, 16))]

    def of(implementation):
        def total(poses, weights):
            one = functools.partial(loss, implementation=implementation)
            return jax.vmap(one, (0, None))(poses, weights).sum()

        program = jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert of(None) <= 1.1 * of("reference")


def test_memory_grows_with_children_and_parents_but_not_with_their_pairs():
    # A batch so large that the weights' share of the memory is small. Four times as many of both
    # are sixteen times as many pairs.
    many, few = (temporary("blocked", 4096, (n, 8, n // 16, 16)) for n in (512, 128))
    assert many < 5 * few


@pytest.mark.parametrize("implementation", ONE)
def test_under_transformations(implementation):
    poses, weights = arguments(3)
    ensemble = jnp.stack([weights, 2 * weights])

    @jax.jit
    def one(poses, weights):
        return dense_capsules(poses, weights, implementation=implementation).poses

    @jax.jit
    def transformed(poses):
        def with_gradient(function):
            routed, pullback = jax.vjp(lambda x: function(x, weights), poses)
            return routed, pullback(-jnp.sin(routed))[0]

        recomputed = with_gradient(jax.vmap(jax.remat(one), (0, None)))
        members = [one(poses, member) for member in ensemble]
        return (
            with_gradient(one),
            recomputed,
            jax.lax.map(lambda x: one(x, weights), poses),
            members,
        )

    (expected, gradient), (routed, recomputed), mapped, members = transformed(poses)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(routed, expected, **close)
    np.testing.assert_allclose(recomputed, gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mapped, expected, **close)
    # An example on each device, an ensemble of weights on all.
    several = jax.pmap(jax.vmap(one, (None, 0)), in_axes=(0, None))(poses, ensemble)
    for got, member in zip(np.moveaxis(several, 1, 0), members, strict=True):
        np.testing.assert_allclose(got, member, **close)


@functools.cache
def stacked(function):
    """The gradient of two layers that `function` stacks, with respect to their weights."""
    poses, first = arguments(2, shape=(6, 4, 6, 4))
    layers = jnp.stack([first, -first[::-1]])
    return jax.jit(jax.grad(lambda layers: jnp.sum(function(poses, layers)[..., 0])))(layers)


def written_out(poses, layers):
    for weights in layers:
        poses = dense_capsules(poses, weights, implementation="reference").poses
    return poses


@pytest.mark.parametrize("implementation", ONE)
def test_scan_over_stacked_layers(implementation):
    def layer(poses, weights):
        return dense_capsules(poses, weights, implementation=implementation).poses, None

    scanned = stacked(lambda poses, layers: jax.lax.scan(layer, poses, layers)[0])
    np.testing.assert_allclose(scanned, stacked(written_out), rtol=1e-4, atol=1e-6)


# Poses alone for each, which is how batches are sharded, and weights alone for one.
FAST_VARYING = [*((name, (True, False)) for name in FAST), ("blocked", (False, True))]
VARYING = list(itertools.product(FAST, [(True, False), (False, True), (True, True)]))


@pytest.mark.parametrize(
    ("implementation", "varying"),
    [
        pytest.param(*case, marks=() if case in FAST_VARYING else pytest.mark.slow)
        for case in VARYING
    ],
)
def test_under_shard_map_whichever_argument_is_sharded(implementation, varying):
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    batch, whole = PartitionSpec("batch"), PartitionSpec()

    def shard(poses, weights):
        return dense_capsules(poses, weights[0], implementation=implementation).poses

    specs = tuple(batch if sharded else whole for sharded in varying)
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=batch)
    (_, got), gradients = of_shards(mapped, varying)
    (_, expected), expected_gradients = of_shards(one_by_one, varying)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@functools.cache
def of_shards(function, varying):
    """Results and gradients for eight shards, of which some arguments vary."""
    poses, _ = arguments(8 if varying[0] else 1)
    scales = np.linspace(0.5, 1, 8 if varying[1] else 1, dtype=np.float32)
    weights = np.asarray(arguments()[1])[None] * scales[:, None, None, None, None]

    def total(*arguments):
        results = function(*arguments)
        return jnp.cos(results).sum(), results

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(poses, weights)


def one_by_one(poses, weights):
    """What shards compute, as a plain function of all of them."""
    poses, weights = (jnp.broadcast_to(x, (8, *x.shape[1:])) for x in (poses, weights))
    return jax.vmap(lambda *x: dense_capsules(*x, implementation="reference").poses)(poses, weights)


@functools.cache
def gradient_of_mean():
    return jax.jit(jax.grad(mean_activation))(*arguments(16)[::-1])


def mean_activation(weights, poses, implementation="reference"):
    routed = dense_capsules(poses, weights, implementation=implementation)
    return routed.activations[:, 0].mean()


@pytest.mark.parametrize("implementation", ONE)
def test_pmapped_gradients_are_those_of_the_whole_batch(implementation):
    poses, weights = arguments(16)

    def step(weights, poses):
        gradient = jax.grad(mean_activation)(weights, poses, implementation)
        return jax.lax.pmean(gradient, "batch")

    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=None)
    got = mapped(weights, poses.reshape(8, 2, *poses.shape[1:]))
    np.testing.assert_allclose(got, gradient_of_mean(), rtol=1e-4, atol=1e-6)


def test_exported_for_every_platform_with_a_batch_of_any_size():
    (batch,) = export.symbolic_shape("batch")
    poses, weights = arguments(3)
    shape = jax.ShapeDtypeStruct((batch, *poses.shape[1:]), jnp.float32)
    function = jax.jit(lambda p: dense_capsules(p, weights))
    exported = export.export(function, platforms=["cpu", "cuda", "tpu"])(shape)
    stored = export.deserialize(exported.serialize())
    for size in (1, 3):
        # Compiled apart, the sums of a pose may be ordered differently: to rounding of its length.
        np.testing.assert_allclose(
            stored.call(poses[:size]).poses, function(poses[:size]).poses, rtol=1e-5, atol=1e-5
        )


def test_exported_with_any_number_of_children():
    batch, children = export.symbolic_shape("batch, children")
    poses, weights = arguments(2)
    shapes = [
        jax.ShapeDtypeStruct((batch, children, IN_FEATURES), jnp.float32),
        jax.ShapeDtypeStruct((children, *WEIGHTS.shape[1:]), jnp.float32),
    ]
    exported = export.export(jax.jit(lambda u, w: dense_capsules(u, w).poses))(*shapes)
    np.testing.assert_allclose(
        exported.call(poses, weights), routed_by(poses, weights).poses, rtol=1e-5, atol=1e-5
    )
    named = jax.jit(lambda u, w: dense_capsules(u, w, implementation="blocked").poses)
    with pytest.raises(NotImplementedError, match="weights must have constant sizes"):
        export.export(named)(*shapes)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_a_nan_stays_nan_in_its_example(implementation):
    poses, weights = (np.array(x) for x in arguments(2))
    everyone = np.ones(CHILDREN, bool)
    for broken in (np.nan, np.inf):
        poses[1, 0] = broken
        (_, routed), (d_poses, d_weights) = with_gradients(
            implementation, poses, weights, where=everyone
        )
        for x in map(np.asarray, (*routed, d_poses)):
            assert np.isfinite(x[0]).all()
            assert np.isnan(x[1]).all()
        assert not np.isfinite(d_weights).any()


@pytest.mark.parametrize("implementation", ONE)
def test_second_derivatives(implementation):
    def gradients(poses, weights):
        return jax.grad(functools.partial(loss, implementation=implementation), (0, 1))(
            poses, weights
        )

    with jax.enable_x64(True):
        direction = arguments(shape=(4, 2, 3, 2), dtype="float64", seed=1)
        along = jax.jit(lambda *x: jax.jvp(gradients, x, direction))
        x = [np.asarray(a) for a in arguments(shape=(4, 2, 3, 2), dtype="float64")]
        after, before = (
            along(*(a + step * np.asarray(d) for a, d in zip(x, direction, strict=True)))[0]
            for step in (1e-6, -1e-6)
        )
        for got, high, low in zip(along(*x)[1], after, before, strict=True):
            np.testing.assert_allclose(got, (high - low) / 2e-6, rtol=1e-6, atol=1e-8)


def test_bfloat16_is_the_float32_result_rounded():
    poses, weights = arguments(2, dtype="bfloat16")
    wide = (np.asarray(x, np.float32) for x in (poses, weights))
    exact = routed_by(*wide, implementation="reference")
    for implementation in ("reference", *FAST):
        routed = routed_by(poses, weights, implementation=implementation)
        assert routed.poses.dtype == jnp.bfloat16
        assert_close(routed.poses, exact.poses, terms=CHILDREN, scale=1.0)


def test_only_the_named_reference_returns_the_coupling():
    poses, weights = arguments(2)
    named = routed_by(poses, weights, implementation="reference")
    np.testing.assert_allclose(named.coupling.sum(-1), 1, rtol=1e-6)
    for implementation in (None, *FAST):
        routed = routed_by(poses, weights, implementation=implementation)
        assert routed.coupling is None
        np.testing.assert_allclose(routed.poses, named.poses, rtol=1e-5, atol=1e-6)


POSES, WEIGHTS = arguments(2)
BAD = [
    ({"poses": POSES[..., 0]}, ValueError, r"poses must have shape \[..., I, K\] = .*35, 3"),
    ({"poses": POSES.astype(int)}, TypeError, "poses must be a floating-point array, got .*int32"),
    ({"weights": WEIGHTS[0]}, ValueError, r"weights must have shape \[I, K, J, D\], got .*3, 4, 5"),
    ({"bias": jnp.zeros(5)}, ValueError, r"bias must have shape \[J, D\] = \(4, 5\), got \(5,\)"),
    ({"bias": jnp.zeros((4, 5), int)}, TypeError, "bias must be a floating-point array"),
    ({"where": jnp.ones(35)}, TypeError, "where must be a bool array, got dtype float32"),
    ({"where": jnp.ones(5, bool)}, ValueError, r"where must broadcast to \(2, 35\), got shape"),
    ({"leaky": "no"}, TypeError, "leaky must be True or False, got 'no'"),
    ({"stop_gradient": 1}, TypeError, "stop_gradient must be True or False, got 1"),
    ({"num_iterations": 0}, ValueError, "num_iterations must be at least 1, got 0"),
    ({"num_iterations": 2.5}, TypeError, "num_iterations must be a Python integer, got 2.5"),
    (
        {"implementation": "cudnn"},
        ValueError,
        "None or one of reference, blocked, lanes, mosaic_gpu, got 'cudnn'",
    ),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=[m for *_, m in BAD])
@pytest.mark.parametrize("implementation", ["reference", None])
def test_bad_arguments_are_named_while_tracing(options, error, match, implementation):
    good = {"poses": POSES, "weights": WEIGHTS, "implementation": implementation}
    arrays = {k: v for k, v in options.items() if hasattr(v, "shape")}
    static = {k: v for k, v in {**good, **options}.items() if not hasattr(v, "shape")}
    arrays = {**{k: v for k, v in good.items() if k in ("poses", "weights")}, **arrays}
    with pytest.raises(error, match=match):
        jax.jit(lambda arrays: dense_capsules(**arrays, **static))(arrays)


def test_votes_are_checked_alike():
    with pytest.raises(ValueError, match=r"poses must have shape"):
        dense_votes(POSES[:, :3], WEIGHTS)
