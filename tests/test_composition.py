"""Routing goes into any JAX model and survives every transformation that a model meets.

Part one: every algorithm, as a layer of pure functions with all that it learns, under the
transformations of JAX. Part two: the same layers inside of the libraries that people write models
in; each model has to equal the plain functions, and to learn.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_gradients
from flax import linen, nnx
from flax.nnx import bridge
from jax import export
from jax.sharding import Mesh, PartitionSpec

import capsjax
from capsjax import HeinsenParameters, Routed, RoutingTrace, dense_votes
from capsjax.nn import DenseCapsules
from capsjax.routing import Children, Sizes

# Options with which these few children and dimensions show what an algorithm does.
OPTIONS: dict[str, dict[str, Any]] = {
    # A low temperature, without which so few children hardly move the activations.
    "em": {"inverse_temperature": 1.0},
    "attention": {"num_iterations": 3},
    "heinsen": {"num_iterations": 3},
}


def shapes(name, *sizes):
    """The shape of each array that a layer of I, K, J and D learns."""
    record = capsjax.routing.algorithm(name)
    learned = {n: p.shape for n, p in record.parameters(Sizes(*sizes)).items()}
    kernel = {} if record.makes_votes else {"kernel": tuple(sizes)}
    bias = {"bias": tuple(sizes[2:])} if record.has_bias else {}
    return {**kernel, **learned, **bias}


def layer(name, weights, poses, activations):
    """Votes and routing as one pure function of all that they depend on."""
    given = {**weights, **OPTIONS.get(name, {})}
    kernel = given.pop("kernel", None)
    votes = None if kernel is None else dense_votes(poses, kernel)
    return capsjax.routing.algorithm(name).route(votes, Children(poses, activations), given)


# --- Every algorithm under every transformation -------------------------------------------------

# As many parents as children, of the same size, so that layers can be stacked.
CAPSULES, SIZE, BATCH = 5, 3, 8


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


def weights_of(name, *leading, seed=1):
    each = shapes(name, CAPSULES, SIZE, CAPSULES, SIZE)
    return {
        parameter: normal(*leading, *shape, seed=seed + number)
        for number, (parameter, shape) in enumerate(each.items())
    }


POSES = normal(BATCH, CAPSULES, SIZE)
ACTIVATIONS = jax.nn.sigmoid(normal(BATCH, CAPSULES, seed=20))
# Fixed directions, so that no gradient is zero by symmetry.
DIRECTION = normal(BATCH, CAPSULES, SIZE + 1, seed=21)


def scalar(routed):
    return jnp.vdot(routed.poses, DIRECTION[..., 1:]) + jnp.vdot(
        routed.activations, DIRECTION[..., 0]
    )


def loss(name, weights, poses=POSES, activations=ACTIVATIONS):
    return scalar(layer(name, weights, poses, activations))


def assert_same(actual, expected):
    """The same tree of the same numbers, but for the order in which sums are taken."""

    def same(a, b):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        # Relative to the largest: sums of both signs nearly cancel in some entries.
        largest = float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, largest))

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(same, actual, expected)


@functools.cache
def untransformed(name):
    """What every transformation is compared with: one example at a time.

    One algorithm also runs operation by operation, which for each is dozens of programs.
    """
    weights, function = weights_of(name), functools.partial(layer, name)
    if name != "dynamic":
        function = jax.jit(function)
    each = zip(np.asarray(POSES), np.asarray(ACTIVATIONS), strict=True)
    examples = [function(weights, *map(jnp.asarray, example)) for example in each]
    return jax.tree.map(lambda *xs: np.stack(xs), *examples)


@functools.cache
def with_gradients(name):
    """The algorithm with its gradients as one program, which tests share."""

    def scalar_of(*args):
        routed = layer(name, *args)
        return scalar(routed), routed

    return jax.jit(jax.grad(scalar_of, (0, 1, 2), has_aux=True))


def gradients_of(name):
    return with_gradients(name)(weights_of(name), POSES, ACTIVATIONS)[0]


def some_marked_slow(names, always):
    """All of them; those that are not among `always` run with the slow tests."""
    marks = ((name, () if name in always else pytest.mark.slow) for name in names)
    return pytest.mark.parametrize("name", [pytest.param(name, marks=m) for name, m in marks])


# Two hundred programs in all, which take minutes to compile: all algorithms go through the two
# cheapest tests, and one of them through all.
every_algorithm = pytest.mark.parametrize("name", capsjax.routing.algorithms())
one_algorithm = some_marked_slow(capsjax.routing.algorithms(), ["dynamic"])


@every_algorithm
def test_jit_with_everything_an_argument(name):
    compiled = with_gradients(name)
    _, routed = compiled(weights_of(name), POSES, ACTIVATIONS)
    assert_same(routed, untransformed(name))
    programs = compiled._cache_size()  # another test calls it with NumPy arrays
    # The next batch, and the next step's weights, run the same program.
    compiled(weights_of(name, seed=2), POSES + 1, ACTIVATIONS)
    assert compiled._cache_size() == programs


@one_algorithm
def test_gradients_of_all_that_a_layer_learns(name):
    def function(weights, poses, activations):
        return layer(name, weights, poses, activations)[:2]

    with jax.enable_x64(True):
        assert_gradients(
            function,
            weights_of(name),
            *(np.asarray(x)[:2] for x in (POSES, ACTIVATIONS)),
            forward=True,
        )


@every_algorithm
def test_nothing_that_a_layer_learns_is_without_a_gradient(name):
    weights, poses, activations = gradients_of(name)
    assert all((np.abs(gradient) > 0).any() for gradient in weights.values())
    assert (np.abs(poses) > 0).all()
    takes_activations = capsjax.routing.algorithm(name).takes_activations
    assert (np.abs(activations) > 0).any() == takes_activations


@one_algorithm
def test_vmap_is_a_leading_axis(name):
    poses, activations = map(np.asarray, (POSES, ACTIVATIONS))
    poses = np.stack([poses, -2 * poses, poses[::-1]])
    activations = np.stack([activations, activations**2, activations[::-1]])
    weights, function = weights_of(name), functools.partial(layer, name)
    expected = jax.jit(function)(weights, poses, activations)
    assert expected.poses.shape == (3, BATCH, CAPSULES, SIZE)
    # Over an inner axis, so that the axes have to be moved.
    mapped = jax.vmap(function, in_axes=(None, 1, 1), out_axes=1)
    assert_same(jax.jit(mapped)(weights, poses, activations), expected)


@one_algorithm
def test_vmap_over_the_weights_is_an_ensemble(name):
    function, weights = functools.partial(layer, name), weights_of(name, 2)
    ensemble = jax.jit(jax.vmap(function, in_axes=(0, None, None)))
    routed = jax.tree.map(np.asarray, (ensemble(weights, POSES, ACTIVATIONS), weights))
    for member in range(2):
        actual, own = jax.tree.map(lambda x: x[member], routed)  # noqa: B023
        assert_same(actual, with_gradients(name)(own, POSES, ACTIVATIONS)[1])


@one_algorithm
def test_scan_over_stacked_layers(name):
    depth = 2

    def above(children, weights):
        routed = layer(name, weights, *children)
        return (routed.poses, routed.activations), routed.coupling

    def scanned(weights):
        children, couplings = jax.lax.scan(above, (POSES, ACTIVATIONS), weights)
        return scalar(Routed(*children, None)), (*children, couplings)

    def unrolled(weights):
        children, couplings = (POSES, ACTIVATIONS), []
        for number in range(depth):
            children, coupling = above(children, jax.tree.map(lambda x: x[number], weights))  # noqa: B023
            couplings.append(coupling)
        return scalar(Routed(*children, None)), (*children, jnp.stack(couplings))

    weights = weights_of(name, depth)
    (_, result), gradients = jax.jit(jax.value_and_grad(scanned, has_aux=True))(weights)
    (_, expected), expected_gradients = jax.jit(jax.value_and_grad(unrolled, has_aux=True))(weights)
    assert_same(result, expected)
    assert_same(gradients, expected_gradients)


@one_algorithm
def test_checkpoint_recomputes_the_same(name):
    weights = weights_of(name)
    remat = jax.checkpoint(functools.partial(layer, name))

    def scalar_of(*args):
        routed = remat(*args)
        return scalar(routed), routed

    gradients, routed = jax.jit(jax.grad(scalar_of, (0, 1, 2), has_aux=True))(
        weights, POSES, ACTIVATIONS
    )
    assert_same(routed, untransformed(name))
    assert_same(gradients, gradients_of(name))


@one_algorithm
def test_shard_map_over_the_batch(name):
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    whole, split = PartitionSpec(), PartitionSpec("batch")
    sharded = jax.shard_map(
        functools.partial(layer, name),
        mesh=mesh,
        in_specs=(whole, split, split),
        out_specs=split,
    )

    def scalar_of(*args):
        routed = sharded(*args)
        return scalar(routed), routed

    gradients, routed = jax.jit(jax.grad(scalar_of, (0, 1, 2), has_aux=True))(
        weights_of(name), POSES, ACTIVATIONS
    )
    assert len(routed.poses.sharding.device_set) == 8
    assert_same(routed, untransformed(name))
    # Those of the weights are sums over the devices.
    assert_same(gradients, gradients_of(name))


@one_algorithm
def test_export_stores_the_function_and_its_gradient(name):
    arguments = weights_of(name), POSES, ACTIVATIONS
    exported = export.export(jax.jit(functools.partial(layer, name)))(*arguments)
    stored = export.deserialize(exported.serialize(vjp_order=1))
    routed = stored.call(*arguments)
    assert isinstance(routed, Routed)
    assert_same(routed, untransformed(name))
    gradients = jax.grad(lambda *args: scalar(stored.call(*args)), (0, 1, 2))(*arguments)
    assert_same(gradients, gradients_of(name))


@one_algorithm
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_chips_that_are_not_here(name, platform):
    function = jax.jit(jax.value_and_grad(functools.partial(loss, name)))
    traced = function.trace(weights_of(name), POSES, ACTIVATIONS)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.dot_general" in text
    # What only one kind of chip can run would be called by its name.
    assert "custom_call" not in text


def test_arguments_and_results_of_routing_can_be_stored():
    parameters = HeinsenParameters(**weights_of("heinsen"))
    votes = normal(CAPSULES, CAPSULES, SIZE)
    for function, argument, result in (
        (capsjax.routing_trace, votes, RoutingTrace),
        (lambda p: capsjax.heinsen_routing(POSES[0], p), parameters, Routed),
    ):
        exported = export.export(jax.jit(function))(argument)
        routed = export.deserialize(exported.serialize()).call(argument)
        assert isinstance(routed, result)
        assert_same(routed, function(argument))


# --- In the libraries that people write models in -----------------------------------------------

CLASSES, TOKENS, TOKEN, HIDDEN, POSE = 2, 6, 4, 5, 3
OPTIMIZER = optax.adam(0.03)
LABELS = jnp.arange(BATCH) % CLASSES
# Two kinds of examples, told apart by the sign of a direction that all tokens share.
INPUTS = normal(BATCH, TOKENS, TOKEN) + (2.0 * LABELS - 1)[:, None, None]
WIDTHS = {"first": (TOKENS, TOKEN, HIDDEN, POSE), "second": (HIDDEN, POSE, CLASSES, POSE)}


@functools.partial(jax.jit, static_argnums=0)
def classify(name, weights, inputs):
    """A network of two capsule layers as a plain function: what every library has to compute."""
    hidden = layer(name, weights["first"], inputs, capsjax.length(inputs))
    return layer(name, weights["second"], hidden.poses, hidden.activations).activations


@jax.jit
def classification_loss(activations):
    one_hot = jax.nn.one_hot(LABELS, CLASSES)
    return jnp.mean(capsjax.margin_loss(activations, one_hot))


def loss_of(apply):
    """The loss of a network, with its activations besides: one program for all that is tested."""

    def function(network):
        activations = apply(network, INPUTS)
        return classification_loss(activations), activations

    return function


def train(parameters, apply, steps):
    """Steps of Optax on a tree of arrays, as Linen, haiku and plain functions have it.

    Each `train` returns the parameters after so many steps, and of each step and one more, which is
    not taken, the loss and the activations.
    """

    @jax.jit
    def step(parameters, state):
        results, gradients = jax.value_and_grad(loss_of(apply), has_aux=True)(parameters)
        updates, state = OPTIMIZER.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, results

    state, results = jax.jit(OPTIMIZER.init)(parameters), []
    for _ in range(steps):
        parameters, state, result = step(parameters, state)
        results.append(result)
    return parameters, [*results, step(parameters, state)[-1]]


def train_nnx(network, apply, steps):
    optimizer = nnx.Optimizer(network, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer):
        results, gradients = nnx.value_and_grad(loss_of(apply), has_aux=True)(network)
        optimizer.update(network, gradients)
        return results

    results = [step(network, optimizer) for _ in range(steps)]
    return network, [*results, step(nnx.clone(network), optimizer)]


def train_equinox(network, apply, steps):
    @eqx.filter_jit
    def step(network, state):
        results, gradients = eqx.filter_value_and_grad(loss_of(apply), has_aux=True)(network)
        updates, state = OPTIMIZER.update(gradients, state)
        return eqx.apply_updates(network, updates), state, results

    state, results = eqx.filter_jit(OPTIMIZER.init)(eqx.filter(network, eqx.is_inexact_array)), []
    for _ in range(steps):
        network, state, result = step(network, state)
        results.append(result)
    return network, [*results, step(network, state)[-1]]


class Model(NamedTuple):
    """A model of some library.

    `weights` finds those of the two capsule layers in the parameters, `tokens` what goes into the
    first of them.
    """

    parameters: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    weights: Callable[[Any], dict[str, dict[str, jax.Array]]]
    train: Callable = train
    tokens: Callable[[Any], jax.Array] = lambda parameters: INPUTS


@functools.partial(jax.jit, static_argnums=(1, 2))
def initial(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) / 2


class NNXCapsules(nnx.Module):
    def __init__(self, name, sizes, *, rngs):
        self.name, self.parameters = name, tuple(shapes(name, *sizes))
        for parameter, shape in shapes(name, *sizes).items():
            setattr(self, parameter, nnx.Param(initial(rngs.params(), shape)))

    def weights(self):
        return {parameter: getattr(self, parameter)[...] for parameter in self.parameters}

    def __call__(self, poses, activations):
        return layer(self.name, self.weights(), poses, activations)


class NNXNetwork(nnx.Module):
    def __init__(self, name, *, rngs):
        self.first = NNXCapsules(name, WIDTHS["first"], rngs=rngs)
        self.second = NNXCapsules(name, WIDTHS["second"], rngs=rngs)

    def __call__(self, inputs):
        hidden = self.first(inputs, capsjax.length(inputs))
        return self.second(hidden.poses, hidden.activations).activations


def nnx_model(name):
    return Model(
        nnx.jit(lambda: NNXNetwork(name, rngs=nnx.Rngs(0)))(),
        lambda network, inputs: network(inputs),
        lambda network: {"first": network.first.weights(), "second": network.second.weights()},
        train_nnx,
    )


class LinenCapsules(linen.Module):
    routing: str
    sizes: tuple[int, ...]

    @linen.compact
    def __call__(self, poses, activations):
        weights = {
            parameter: self.param(parameter, initial, shape)
            for parameter, shape in shapes(self.routing, *self.sizes).items()
        }
        return layer(self.routing, weights, poses, activations)


class LinenNetwork(linen.Module):
    routing: str

    @linen.compact
    def __call__(self, inputs):
        first = LinenCapsules(self.routing, WIDTHS["first"], name="first")
        hidden = first(inputs, capsjax.length(inputs))
        second = LinenCapsules(self.routing, WIDTHS["second"], name="second")
        return second(hidden.poses, hidden.activations).activations


def linen_model(name):
    network = LinenNetwork(name)
    variables = jax.jit(network.init)(jax.random.key(0), INPUTS)
    return Model(variables, network.apply, lambda variables: variables["params"])


class BridgedNetwork(linen.Module):
    routing: str

    @linen.compact
    def __call__(self, inputs):
        options = {
            "routing": self.routing,
            "kernel_init": initial,
            "use_bias": capsjax.routing.algorithm(self.routing).has_bias,
            **OPTIONS.get(self.routing, {}),
        }
        first = bridge.to_linen(DenseCapsules, *WIDTHS["first"], **options, name="first")
        second = bridge.to_linen(DenseCapsules, *WIDTHS["second"], **options, name="second")
        hidden = first(inputs)
        return second(hidden.poses, activations=hidden.activations).activations


def bridged_model(name):
    network = BridgedNetwork(name)
    variables = jax.jit(network.init)(jax.random.key(0), INPUTS)

    def weights(variables):
        return {
            number: {
                **{k: v for k, v in capsules.items() if k == "kernel"},
                **capsules["router"],
            }
            for number, capsules in variables["params"].items()
        }

    return Model(variables, network.apply, weights)


class EquinoxCapsules(eqx.Module):
    weights: dict[str, jax.Array]
    name: str = eqx.field(static=True)

    def __init__(self, name, sizes, *, key):
        each = shapes(name, *sizes)
        keys = jax.random.split(key, len(each))
        self.name = name
        self.weights = {p: initial(k, each[p]) for p, k in zip(each, keys, strict=True)}

    def __call__(self, poses, activations):
        return layer(self.name, self.weights, poses, activations)


class EquinoxNetwork(eqx.Module):
    first: EquinoxCapsules
    second: EquinoxCapsules

    def __call__(self, tokens):
        # Of one example, as equinox has it.
        hidden = self.first(tokens, capsjax.length(tokens))
        return self.second(hidden.poses, hidden.activations).activations


def equinox_model(name):
    first, second = jax.random.split(jax.random.key(0))
    return Model(
        EquinoxNetwork(
            EquinoxCapsules(name, WIDTHS["first"], key=first),
            EquinoxCapsules(name, WIDTHS["second"], key=second),
        ),
        lambda network, inputs: jax.vmap(network)(inputs),
        lambda network: {"first": network.first.weights, "second": network.second.weights},
        train_equinox,
    )


class HaikuCapsules(hk.Module):
    def __init__(self, routing, sizes, name):
        super().__init__(name=name)
        self.routing, self.sizes = routing, sizes

    def __call__(self, poses, activations):
        weights = {
            parameter: hk.get_parameter(
                parameter, shape, init=lambda shape, dtype: initial(hk.next_rng_key(), shape, dtype)
            )
            for parameter, shape in shapes(self.routing, *self.sizes).items()
        }
        return layer(self.routing, weights, poses, activations)


def haiku_model(name):
    @hk.without_apply_rng
    @hk.transform
    def network(inputs):
        first = HaikuCapsules(name, WIDTHS["first"], name="first")
        hidden = first(inputs, capsjax.length(inputs))
        second = HaikuCapsules(name, WIDTHS["second"], name="second")
        return second(hidden.poses, hidden.activations).activations

    parameters = jax.jit(network.init)(jax.random.key(0), INPUTS)
    return Model(parameters, network.apply, lambda weights: weights)


def function_model(name):
    """A layer of a perceptron before the capsules, its numbers grouped into tokens."""
    keys = iter(jax.random.split(jax.random.key(0), 40))
    parameters = {
        number: {p: initial(next(keys), shape) for p, shape in shapes(name, *sizes).items()}
        for number, sizes in WIDTHS.items()
    }
    width = TOKENS * TOKEN
    parameters["dense"] = jnp.eye(width) + initial(next(keys), (width, width)) / 10

    @jax.jit
    def perceive(parameters, inputs):
        return jnp.tanh(inputs.reshape(BATCH, width) @ parameters["dense"]).reshape(inputs.shape)

    return Model(
        parameters,
        lambda parameters, inputs: classify(name, parameters, perceive(parameters, inputs)),
        lambda parameters: parameters,
        tokens=lambda parameters: np.asarray(perceive(parameters, INPUTS)),
    )


LIBRARIES = {
    "nnx": nnx_model,
    "linen": linen_model,
    "linen through the bridge": bridged_model,
    "equinox": equinox_model,
    "haiku": haiku_model,
    "functions": function_model,
}


# One that needs votes alone, one that needs activations besides, one that makes votes of its own.
@some_marked_slow(["dynamic", "em", "heinsen"], ["dynamic"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_model_is_the_plain_functions_and_learns(library, name):
    model = LIBRARIES[library](name)
    weights = model.weights(model.parameters)
    expected = classify(name, weights, model.tokens(model.parameters))
    before = jax.tree.map(np.array, weights)
    trained, results = model.train(model.parameters, model.apply, 30)
    losses, activations = zip(*results, strict=True)
    assert_same(activations[0], expected)
    assert losses[0] == pytest.approx(float(classification_loss(expected)), rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    # Both layers have learned, and are still what the plain functions say.
    weights = model.weights(trained)
    for number in WIDTHS:
        assert any((before[number][k] != weights[number][k]).any() for k in weights[number])
    assert_same(activations[-1], classify(name, weights, model.tokens(trained)))
