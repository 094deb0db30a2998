import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import FLOATS, all_finite, assert_close, assert_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, PartitionSpec

import capsjax
from capsjax import Routed, dense_votes

CHILDREN, PARENTS, FEATURES = 6, 4, 5
STATIC = ("num_iterations", "leaky", "stop_gradient")
# One program for each shape, which all tests share.
dynamic_routing = jax.jit(capsjax.dynamic_routing, static_argnames=STATIC)


def votes_of(*leading, dtype="float32", seed=0, shape=(CHILDREN, PARENTS, FEATURES)):
    rng = np.random.default_rng(seed)
    # Converted on the host, which compiles nothing.
    return jnp.asarray(rng.normal(size=(*leading, *shape)).astype(jnp.dtype(dtype)))


def assert_routed(routed, expected, terms=CHILDREN):
    for actual, reference in zip(routed, expected, strict=True):
        assert_close(actual, reference, terms=terms, scale=1.0)


OPTIONS = {
    "plain": {},
    "prior": {"logits": np.random.default_rng(1).normal(size=(CHILDREN, PARENTS))},
    "shared prior": {"logits": np.random.default_rng(1).normal(size=PARENTS)},
    "bias": {"bias": np.random.default_rng(2).normal(size=(PARENTS, FEATURES))},
    "mask": {"where": np.arange(CHILDREN) % 3 > 0},
    "leaky": {"leaky": True},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}


def in_jax(options):
    return {
        name: jnp.asarray(v, jnp.float32) if getattr(v, "dtype", bool) == np.float64 else v
        for name, v in options.items()
    }


# Each option with three iterations; all and none of them with any number.
EQUATIONS = [
    pytest.param(n, name, marks=() if n == 3 or name in ("plain", "all") else pytest.mark.slow)
    for n, name in itertools.product([1, 2, 3, 5], OPTIONS)
]


@pytest.mark.parametrize(("num_iterations", "options"), EQUATIONS)
def test_is_procedure_1_of_the_paper(num_iterations, options):
    votes, options = votes_of(), OPTIONS[options]
    expected = references.dynamic_routing(np.asarray(votes, np.float64), num_iterations, **options)
    routed = dynamic_routing(votes, num_iterations=num_iterations, **in_jax(options))
    assert isinstance(routed, Routed)
    assert_routed(routed, expected)


def test_in_float64_to_the_last_digits():
    with jax.enable_x64(True):
        votes = np.random.default_rng(0).normal(size=(30, 7, 8))
        expected = references.dynamic_routing(votes, 4)
        for a, b in zip(dynamic_routing(votes, num_iterations=4), expected, strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@settings(max_examples=8)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    num_iterations=st.integers(1, 4),
    dtype=st.sampled_from(FLOATS),
    leaky=st.booleans(),
)
def test_over_shapes_and_dtypes(leading, sizes, num_iterations, dtype, leaky):
    votes = np.asarray(votes_of(*leading, dtype=dtype, shape=sizes))
    # On the host: the index of an example is no program.
    routed = dynamic_routing(votes, num_iterations=num_iterations, leaky=leaky)
    routed = Routed(*map(np.asarray, routed))
    children, parents, features = sizes
    assert routed.poses.shape == (*leading, parents, features)
    assert routed.activations.shape == (*leading, parents)
    assert routed.coupling.shape == (*leading, children, parents)
    assert {x.dtype for x in routed} == {jnp.dtype(dtype)}
    for index in itertools.product(*map(range, leading)):
        exact = votes[index].astype(np.float64)
        expected = references.dynamic_routing(exact, num_iterations, leaky=leaky)
        assert_routed([x[index] for x in routed], expected)


def test_couplings_of_a_child_sum_to_one_over_the_parents():
    coupling = dynamic_routing(votes_of(3)).coupling
    np.testing.assert_allclose(coupling.sum(-1), 1, rtol=1e-6)
    assert (jnp.abs(coupling.sum(-2) - 1) > 1e-3).all()
    leaky = dynamic_routing(votes_of(3), leaky=True).coupling
    assert (leaky.sum(-1) < 0.999).all()


def test_poses_are_shorter_than_one():
    assert (dynamic_routing(100 * votes_of(3)).activations <= 1).all()
    assert (dynamic_routing(votes_of(3)).activations < 1).all()


def test_one_iteration_is_uniform_coupling():
    votes = votes_of()
    routed = dynamic_routing(votes, num_iterations=1)
    np.testing.assert_allclose(routed.coupling, 1 / PARENTS, rtol=1e-6)
    expected = references.squash(np.asarray(votes, np.float64).mean(0) * CHILDREN / PARENTS)
    assert_close(routed.poses, expected, terms=CHILDREN)


def test_the_number_of_passes():
    # Two iterations update the logits once: with the poses of the first.
    votes = votes_of()
    first = dynamic_routing(votes, num_iterations=1).poses
    agreement = jnp.einsum("ijd,jd->ij", votes, first)
    by_hand = dynamic_routing(votes, num_iterations=1, logits=agreement)
    jax.tree.map(
        lambda a, b: assert_close(a, b, terms=CHILDREN),
        dynamic_routing(votes, num_iterations=2),
        by_hand,
    )


def test_does_not_depend_on_the_batch_around():
    batch = votes_of(4)
    together = dynamic_routing(batch)
    others_changed = dynamic_routing(batch.at[1:].multiply(-3))
    for whole, changed, alone in zip(
        together, others_changed, dynamic_routing(batch[0]), strict=True
    ):
        np.testing.assert_array_equal(whole[0], changed[0])
        np.testing.assert_allclose(whole[0], alone, rtol=1e-5, atol=1e-7)


def test_is_equivariant_to_permutations_of_children_and_parents():
    votes = votes_of()
    children, parents = np.array([3, 0, 5, 1, 4, 2]), np.array([2, 0, 3, 1])
    routed, permuted = dynamic_routing(votes), dynamic_routing(votes[children][:, parents])
    assert_close(permuted.poses, routed.poses[parents], terms=CHILDREN)
    assert_close(permuted.coupling, routed.coupling[children][:, parents], terms=CHILDREN)


def test_gradients_go_through_all_iterations():
    # Smooth in every argument and option, so that differences must agree.
    votes, prior, bias = (votes_of(*x) for x in ((2,), (2,), ()))
    prior, bias, where = (
        np.asarray(prior)[0, :, :, 0],
        np.asarray(bias)[0],
        np.arange(CHILDREN) != 2,
    )

    def route(votes, logits, bias):
        return capsjax.dynamic_routing(votes, logits=logits, bias=bias, where=where, leaky=True)

    def gradients(votes):
        return jax.grad(lambda v: jnp.sum(jnp.sin(capsjax.dynamic_routing(v).poses)))(votes)

    with jax.enable_x64(True):
        assert_gradients(route, votes, prior, bias, forward=True)
        assert_gradients(gradients, votes)


@functools.partial(jax.jit, static_argnames=STATIC)
def with_gradient(votes, **options):
    def loss(votes):
        routed = dynamic_routing(votes, **options)
        return routed.activations[..., 0].sum(), routed

    gradient, routed = jax.grad(loss, has_aux=True)(votes)
    return routed, gradient


def gradient(votes, **options):
    return with_gradient(votes, **options)[1]


def test_stop_gradient_changes_gradients_from_the_second_iteration_on():
    votes = votes_of()
    for options in ({"num_iterations": 1}, {}):
        (expected, through), (routed, stopped) = (
            with_gradient(votes, **options, **stop) for stop in ({}, {"stop_gradient": True})
        )
        jax.tree.map(np.testing.assert_array_equal, routed, expected)
        if options:
            np.testing.assert_array_equal(through, stopped)
        else:
            assert np.abs(np.asarray(through) - np.asarray(stopped)).max() > 1e-3


def test_stop_gradient_is_the_gradient_with_the_coupling_held():
    votes = votes_of()
    held = jnp.log(dynamic_routing(votes).coupling)
    expected = gradient(votes, num_iterations=1, logits=held)
    assert_close(gradient(votes, stop_gradient=True), expected, terms=CHILDREN)


@pytest.mark.parametrize("masked", [jnp.nan, jnp.inf, 1e30, 7.0])
def test_masked_children_have_no_part_whatever_they_hold(masked):
    where = np.arange(CHILDREN) != 2
    votes = votes_of()
    routed, gradients = with_gradient(votes.at[2].set(masked), where=where)
    expected, expected_gradients = with_gradient(votes[where])
    assert_close(routed.poses, expected.poses, terms=CHILDREN)
    np.testing.assert_array_equal(routed.coupling[2], 0)
    np.testing.assert_array_equal(gradients[2], 0)
    assert_close(np.asarray(gradients)[where], expected_gradients, terms=CHILDREN)


def test_a_batch_with_a_mask_of_its_own():
    votes = votes_of(2)
    where = jnp.array([np.arange(CHILDREN) < 4, np.arange(CHILDREN) > 1])
    routed = dynamic_routing(votes, where=where)
    for b in range(2):
        alone = dynamic_routing(votes[b][where[b]])
        assert_close(routed.poses[b], alone.poses, terms=CHILDREN)


def test_all_children_masked_gives_zero_and_no_nan():
    where = jnp.zeros(CHILDREN, bool)
    np.testing.assert_array_equal(dynamic_routing(votes_of(), where=where).poses, 0)
    np.testing.assert_array_equal(gradient(votes_of(), where=where), 0)


# Of bfloat16's range, which is float32's, and of the narrowest.
@pytest.mark.parametrize(
    ("dtype", "leaky"), [("bfloat16", False), ("float16", False), ("float16", True)]
)
@pytest.mark.parametrize("value", [0.0, 1e-8, 1e4])
def test_values_and_gradients_are_finite(dtype, leaky, value):
    votes = np.full((3, CHILDREN, PARENTS, FEATURES), value, jnp.dtype(dtype))
    routed, gradients = with_gradient(votes, leaky=leaky)
    assert all_finite((routed, gradients))
    if value == 0:
        np.testing.assert_array_equal(gradients, 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_under_strict_dtype_promotion(dtype):
    options = in_jax({**OPTIONS["all"], "where": jnp.arange(CHILDREN) > 1})
    with jax.numpy_dtype_promotion("strict"):
        assert dynamic_routing(votes_of(dtype=dtype), **options).poses.dtype == dtype


@pytest.mark.parametrize("leaky", [False, True])
def test_without_parents_children_or_examples(leaky):
    for shape in ((2, 0, 3), (0, 2, 3), (0, 4, 2, 3)):
        routed = dynamic_routing(jnp.ones(shape), leaky=leaky)
        assert routed.poses.shape == (*shape[:-3], *shape[-2:])
        np.testing.assert_array_equal(routed.poses, 0)


def test_sums_in_float32():
    # 4096 children of one vote each: a bfloat16 sum of them would stop at 256.
    votes = jnp.full((4096, 1, 1), 2.0**-8, jnp.bfloat16)
    s = 16.0
    assert float(dynamic_routing(votes).poses[0, 0]) == float(jnp.bfloat16(s**2 / (1 + s**2)))


def test_the_loop_is_a_fori_loop():
    # As many iterations as you like in a program of the same size.
    def program(num_iterations):
        function = jax.jit(lambda v: dynamic_routing(v, num_iterations=num_iterations).poses)
        return function.lower(votes_of()).as_text()

    assert "stablehlo.while" in program(3)
    assert len(program(30).splitlines()) == len(program(3).splitlines())


def test_under_transformations():
    votes = votes_of(3)
    poses = dynamic_routing(votes).poses
    close = {"rtol": 1e-5, "atol": 1e-6}

    def one(votes):
        return dynamic_routing(votes).poses

    @jax.jit
    def transformed(votes):
        def with_gradient(function):
            routed, pullback = jax.vjp(function, votes)
            return routed, pullback(jnp.ones_like(routed))[0]

        recomputed = with_gradient(jax.vmap(jax.remat(one)))
        return jax.lax.map(one, votes), recomputed, with_gradient(one)

    mapped, (recomputed, gradient), (plain, expected) = transformed(votes)
    for got in (mapped, recomputed, plain):
        np.testing.assert_allclose(got, poses, **close)
    np.testing.assert_allclose(gradient, expected, **close)
    mapped = jax.pmap(one)(votes)
    np.testing.assert_allclose(mapped, poses, **close)


BATCH = PartitionSpec("batch")
WHOLE = PartitionSpec()


@pytest.mark.parametrize("varying", ["votes", "logits", "bias", "where"])
def test_under_shard_map_whichever_argument_is_sharded(varying):
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    arguments = {
        "votes": votes_of(2),
        "logits": votes_of(2)[..., 0],
        "bias": votes_of(2)[:, 0],
        "where": jnp.array([[True] * CHILDREN, [True, False] * (CHILDREN // 2)]),
    }
    arguments = {k: v if k == varying else v[:1] for k, v in arguments.items()}

    def one(arguments):
        arguments = {k: v[0] for k, v in arguments.items()}
        return dynamic_routing(**arguments).activations[None]

    specs = {k: BATCH if k == varying else WHOLE for k in arguments}
    sharded = jax.shard_map(one, mesh=mesh, in_specs=(specs,), out_specs=BATCH)
    for device, activations in enumerate(jax.jit(sharded)(arguments)):
        own = {k: v[device : device + 1] if k == varying else v for k, v in arguments.items()}
        np.testing.assert_allclose(activations, one(own)[0], rtol=1e-5, atol=1e-6)


def test_gradients_under_shard_map():
    mesh = Mesh(np.array(jax.devices()), ("batch",))

    def loss(votes):
        return dynamic_routing(votes).activations[..., 0]

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=BATCH, out_specs=BATCH)
    votes = votes_of(16)
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda v: sharded(v).sum()))(votes),
        jax.jit(jax.grad(lambda v: loss(v).sum()))(votes),
        rtol=1e-4,
        atol=1e-6,
    )


def test_exported_for_every_platform():
    function = jax.jit(lambda v: tuple(dynamic_routing(v, bias=jnp.zeros((PARENTS, FEATURES)))))
    exported = export.export(function, platforms=["cpu", "cuda", "tpu"])(votes_of(2))
    for a, b in zip(exported.call(votes_of(2)), function(votes_of(2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_exported_with_a_symbolic_batch():
    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, CHILDREN, PARENTS, FEATURES), jnp.float32)
    exported = export.export(jax.jit(lambda v: dynamic_routing(v).poses))(shape)
    for size in (1, 3):
        np.testing.assert_allclose(
            exported.call(votes_of(size)),
            dynamic_routing(votes_of(size)).poses,
            rtol=1e-5,
            atol=1e-7,
        )


def test_two_stacked_layers_have_finite_gradients():
    shapes = (2, 8, 4), (8, 4, 5, 6), (5, 6, 3, 4)
    tokens, first, second = (votes_of(shape=shape, seed=n) for n, shape in enumerate(shapes))
    tokens = tokens.at[0, 0].set(0)

    def loss(first, second, tokens):
        hidden = dynamic_routing(dense_votes(tokens, first)).poses
        return dynamic_routing(dense_votes(hidden, second)).activations.sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    for scale in (0.0, 1.0):
        gradients = gradient(scale * first, second, tokens)
        assert all_finite(gradients)


def test_pmapped_gradients_are_those_of_the_whole_batch():
    weights, tokens = votes_of(shape=(6, 4, 3, 5)), votes_of(16, shape=(6, 4))

    def loss(weights, tokens):
        return dynamic_routing(dense_votes(tokens, weights)).activations[:, 0].mean()

    def step(weights, tokens):
        return jax.lax.pmean(jax.grad(loss)(weights, tokens), "batch")

    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=None)
    np.testing.assert_allclose(
        mapped(weights, tokens.reshape(8, 2, 6, 4)),
        jax.jit(jax.grad(loss))(weights, tokens),
        rtol=1e-5,
        atol=1e-7,
    )


BAD = [
    ({"leaky": "no"}, TypeError, "leaky must be True or False, got 'no'"),
    ({"stop_gradient": None}, TypeError, "stop_gradient must be True or False, got None"),
    ({"num_iterations": 0}, ValueError, "num_iterations must be at least 1, got 0"),
    ({"num_iterations": 2.0}, TypeError, "num_iterations must be a Python integer, got 2.0"),
    ({"logits": jnp.zeros((2, 3))}, ValueError, r"logits must broadcast to \(6, 4\), got .*2, 3"),
    ({"logits": jnp.zeros((6, 4), int)}, TypeError, "logits must be a floating-point array"),
    ({"bias": jnp.zeros(5)}, ValueError, r"bias must have shape \[J, D\] = \(4, 5\), got \(5,\)"),
    ({"where": jnp.ones(6)}, TypeError, "where must be a bool array, got dtype float32"),
    ({"where": jnp.ones(5, bool)}, ValueError, r"where must broadcast to \(6,\), got shape \(5,\)"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=[m for *_, m in BAD])
def test_bad_options_are_named_while_tracing(options, error, match):
    with pytest.raises(error, match=match):
        jax.jit(lambda v: capsjax.dynamic_routing(v, **options))(votes_of())


def test_bad_votes_are_named():
    with pytest.raises(ValueError, match=r"votes must have shape .*got shape \(3, 4\)"):
        dynamic_routing(jnp.ones((3, 4)))
    with pytest.raises(TypeError, match="votes must be a floating-point array, got dtype int32"):
        dynamic_routing(jnp.ones((3, 4, 2), int))


def test_a_traced_number_of_iterations_is_named():
    with pytest.raises(TypeError, match="num_iterations must be a Python integer"):
        jax.jit(lambda v, n: capsjax.dynamic_routing(v, num_iterations=n))(votes_of(), 3)
