"""What holds for every routing algorithm; dynamic routing has a file of its own besides."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import FLOATS, all_finite, assert_close, assert_gradients
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, PartitionSpec

import capsjax
from capsjax import Routed
from capsjax.routing.trace import traced

KEY = jax.random.key(7)


class Self:
    """Self-routing with activations and logits that belong to the child, as a layer gives them."""

    def __call__(self, votes, where=None):
        # Functions of the child's own votes: permuted with it, masked with it.
        activations = 0.5 + 0.5 * jnp.tanh(votes[..., 0, 0])
        logits = votes[..., 0] / 4
        return capsjax.self_routing(votes, activations, logits, where=where)

    @staticmethod
    def reference(votes):
        activations = 0.5 + 0.5 * np.tanh(votes[:, 0, 0])
        return references.self_routing(votes, activations, votes[..., 0] / 4)


class Clusters:
    """EM or variational routing, with activations that belong to the child."""

    BETA_A, BETA_U = np.array([0.5, -0.25, 0.0, 1.0, 0.3]), np.array([0.1, 0.0, -0.2, 0.4, 0.2])

    def __init__(self, function, reference):
        self.function, self.reference_function = function, reference

    def betas(self, parents, dtype):
        return (
            jnp.asarray(self.BETA_A[:parents], dtype),
            jnp.asarray(self.BETA_U[:parents], dtype),
        )

    def arguments(self, votes, betas=None):
        """Activations, functions of the child's own votes, and the parents' costs."""
        beta_a, beta_u = self.betas(votes.shape[-2], votes.dtype) if betas is None else betas
        # Computed exactly enough in every dtype.
        first = votes[..., 0, 0].astype(jnp.promote_types(votes.dtype, jnp.float32))
        return {"activations": 0.5 + 0.4 * jnp.tanh(first), "beta_a": beta_a, "beta_u": beta_u}

    def __call__(self, votes, num_iterations=3, where=None, betas=None):
        given = self.arguments(votes, betas)
        return self.function(votes, **given, num_iterations=num_iterations, where=where)

    def reference(self, votes, num_iterations=3):
        activations = 0.5 + 0.4 * np.tanh(votes[:, 0, 0])
        parents = votes.shape[1]
        beta_a, beta_u = self.BETA_A[:parents], self.BETA_U[:parents]
        return self.reference_function(votes, activations, beta_a, beta_u, num_iterations)


EM = Clusters(capsjax.em_routing, references.em_routing)
VARIATIONAL = Clusters(capsjax.variational_routing, references.variational_routing)


def heinsen_parameters(children, in_features, parents, features):
    rng = np.random.default_rng(children)
    shapes = capsjax.HeinsenParameters.shapes(children, in_features, parents, features)
    return {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()}


class Heinsen:
    """Heinsen's routing of children whose poses are their votes, one after the other."""

    @staticmethod
    def parameters(votes):
        parents, features = votes.shape[-2:]
        return heinsen_parameters(1, parents * features, parents, features)

    def __call__(self, votes, num_iterations=2, where=None):
        parameters = capsjax.HeinsenParameters(
            **{
                name: jnp.asarray(x, jnp.promote_types(votes.dtype, jnp.float32))
                for name, x in self.parameters(votes).items()
            }
        )
        poses = votes.reshape(*votes.shape[:-2], -1)
        return capsjax.heinsen_routing(
            poses, parameters, num_iterations=num_iterations, where=where
        )

    def reference(self, votes, num_iterations=2):
        poses = votes.reshape(len(votes), -1)
        return references.heinsen_routing(poses, self.parameters(votes), num_iterations)


HEINSEN = Heinsen()


def random_reference(votes):
    logits = np.asarray(jax.random.normal(KEY, votes.shape[:2]), np.float64)
    return references.squashed(references.softmax(logits), votes)


ALGORITHMS = {
    "dynamic": (capsjax.dynamic_routing, lambda v: references.dynamic_routing(v, 3)),
    "uniform": (capsjax.uniform_routing, references.uniform_routing),
    "random": (functools.partial(capsjax.random_routing, key=KEY), random_reference),
    "kmeans": (capsjax.kmeans_routing, lambda v: references.kmeans_routing(v, 3)),
    "efficient": (capsjax.efficient_routing, references.efficient_routing),
    "attention": (capsjax.attention_routing, lambda v: references.attention_routing(v, 2)),
    "self": (Self(), Self.reference),
    "em": (EM, EM.reference),
    "variational": (VARIATIONAL, VARIATIONAL.reference),
    "heinsen": (HEINSEN, HEINSEN.reference),
}
ITERATIVE = {
    "dynamic": (capsjax.dynamic_routing, references.dynamic_routing),
    "kmeans": (capsjax.kmeans_routing, references.kmeans_routing),
    "attention": (capsjax.attention_routing, references.attention_routing),
    "em": (EM, EM.reference),
    "variational": (VARIATIONAL, VARIATIONAL.reference),
    "heinsen": (HEINSEN, HEINSEN.reference),
}
CHILDREN, PARENTS, FEATURES = 6, 4, 5

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def votes_of(*leading, dtype="float32", seed=0, shape=(CHILDREN, PARENTS, FEATURES)):
    rng = np.random.default_rng(seed)
    # Converted on the host, which compiles nothing.
    return jnp.asarray(rng.normal(size=(*leading, *shape)).astype(jnp.dtype(dtype)))


@functools.cache
def compiled(name, **options):
    """The algorithm as one program, which tests of the same shape share."""
    return jax.jit(functools.partial(ALGORITHMS[name][0], **options))


def assert_routed(routed, expected, terms=CHILDREN, **tolerances):
    assert isinstance(routed, Routed)
    for actual, reference in zip(routed, expected, strict=True):
        assert_close(actual, reference, terms=terms, **tolerances)


@every_algorithm
def test_is_what_the_equations_say_to_1e_5(name):
    votes = votes_of(seed=1)
    reference = ALGORITHMS[name][1](np.asarray(votes, np.float64))
    for actual, expected in zip(compiled(name)(votes), reference, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
@pytest.mark.parametrize("name", ITERATIVE)
def test_every_number_of_iterations(name, num_iterations):
    votes = votes_of(seed=2)
    expected = ITERATIVE[name][1](np.asarray(votes, np.float64), num_iterations)
    routed = compiled(name, num_iterations=num_iterations)(votes)
    assert_routed(routed, expected, terms=100)
    if num_iterations == 1:
        np.testing.assert_allclose(routed.coupling, 1 / PARENTS, rtol=1e-6)


# One of each dtype, number of leading axes, and axis of size 1: each is a program to compile.
@every_algorithm
@pytest.mark.parametrize(
    ("leading", "sizes", "dtype"),
    [((), (1, 4, 1), "float32"), ((2, 1), (5, 1, 3), "bfloat16"), ((2,), (3, 5, 4), "float16")],
    ids=str,
)
def test_over_shapes_and_dtypes(name, leading, sizes, dtype):
    check_against_reference(name, leading, sizes, dtype)


@pytest.mark.slow
@every_algorithm
@settings(max_examples=25)
@given(
    leading=st.lists(st.integers(1, 2), max_size=2),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    dtype=st.sampled_from(FLOATS),
)
def test_over_any_shapes_and_dtypes(name, leading, sizes, dtype):
    check_against_reference(name, leading, sizes, dtype)


def check_against_reference(name, leading, sizes, dtype):
    function, reference = ALGORITHMS[name]
    # Read-outs of the child's own votes are computed in the votes' dtype: keep them exact.
    dtype = "float32" if name == "self" else dtype
    votes = np.asarray(votes_of(*leading, dtype=dtype, shape=sizes))
    # One program for a new shape, and no other for the index of an example.
    routed = Routed(*map(np.asarray, jax.jit(function)(votes)))
    children, parents, features = sizes
    assert routed.poses.shape == (*leading, parents, features)
    assert routed.activations.shape == (*leading, parents)
    assert routed.coupling.shape == (*leading, children, parents)
    assert {x.dtype for x in routed} == {jnp.dtype(dtype)}
    for index in itertools.product(*map(range, leading)):
        expected = reference(votes[index].astype(np.float64))
        # One feature normalises to its sign, or to nothing: ill-conditioned by nature.
        scale = 4.0 if features > 1 else 400.0
        assert_routed(Routed(*(x[index] for x in routed)), expected, scale=scale)


@every_algorithm
def test_couplings_of_a_child_sum_to_one_over_the_parents(name):
    coupling = compiled(name)(votes_of(8)).coupling
    np.testing.assert_allclose(coupling.sum(-1), 1, rtol=1e-6)


@every_algorithm
def test_does_not_depend_on_the_batch_around(name):
    function, batch = compiled(name), votes_of(8)
    changed = function(batch.at[1:].multiply(-3))
    for whole, other in zip(function(batch), changed, strict=True):
        np.testing.assert_array_equal(whole[0], other[0])


@every_algorithm
def test_is_equivariant_to_permutations_of_children(name):
    if name == "random":
        pytest.skip("its couplings belong to places, not to children")
    function, votes = compiled(name), votes_of()
    order = np.array([3, 0, 5, 1, 4, 2])
    routed, permuted = function(votes), function(votes[order])
    assert_close(permuted.poses, routed.poses, terms=CHILDREN)
    assert_close(permuted.coupling, routed.coupling[order], terms=CHILDREN)


@every_algorithm
def test_is_equivariant_to_permutations_of_parents(name):
    if name in ("random", "self", "heinsen"):
        pytest.skip("its couplings belong to places, not to parents")
    function, votes = compiled(name), votes_of()
    if name in ("em", "variational"):
        # Which read the child's activation off its first vote: of a parent that stays in place.
        votes = votes.at[:, 0, 0].set(votes[:, 2, 0])
        zeros = functools.partial(ALGORITHMS[name][0], betas=(np.zeros(PARENTS, "f4"),) * 2)
        function = jax.jit(zeros)
    order = np.array([2, 0, 3, 1])
    routed, permuted = function(votes), function(votes[:, order])
    assert_close(permuted.poses, routed.poses[order], terms=CHILDREN)
    assert_close(permuted.activations, routed.activations[order], terms=CHILDREN)


def with_gradient(function):
    """The function's results, and the gradient of some of them, as one program."""

    def loss(votes):
        routed = function(votes)
        total = (
            routed.poses[..., 0].astype(jnp.float32).sum()
            + routed.activations[..., 0].astype(jnp.float32).sum()
        )
        return total, routed

    @jax.jit
    def both(votes):
        (_, routed), gradient = jax.value_and_grad(loss, has_aux=True)(votes)
        return routed, gradient

    return both


@functools.cache
def masking(name):
    """The algorithm of votes and a mask with its gradient, compiled once."""
    function = ALGORITHMS[name][0]
    return jax.jit(
        lambda votes, where: with_gradient(functools.partial(function, where=where))(votes)
    )


# One more than there are otherwise.
MORE = (CHILDREN + 1, PARENTS, FEATURES)
NOT_THE_LAST = np.arange(CHILDREN + 1) < CHILDREN


@every_algorithm
@pytest.mark.parametrize("masked", [jnp.nan, 1e30, 7.0])
def test_masked_children_have_no_influence_and_no_gradient(name, masked):
    votes = np.concatenate([votes_of(), votes_of(seed=9)[:1]])
    expected, _ = masking(name)(votes, NOT_THE_LAST)
    votes[-1] = masked
    routed, gradient = masking(name)(votes, NOT_THE_LAST)
    assert_close(routed.poses, expected.poses)
    assert_close(routed.activations, expected.activations)
    np.testing.assert_array_equal(routed.coupling[-1], 0)
    if name != "random":  # whose couplings would be drawn for another number of children
        assert_close(expected.poses, compiled(name)(votes_of()).poses, terms=CHILDREN)
    # The activations and logits of some are read off the broken votes by the test itself.
    if name not in ("self", "em", "variational") or np.isfinite(masked):
        np.testing.assert_array_equal(gradient[-1], 0)


@every_algorithm
def test_a_nan_stays_nan_in_its_example(name):
    # Of the first child, which is not masked.
    votes = np.array(votes_of(shape=MORE))
    votes[0] = np.nan
    routed, gradient = masking(name)(votes, NOT_THE_LAST)
    for x in (routed.poses, routed.activations, gradient[0]):
        assert np.isnan(x).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda votes, x, **o: capsjax.dynamic_routing(votes, logits=x, **o),
        lambda votes, x, **o: capsjax.dynamic_routing(votes, logits=x, leaky=True, **o),
        lambda votes, x, **o: capsjax.efficient_routing(votes, prior=x, **o),
        lambda votes, x, **o: capsjax.self_routing(votes, x[:, 0], x, **o),
        lambda votes, x, **o: capsjax.em_routing(votes, x[:, 0], **EM_OPTIONS, **o),
        lambda votes, x, **o: capsjax.variational_routing(votes, x[:, 0], **EM_OPTIONS, **o),
    ],
    ids=["dynamic", "leaky", "efficient", "self", "em", "variational"],
)
def test_what_masked_children_hold_besides_votes_has_no_influence(function):
    votes, x = votes_of(), votes_of(shape=(CHILDREN, PARENTS), seed=1)

    @jax.jit
    def gradients(votes, x):
        def loss(*arguments):
            return function(*arguments, where=jnp.arange(CHILDREN) > 0).poses[..., 0].sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(votes, x)

    got = gradients(votes.at[0].set(jnp.nan), x.at[0].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, got, gradients(votes, x))


def test_children_without_mass_do_not_hide_a_nan():
    votes = votes_of().at[0].set(jnp.nan)
    arguments = votes, np.zeros(CHILDREN, "f4"), np.zeros((CHILDREN, PARENTS), "f4")
    assert np.isnan(jax.jit(capsjax.self_routing)(*arguments).poses).all()


def kinds(shape):
    """Votes at the ends of a range, and equal ones."""
    normal = np.random.default_rng(0).normal(size=shape)
    return 0 * normal, 1e-8 * normal, normal, 1e4 * normal, np.ones(shape)


# The longest recurrence in the narrowest range; the rest is slow.
FINITE = [(6, 4, "float16", 10)]
FINITE += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product([1, 6], [1, 4], FLOATS, [1, 3, 10])
    if case not in FINITE
]


@every_algorithm
@pytest.mark.parametrize(("children", "parents", "dtype", "num_iterations"), FINITE)
def test_values_and_gradients_are_finite(name, children, parents, dtype, num_iterations):
    function = ALGORITHMS[name][0]
    if name in ITERATIVE:
        function = functools.partial(function, num_iterations=num_iterations)
    program = with_gradient(function)
    for votes in kinds((children, parents, FEATURES)):
        assert all_finite(program(votes.astype(jnp.dtype(dtype))))


@every_algorithm
def test_values_and_gradients_of_a_lone_child_are_finite(name):
    for votes in kinds(MORE):
        assert all_finite(masking(name)(np.float32(votes), np.arange(len(votes)) == 0))


@every_algorithm
def test_gradients(name):
    function, votes = ALGORITHMS[name][0], np.random.default_rng(3).normal(size=(3, 2, 4))
    with jax.enable_x64(True):
        assert_gradients(function, votes)
        # Reverse mode transposes forward mode, so that this only has to be there.
        jax.eval_shape(lambda v: jax.jvp(function, (v,), (v,)), votes)


# XLA:CPU of jaxlib 0.10.2 computes those of efficient routing wrongly, by orders of magnitude.
LEADING = list(itertools.product(ALGORITHMS, [False, True], [4, 64]))
FAST_LEADING = {("dynamic", True, 4), *(case for case in LEADING if case[0] == "efficient")}


@pytest.mark.parametrize(
    ("name", "mapped", "batch"),
    [
        pytest.param(*case, marks=() if case in FAST_LEADING else pytest.mark.slow)
        for case in LEADING
    ],
)
def test_gradients_under_a_leading_axis_of_one(name, mapped, batch):
    votes = np.asarray(votes_of(1, batch, shape=(16, 5, 16))) / 4
    gradient = gradient_of_signs(name)
    expected = np.asarray(gradient(votes[0]))
    function = jax.jit(jax.vmap(gradient)) if mapped else gradient
    np.testing.assert_allclose(function(votes)[0], expected, atol=1e-2 * np.abs(expected).max())


@functools.cache
def gradient_of_signs(name):
    @jax.jit
    @jax.grad
    def gradient(votes):
        signs = jnp.cos(jnp.arange(16.0)).reshape((1,) * (votes.ndim - 2) + (16,))
        return jnp.sum(ALGORITHMS[name][0](votes).poses * signs)

    return gradient


@every_algorithm
def test_under_shard_map_and_exported(name):
    function, votes = compiled(name), votes_of(8)
    mesh, spec = Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch")
    sharded = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))
    # What is exported computes the same, which test_dynamic.py shows.
    assert export.export(function, platforms=["cpu", "cuda", "tpu"])(votes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        sharded(votes),
        function(votes),
    )


@pytest.mark.parametrize("function", ["attention_routing", "dynamic_routing", "kmeans_routing"])
def test_the_first_logits_are_hidden_from_constant_folding(function):
    route = jax.jit(functools.partial(getattr(capsjax, function), num_iterations=2))
    assert "optimization_barrier" in route.lower(jnp.ones((3, 2, 4))).as_text()


def test_kmeans_ignores_the_length_of_its_centres():
    # Twice as many children of each kind: the same couplings, while dynamic routing sharpens.
    votes = votes_of()
    twice = jnp.concatenate([votes, votes])
    once, again, *dynamic = (
        np.asarray(compiled(name)(v).coupling[:CHILDREN])
        for name in ("kmeans", "dynamic")
        for v in (votes, twice)
    )
    np.testing.assert_allclose(again, once, rtol=1e-5)
    assert np.abs(dynamic[0] - dynamic[1]).max() > 1e-3


def test_biases_and_priors():
    votes = votes_of()
    exact = np.asarray(votes, np.float64)
    bias = np.random.default_rng(5).normal(size=(PARENTS, FEATURES)).astype(np.float32)
    assert_routed(
        jax.jit(capsjax.uniform_routing)(votes, bias=bias), references.uniform_routing(exact, bias)
    )
    assert_routed(
        jax.jit(capsjax.kmeans_routing)(votes, bias=bias),
        references.kmeans_routing(exact, 3, bias),
        100,
    )
    prior = np.random.default_rng(6).normal(size=(CHILDREN, PARENTS)).astype(np.float32)
    assert_routed(
        jax.jit(capsjax.efficient_routing)(votes, prior=prior),
        references.efficient_routing(exact, prior),
    )
    scale, offset = bias[0], bias[1]
    assert_routed(
        jax.jit(capsjax.attention_routing)(votes, scale=scale, offset=offset),
        references.attention_routing(exact, 2, scale, offset),
        100,
    )


def test_random_couplings_follow_the_key_and_are_shared_by_examples():
    votes = votes_of(2)
    function = jax.jit(capsjax.random_routing)
    first, again, other = (function(votes, key=jax.random.key(k)).coupling for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[0], first[1])
    assert (first != other).any()


def test_self_routing_activations_are_shares():
    votes, logits = votes_of(), votes_of(shape=(CHILDREN, PARENTS))
    activations = np.linspace(0, 1, CHILDREN, dtype="f4")
    self_routing = jax.jit(capsjax.self_routing)
    routed = self_routing(votes, activations, logits)
    np.testing.assert_allclose(routed.activations.sum(), 1, rtol=1e-6)
    # A silent child has no influence.
    changed = self_routing(votes.at[0].set(100.0), activations, logits)
    np.testing.assert_array_equal(changed.poses, routed.poses)
    silent = self_routing(votes, np.zeros(CHILDREN, "f4"), logits)
    np.testing.assert_array_equal(silent.poses, 0)
    np.testing.assert_array_equal(silent.activations, 0)


def test_efficient_squash_keeps_the_length_of_short_vectors():
    short = np.array([[1e-4, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(jax.jit(capsjax.exponential_squash)(short), short, rtol=1e-4)


BAD = [
    ("kmeans_routing", {"num_iterations": 0}, ValueError, "num_iterations must be at least 1"),
    ("attention_routing", {"num_iterations": 1.5}, TypeError, "must be a Python integer, got 1.5"),
    ("kmeans_routing", {"num_iterations": True}, TypeError, "must be a Python integer, got True"),
    (
        "kmeans_routing",
        {"num_iterations": 2**64},
        ValueError,
        "must be at most 21474",
    ),
    ("attention_routing", {"epsilon": None}, TypeError, "epsilon must be a number, got None"),
    (
        "attention_routing",
        {"epsilon": Fraction(1, 2)},
        TypeError,
        "epsilon must be a number, got F",
    ),
    ("attention_routing", {"epsilon": 10**400}, ValueError, "epsilon must be finite, got 1000"),
    ("attention_routing", {"epsilon": np.float32("nan")}, ValueError, "epsilon must be finite"),
    ("attention_routing", {"epsilon": jnp.float32(-1)}, ValueError, "epsilon must be at least 0"),
    ("attention_routing", {"epsilon": jnp.ones(4)}, ValueError, r"epsilon must be one number, got"),
    ("random_routing", {"key": 0}, TypeError, "key must be a single jax.random.key, got int"),
    ("attention_routing", {"scale": jnp.ones(3)}, ValueError, r"scale must have shape \[D\] = \(5"),
    ("uniform_routing", {"bias": jnp.ones(3)}, ValueError, r"bias must have shape \[J, D\]"),
    ("efficient_routing", {"prior": jnp.ones(3)}, ValueError, r"prior must broadcast to \(6, 4\)"),
    ("efficient_routing", {"where": jnp.ones(6)}, TypeError, "where must be a bool array"),
    (
        "self_routing",
        {"activations": jnp.ones(5), "logits": jnp.ones((6, 4))},
        ValueError,
        r"activations must broadcast to \(6,\), got shape \(5,\)",
    ),
]


@pytest.mark.parametrize(("function", "options", "error", "match"), BAD)
def test_bad_arguments_are_named_while_tracing(function, options, error, match):
    with pytest.raises(error, match=match):
        jax.jit(lambda v: getattr(capsjax, function)(v, **options))(votes_of())


@pytest.mark.parametrize("function", ["em_routing", "variational_routing"])
def test_another_softmax_is_a_function(function):
    present, beta = jnp.ones(votes_of().shape[:-2]), jnp.ones(votes_of().shape[-2])
    with pytest.raises(TypeError, match="normalize must be a function, got 'softmax'"):
        getattr(capsjax, function)(
            votes_of(), present, beta_a=beta, beta_u=beta, normalize="softmax"
        )


def test_numbers_of_variational_routing_may_be_traced():
    votes = votes_of()
    present, beta = jnp.ones(votes.shape[:-2]), jnp.zeros(votes.shape[-2])
    function = functools.partial(capsjax.variational_routing, beta_a=beta, beta_u=beta)
    numbers = {"alpha": 0.5, "kappa": 2.0, "nu": 9.0, "psi": 1.5}
    expected = function(votes, present, **numbers)
    variables = {name: nnx.Param(jnp.float32(value)) for name, value in numbers.items()}
    for options in (numbers, variables):
        traced = jax.jit(function)(votes, present, **options)
        np.testing.assert_allclose(traced.poses, expected.poses, rtol=1e-4, atol=1e-5)
    untraced = function(votes, present, **variables)
    np.testing.assert_allclose(untraced.poses, expected.poses, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="psi must be above 0, got 0"):
        function(votes, present, psi=jnp.float32(0))


@pytest.mark.parametrize("function", ["uniform_routing", "kmeans_routing", "efficient_routing"])
def test_bad_votes_are_named(function):
    with pytest.raises(ValueError, match=r"votes must have shape .* got shape \(3, 4\)"):
        getattr(capsjax, function)(jnp.ones((3, 4)))


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
def test_heinsen_routing_with_parameters_of_every_child(num_iterations):
    rng = np.random.default_rng(8)
    named, poses = heinsen_parameters(6, 5, 4, 3), rng.normal(size=(2, 6, 5))
    parameters = capsjax.HeinsenParameters(**{k: jnp.float32(x) for k, x in named.items()})
    function = jax.jit(functools.partial(capsjax.heinsen_routing, num_iterations=num_iterations))
    routed = Routed(*map(np.asarray, function(jnp.float32(poses), parameters)))
    for index in range(2):
        expected = references.heinsen_routing(poses[index], named, num_iterations)
        assert_routed(Routed(*(x[index] for x in routed)), expected, terms=200)
    with pytest.raises(ValueError, match=r"use must have shape \(6, 4\), got \(5, 4\)"):
        capsjax.heinsen_routing(jnp.float32(poses), parameters._replace(use=jnp.ones((5, 4))))


def test_heinsen_routing_stores_no_votes():
    shapes = capsjax.HeinsenParameters.shapes(64, 32, 16, 128)
    parameters = capsjax.HeinsenParameters(*map(jnp.ones, shapes.values()))
    text = str(jax.make_jaxpr(capsjax.heinsen_routing)(jnp.ones((64, 32)), parameters))
    assert "64,16,128" not in text
    assert "64,16]" in text


EM_OPTIONS = {"beta_a": jnp.zeros(PARENTS), "beta_u": jnp.zeros(PARENTS)}


@pytest.mark.parametrize("function", [capsjax.em_routing, capsjax.variational_routing])
def test_a_silent_child_has_no_influence(function):
    function, votes, activations = jax.jit(function), votes_of(), np.linspace(0, 1, CHILDREN)
    routed = function(votes, activations, **EM_OPTIONS)
    changed = function(votes.at[0].set(3.0), activations, **EM_OPTIONS)
    np.testing.assert_array_equal(changed.poses, routed.poses)
    np.testing.assert_array_equal(changed.activations, routed.activations)


def test_em_responsibilities_of_a_lone_child_stay_equal():
    # Whatever it votes for, every parent's cluster is that vote.
    votes = votes_of(shape=(1, PARENTS, FEATURES))
    function = jax.jit(functools.partial(capsjax.em_routing, num_iterations=5))
    routed = function(votes, np.ones(1), **EM_OPTIONS)
    np.testing.assert_allclose(routed.coupling, 1 / PARENTS, rtol=1e-5)
    np.testing.assert_allclose(routed.poses, votes[0], rtol=1e-5)


def test_em_follows_a_shift_of_the_votes():
    function, votes, activations = jax.jit(capsjax.em_routing), votes_of(), np.ones(CHILDREN)
    routed = function(votes, activations, **EM_OPTIONS)
    shifted = function(votes + 2, activations, **EM_OPTIONS)
    np.testing.assert_allclose(shifted.poses, routed.poses + 2, atol=1e-4)
    np.testing.assert_allclose(shifted.coupling, routed.coupling, atol=1e-4)
    np.testing.assert_allclose(shifted.activations, routed.activations, atol=1e-4)


def test_em_couples_children_that_agree_and_activates_their_parent():
    # Five children say the same to parent 0; to the others, nobody agrees with anybody.
    votes = 3 * votes_of(seed=4)
    votes = votes.at[:5, 0].set(jnp.arange(FEATURES) / 4)
    function = jax.jit(functools.partial(capsjax.em_routing, inverse_temperature=1.0))
    routed = function(votes, np.ones(CHILDREN), **EM_OPTIONS)
    assert int(jnp.argmax(routed.activations)) == 0
    assert (routed.coupling[:5, 0] > 0.9).all()
    assert float(routed.coupling[5, 0]) < 0.1


def test_without_a_bias_dynamic_routing_cannot_tell_a_vote_from_its_opposite():
    # Peer, Stabinger, Rodriguez-Sanchez 2021.
    votes, bias = votes_of(), jnp.ones((PARENTS, FEATURES))
    plain, opposite = map(compiled("dynamic"), (votes, -votes))
    np.testing.assert_array_equal(plain.activations, opposite.activations)
    function = jax.jit(capsjax.dynamic_routing)
    biased = [function(v, bias=bias).activations for v in (votes, -votes)]
    assert float(jnp.abs(biased[0] - biased[1]).min()) > 0.01


def test_attention_poses_have_no_scale():
    votes = 10 * votes_of()
    once, twice = (compiled("attention", num_iterations=1)(v) for v in (votes, 2 * votes))
    np.testing.assert_allclose(once.poses, twice.poses, atol=1e-4)


def test_variational_priors_pull_towards_zero():
    votes, options = votes_of() + 2, {"num_iterations": 1, **EM_OPTIONS}

    @jax.jit
    def poses(votes):
        ones = jnp.ones(CHILDREN)
        return [
            capsjax.variational_routing(votes, ones, kappa=k, **options).poses for k in (1e-3, 1e3)
        ]

    near, far = map(np.asarray, poses(votes))
    np.testing.assert_allclose(near, votes.mean(0), rtol=1e-2)
    assert np.abs(far).max() < 0.02


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"nu": 4.0}, r"nu must be above 4, got 4.0"),
        ({"beta_a": jnp.ones(3)}, r"beta_a must have shape \[J\] = \(4,\), got \(3,\)"),
    ],
)
def test_bad_priors_are_named(option, expected):
    with pytest.raises(ValueError, match=expected):
        capsjax.variational_routing(votes_of(), jnp.ones(CHILDREN), **{**EM_OPTIONS, **option})


@pytest.mark.parametrize("name", traced())
def test_a_trace_holds_what_every_number_of_iterations_gives(name):
    votes, args = votes_of(seed=2), {}
    if name in ("em", "variational"):
        args = ALGORITHMS[name][0].arguments(votes)
    function = functools.partial(capsjax.routing_trace, routing=name, num_iterations=4)
    trace = jax.tree.map(np.asarray, jax.jit(function)(votes, **args))
    assert trace.poses.shape == (4, PARENTS, FEATURES)
    for t in (1, 2, 4):  # those of other tests
        routed = compiled(name, num_iterations=t)(votes)
        np.testing.assert_allclose(trace.poses[t - 1], routed.poses, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            trace.activations[t - 1], routed.activations, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(trace.coupling[t - 1], routed.coupling, rtol=1e-4, atol=1e-5)
    agreement = np.einsum("ijd,tjd->tij", votes, trace.poses)
    np.testing.assert_allclose(trace.agreement, agreement, rtol=1e-3, atol=1e-4)
    coupling = references.softmax(trace.logits)
    np.testing.assert_allclose(coupling, trace.coupling, rtol=1e-5, atol=1e-6)


def test_a_trace_s_logits_are_the_prior_and_the_agreements_so_far():
    votes = votes_of()
    prior = votes_of(shape=(CHILDREN, PARENTS))
    where = jnp.arange(CHILDREN) > 0
    function = jax.jit(capsjax.routing_trace)
    trace = function(votes, logits=prior, where=where)
    np.testing.assert_allclose(trace.logits[0, 1:], prior[1:], rtol=1e-6)
    expected = prior.at[0].set(0) + trace.agreement[:2].sum(0)
    np.testing.assert_allclose(trace.logits[2], expected, rtol=1e-4)
    np.testing.assert_array_equal(trace.coupling[:, 0], 0)
    broken = function(votes.at[0].set(jnp.nan), logits=prior, where=where)
    np.testing.assert_array_equal(broken.agreement, trace.agreement)


def test_algorithms_have_names():
    names = capsjax.routing.algorithms()
    assert len(names) == 10
    for name in names:
        record = capsjax.routing.algorithm(name)
        assert record.function is getattr(capsjax, f"{name}_routing")
        assert (record.name, record.paper != "") == (name, True)
    with pytest.raises(ValueError, match=r"routing must be one of .*em, .* got 'sinkhorn'"):
        capsjax.routing.algorithm("sinkhorn")
    with pytest.raises(ValueError, match=r"routing must be one of attention, .* got 'uniform'"):
        capsjax.routing_trace(votes_of(), routing="uniform")
