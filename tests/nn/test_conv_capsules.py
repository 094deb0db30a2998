"""Convolutional capsules, against loops over places, and what all routers own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from comparing import all_finite, assert_close
from flax import nnx

import capsjax
from capsjax import routing
from capsjax.nn import (
    ConvCapsules,
    DenseCapsules,
    GridCapsules,
    MatrixConvCapsules,
    MatrixGridCapsules,
    MatrixPrimaryCapsules,
    PrimaryCapsules,
)
from capsjax.ops import ReceptiveFields


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def all_but(shape, place):
    """A mask of all children but one."""
    where = np.ones(shape, bool)
    where[place] = False
    return jnp.asarray(where)


@nnx.jit(static_argnames="implementation")
def run(layer, poses, **options):
    """Calls a layer as one program, which layers alike share."""
    return layer(poses, **options)


def trace(layer, **options):
    """Calls a layer for its errors alone, which compiles nothing."""
    return jax.eval_shape(lambda poses: layer(poses, **options), normal(2, 5, 4, 2, 4))


def padded_fields(grid, kernel, strides, pads):
    """For each field, the places of its kernel in order; None outside of the grid."""
    rows, columns = ((grid[n] + sum(pads[n]) - kernel[n]) // strides[n] + 1 for n in (0, 1))
    fields = {}
    for p, q in itertools.product(range(rows), range(columns)):
        places = []
        for h, w in itertools.product(range(kernel[0]), range(kernel[1])):
            place = (p * strides[0] + h - pads[0][0], q * strides[1] + w - pads[1][0])
            places.append(place if 0 <= place[0] < grid[0] and 0 <= place[1] < grid[1] else None)
        fields[p, q] = places
    return fields


FIELDS = [
    ((5, 6), (3, 2), (2, 1), ((0, 0), (0, 0))),
    ((5, 4), (3, 3), (2, 2), ((1, 1), (1, 0))),
    ((4, 4), (1, 1), (3, 3), ((0, 0), (0, 0))),
    ((7, 5), (2, 3), (3, 2), ((0, 2), (2, 1))),
]


@functools.partial(jax.jit, static_argnums=0)
def gather_and_spread(fields, x, y):
    return fields.gather(x, fill=-7), fields.sum(y), fields.max(y)


@pytest.mark.parametrize(("grid", "kernel", "strides", "pads"), FIELDS)
def test_receptive_fields_gather_and_spread(grid, kernel, strides, pads):
    fields = ReceptiveFields(grid, kernel, strides, pads)
    x, y = normal(2, *grid, 3), normal(2, *fields.shape, fields.size, 3, seed=1)
    gathered, sums, maxima = map(np.asarray, gather_and_spread(fields, x, y))
    x, y, expected = np.asarray(x), np.asarray(y), padded_fields(grid, kernel, strides, pads)
    assert gathered.shape == (2, *fields.shape, fields.size, 3)
    assert set(expected) == set(itertools.product(*map(range, fields.shape)))
    total, highest = np.zeros(x.shape), np.full(x.shape, -np.inf)
    for (p, q), places in expected.items():
        for k, place in enumerate(places):
            if place is None:
                np.testing.assert_array_equal(gathered[:, p, q, k], -7)
                continue
            np.testing.assert_array_equal(gathered[:, p, q, k], x[:, *place])
            total[:, *place] += y[:, p, q, k]
            highest[:, *place] = np.maximum(highest[:, *place], y[:, p, q, k])
    np.testing.assert_allclose(sums, total, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(maxima, highest)


def test_same_fields_are_those_of_a_same_convolution():
    fields = ReceptiveFields.of((7, 6), (3, 3), (2, 2), "SAME")
    assert fields.shape == (4, 3)
    assert fields.pads == ((1, 1), (0, 1))


def conv(routing="dynamic", matrix=False, features=4, padding="VALID", **options):
    options |= {"kernel_size": (3, 2), "strides": (2, 1), "padding": padding, "routing": routing}
    if matrix:
        return MatrixConvCapsules(2, 3, features, rngs=nnx.Rngs(0), **options)
    return ConvCapsules(2, 4, 3, features, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("padding", ["VALID", ((1, 1), (1, 0))])
@pytest.mark.parametrize("matrix", [False, True])
def test_conv_capsules_route_each_field_by_itself(padding, matrix):
    layer = conv(matrix=matrix, padding=padding)
    poses = normal(2, 5, 4, 2, 4)
    routed = jax.tree.map(np.asarray, run(layer, poses, implementation="reference"))
    poses = np.asarray(poses, np.float64)
    pads = ((0, 0), (0, 0)) if padding == "VALID" else padding
    kernel = np.asarray(layer.kernel[...], np.float64)
    for (p, q), places in padded_fields((5, 4), (3, 2), (2, 1), pads).items():
        present = [k for k, place in enumerate(places) if place is not None]
        children = np.concatenate([poses[1][places[k]] for k in present])
        weights = np.concatenate([kernel[2 * k : 2 * k + 2] for k in present])
        if matrix:
            votes = np.stack(
                [
                    [(c.reshape(2, 2) @ w[:, j]).reshape(4) for j in range(3)]
                    for c, w in zip(children, weights, strict=True)
                ]
            )
        else:
            votes = references.dense_votes(children, weights)
        v, lengths, _ = references.dynamic_routing(votes, 3)
        assert_close(routed.poses[1, p, q], v, terms=50)
        assert_close(routed.activations[1, p, q], lengths, terms=50)
        outside = [2 * k + i for k, place in enumerate(places) if place is None for i in (0, 1)]
        np.testing.assert_array_equal(routed.coupling[1, p, q][np.array(outside, int)], 0)


def vector_layer(kind, **options):
    """A layer of 2 child types with 4 dimensions and 3 parents with 5."""
    if kind == "conv":
        options |= {"kernel_size": (3, 2), "padding": "SAME"}
    layers = {"conv": ConvCapsules, "grid": GridCapsules}
    return layers[kind](2, 4, 3, 5, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("kind", ["conv", "grid"])
def test_votes_of_dynamic_routing_need_not_be_stored(kind):
    layer = vector_layer(kind, use_bias=True, bias_init=nnx.initializers.normal())
    poses, where = normal(2, 5, 4, 2, 4), all_but((5, 4, 2), (2, 1, 0))

    @nnx.jit
    def gradients(layer, poses):
        def loss(layer, poses, name):
            routed = layer(poses, where=where, implementation=name)
            return jnp.sum(jnp.cos(jnp.arange(routed.poses.size)) * routed.poses.ravel()), routed

        gradient = nnx.grad(loss, argnums=(0, 1), has_aux=True)
        return [gradient(layer, poses, name) for name in ("reference", "blocked")]

    (stored, expected), (grads, routed) = gradients(layer, poses)
    assert routed.coupling is None
    np.testing.assert_allclose(expected.coupling.sum(-1)[..., 0:1].max(), 1, rtol=1e-5)
    assert_close(routed.poses, expected.poses, terms=100)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(stored), strict=True):
        assert_close(a, b, terms=1000)

    # Weights that places share would have to be copied, unless votes are stored.
    def is_stored(layer, poses):
        return nnx.eval_shape(layer, poses).coupling is not None

    assert is_stored(layer, poses) == (kind == "grid")
    assert is_stored(layer, poses[:, :3, :2]) == (kind == "grid")
    if kind == "grid":
        assert is_stored(layer, poses[:, :1, :1])  # also of a single place
    assert is_stored(vector_layer(kind, implementation="reference"), poses)


def test_many_votes_are_not_stored():
    layer = ConvCapsules(2, 4, 16, 16, kernel_size=2, rngs=nnx.Rngs(0))

    poses = jnp.zeros((16, 8, 8, 2, 4))
    memory = {
        name: run.lower(layer, poses, implementation=name).compile().memory_analysis()
        for name in (None, "reference")
    }
    assert memory[None].temp_size_in_bytes < memory["reference"].temp_size_in_bytes / 2


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, "cudnn", "implementation must be None or one of reference, blocked, .*, got 'cudnn'"),
        ({"routing": "em"}, "blocked", "one of reference for routing 'em', got 'blocked'"),
    ],
)
def test_an_implementation_that_does_not_apply_is_named(options, name, message):
    with pytest.raises(ValueError, match=message):
        conv(**options, implementation=name)
    with pytest.raises(ValueError, match=message):
        trace(conv(**options), implementation=name)


def test_a_field_of_the_whole_grid_is_a_dense_layer():
    layer = ConvCapsules(2, 4, 3, 5, kernel_size=(3, 2), routing="kmeans", rngs=nnx.Rngs(0))
    poses = normal(2, 3, 2, 2, 4)

    @jax.jit
    def dense(poses, kernel):
        return capsjax.kmeans_routing(capsjax.dense_votes(poses.reshape(2, 12, 4), kernel))

    expected = dense(poses, layer.kernel[...]).poses
    assert_close(np.asarray(run(layer, poses).poses)[:, 0, 0], expected, terms=12)


@pytest.mark.parametrize(
    ("name", "padding"), [("em", "VALID"), ("em", "SAME"), ("variational", "SAME")]
)
def test_a_child_shares_its_responsibility_among_the_parents_of_all_its_fields(name, padding):
    layer = conv(name, padding=padding)
    poses, activations = normal(2, 5, 4, 2, 4), np.full((2, 5, 4, 2), 0.5, np.float32)
    coupling = np.asarray(run(layer, poses, activations=activations).coupling)
    fields = ReceptiveFields.of((5, 4), (3, 2), (2, 1), padding)
    given = coupling.sum(-1).reshape(*coupling.shape[:3], 6, 2)
    total, number = jax.jit(lambda x: (fields.sum(x), fields.sum(jnp.ones_like(x))))(given)
    covered = np.asarray(number) > 0
    np.testing.assert_allclose(np.asarray(total)[covered], 1, rtol=1e-5)
    assert covered.any()


def test_em_over_fields_is_em_over_all_parents_at_once():
    """Two fields that share one row of children, against one EM with all parents of both."""
    layer = ConvCapsules(
        1,
        4,
        2,
        4,
        kernel_size=(2, 1),
        routing="em",
        num_iterations=3,
        epsilon=0.1,
        inverse_temperature=1.0,
        rngs=nnx.Rngs(0),
    )
    poses, a = normal(3, 1, 1, 4, seed=3), np.array([0.9, 0.5, 0.7])
    routed = run(layer, poses, activations=jnp.float32(a).reshape(3, 1, 1))
    routed = jax.tree.map(np.asarray, routed)
    kernel = np.asarray(layer.kernel[...], np.float64)
    exact = np.asarray(poses, np.float64)[:, 0]
    log_p = {}  # of (child, field, parent)
    responsible = {
        (c, f, j): 1 / (2 * len(fs))
        for c, fs in enumerate(([0], [0, 1], [1]))
        for f in fs
        for j in range(2)
    }
    for t in range(3):
        for f, j in itertools.product(range(2), range(2)):
            votes = np.stack([exact[f + k, 0] @ kernel[k, :, j] for k in range(2)])
            r = np.array([responsible[f + k, f, j] * a[f + k] for k in range(2)])
            mean = (r[:, None] * votes).sum(0) / r.sum()
            variance = (r[:, None] * (votes - mean) ** 2).sum(0) / r.sum() + 0.1
            logit = (1 - 0.95 ** (t + 1)) * -np.log(np.sqrt(variance)).sum() * r.sum()
            active = 1 / (1 + np.exp(-logit))
            for k in range(2):
                density = -((votes[k] - mean) ** 2 / (2 * variance)).sum()
                density -= np.log(np.sqrt(2 * np.pi * variance)).sum()
                log_p[f + k, f, j] = np.log(active) + density
            np.testing.assert_allclose(routed.poses[f, 0, j], mean, rtol=1e-3) if t == 2 else None
            if t == 2:
                np.testing.assert_allclose(routed.activations[f, 0, j], active, rtol=1e-4)
        for c in range(3):
            mine = {key: np.exp(value) for key, value in log_p.items() if key[0] == c}
            responsible.update({key: value / sum(mine.values()) for key, value in mine.items()})


# Every algorithm in one layer, and every layer. Those that take votes alone are one case for a
# layer, and tests/routing has them without one.
CONV = {"kernel_size": (2, 1), "padding": "SAME"}
MASKED = [
    pytest.param(
        functools.partial(ConvCapsules, 2, 4, 3, 4, routing=name, **CONV),
        marks=() if name in ("dynamic", "em") else pytest.mark.slow,
    )
    for name in routing.algorithms()
    if name != "heinsen"
]
MASKED += [
    functools.partial(DenseCapsules, 6, 4, 3, 4, routing="heinsen"),
    functools.partial(DenseCapsules, 6, 4, 3, 4, routing="self"),
    functools.partial(GridCapsules, 2, 4, 3, 4, routing="kmeans", coordinates=True),
    functools.partial(MatrixConvCapsules, 2, 3, 4, routing="self", **CONV),
    functools.partial(MatrixGridCapsules, 2, 3, 4, routing="self"),
]


@pytest.mark.parametrize(
    "make", MASKED, ids=lambda make: f"{make.func.__name__} {make.keywords['routing']}"
)
def test_what_masked_children_hold_reaches_no_result_and_no_gradient(make):
    layer = make(rngs=nnx.Rngs(0))
    children = (6,) if isinstance(layer, DenseCapsules) else (3, 1, 2)
    poses = np.asarray(normal(2, *children, 4))
    activations = references.sigmoid(poses[..., 0])
    where, nan = np.arange(6).reshape(children) != 2, np.float32(np.nan)
    broken = np.where(where[..., None], poses, nan), np.where(where, activations, nan)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def gradients(where, *arguments):
        def loss(state, poses, activations=None):
            layer = nnx.merge(graphdef, state)
            routed = layer(poses, activations=activations, where=where)[:2]
            return sum(x[..., 0].sum() for x in routed), routed

        return jax.grad(loss, range(len(arguments)), has_aux=True)(*arguments)

    # For any algorithm that takes activations, they are the lengths of poses if not given.
    for given in [2, 1] if layer.router.name == "self" else [2]:
        expected = gradients(where, state, *(poses, activations)[:given])
        got = gradients(where, state, *broken[:given])
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert all_finite(expected)
        (learned, *_), routed = expected
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(learned.get("kernel", ())))
        _, everyone = gradients(np.ones_like(where), state, *(poses, activations)[:given])
        assert (np.asarray(everyone[0]) != np.asarray(routed[0])).any()


def test_what_masked_logits_hold_reaches_no_gradient():
    layer = DenseCapsules(6, 4, 3, 4, rngs=nnx.Rngs(0))
    where, logits = jnp.arange(6) != 2, normal(6, 3, seed=1)

    def loss(layer, poses, logits):
        return layer(poses, logits=logits, where=where).activations[..., 0].sum()

    gradients = nnx.jit(nnx.grad(loss, argnums=(0, 1, 2)))
    poses = normal(2, 6, 4)
    broken = gradients(
        layer, jnp.where(where[:, None], poses, jnp.nan), jnp.where(where[:, None], logits, jnp.nan)
    )
    jax.tree.map(np.testing.assert_array_equal, broken, gradients(layer, poses, logits))


@pytest.mark.parametrize(
    "layer",
    [
        GridCapsules(2, 4, 3, 5, coordinates=True, rngs=nnx.Rngs(0)),
        MatrixConvCapsules(2, 3, 4, kernel_size=3, routing="dynamic", rngs=nnx.Rngs(0)),
        MatrixGridCapsules(2, 3, 4, routing="dynamic", rngs=nnx.Rngs(0)),
    ],
    ids=["coordinates", "matrix fields", "matrix grid"],
)
def test_votes_that_are_made_otherwise_are_stored(layer):
    with pytest.raises(ValueError, match="None or 'reference' for votes that have to be stored"):
        trace(layer, implementation="blocked")


def test_the_grid_layer_shares_matrices_between_places_and_adds_their_coordinates():
    layer = MatrixGridCapsules(2, 3, 4, routing="uniform", rngs=nnx.Rngs(0))
    assert layer.kernel.shape == (2, 2, 3, 2)
    poses = normal(2, 3, 5, 2, 4)
    routed = run(layer, poses)
    assert routed.poses.shape == (2, 3, 4)
    assert routed.coupling.shape == (2, 30, 3)
    kernel, s = np.asarray(layer.kernel[...], np.float64), np.zeros((3, 2, 2))
    for row, column, i, j in itertools.product(range(3), range(5), range(2), range(3)):
        vote = np.asarray(poses[0, row, column, i], np.float64).reshape(2, 2) @ kernel[i, :, j]
        vote[:, 1] += ((row + 0.5) / 3, (column + 0.5) / 5)
        s[j] += vote / 3
    assert_close(routed.poses[0], references.squash(s.reshape(3, 4)), terms=30)


@pytest.mark.parametrize("name", ["self", "efficient", "em", "random"])
def test_a_grid_layer_s_routing_parameters_are_shared_between_places(name):
    layer = GridCapsules(2, 4, 3, 4, routing=name, rngs=nnx.Rngs(0))
    routed = run(layer, normal(2, 3, 5, 2, 4), activations=jnp.ones((2, 3, 5, 2)))
    assert routed.coupling.shape == (2, 30, 3)


def test_coordinates_are_added_to_the_first_two_components():
    plain, moved = (
        GridCapsules(1, 2, 1, 2, routing="em", coordinates=c, rngs=nnx.Rngs(0))
        for c in (False, True)
    )
    # With one place at a time, the parent is its child's vote.
    poses, one = normal(2, 2, 3, 1, 2), np.zeros((2, 2, 3, 1), bool)
    one[0, 0, 0] = one[1, 1, 2] = True
    shift = np.subtract(*(run(layer, poses, where=one).poses for layer in (moved, plain)))
    np.testing.assert_allclose(shift[:, 0], [[0.5 / 2, 0.5 / 3], [1.5 / 2, 2.5 / 3]], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic", "em"])
def test_three_stacked_capsule_layers_train_without_nan(name):
    class Stack(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.primary = MatrixPrimaryCapsules(1, 2, 4, kernel_size=3, strides=2, rngs=rngs)
            self.first = MatrixConvCapsules(2, 3, 4, kernel_size=(1, 2), routing=name, rngs=rngs)
            self.second = MatrixConvCapsules(
                3, 4, 4, kernel_size=(2, 1), padding="SAME", routing=name, rngs=rngs
            )
            self.classes = MatrixGridCapsules(4, 2, 4, routing=name, rngs=rngs)

        def __call__(self, images):
            poses, activations = self.primary(images)
            for layer in (self.first, self.second, self.classes):
                poses, activations, _ = layer(poses, activations=activations)
            return activations

    # Is the bright half on the left or on the right?
    images = np.array(normal(8, 5, 9, 1)) / 10
    labels = np.arange(8) % 2
    images[::2, :, :4] += 1
    images[1::2, :, 5:] += 1
    network = nnx.jit(Stack)()
    optimizer = nnx.Optimizer(network, optax.sgd(1e-1), wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer):
        def loss_fn(network):
            target = jax.nn.one_hot(labels, 2)
            return capsjax.spread_loss(network(images), target, margin=0.3).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(network)
        optimizer.update(network, grads)
        return loss

    losses = [float(step(network, optimizer)) for _ in range(20)]
    assert np.isfinite(losses).all()
    assert all_finite(nnx.state(network))
    assert losses[-1] < losses[0]


def test_primary_capsules_on_their_grid():
    layer = PrimaryCapsules(3, 2, 4, kernel_size=3, rngs=nnx.Rngs(0))
    grid = PrimaryCapsules(3, 2, 4, kernel_size=3, keep_grid=True, rngs=nnx.Rngs(0))
    images = normal(2, 9, 7, 3)
    poses = np.asarray(run(grid, images))
    assert poses.shape == (2, 4, 3, 2, 4)
    np.testing.assert_array_equal(poses.reshape(2, -1, 4), run(layer, images))


def test_matrix_primary_capsules():
    layer = MatrixPrimaryCapsules(3, 2, 4, kernel_size=3, rngs=nnx.Rngs(0))
    poses, activations = map(np.asarray, run(layer, normal(2, 5, 6, 3)))
    assert poses.shape == (2, 3, 4, 2, 4)
    assert activations.shape == (2, 3, 4, 2)
    channels = np.asarray(run(layer.conv, normal(2, 5, 6, 3)))
    np.testing.assert_array_equal(poses[..., 1, :], channels[..., 4:8])
    np.testing.assert_allclose(activations[..., 1], references.sigmoid(channels[..., 9]), rtol=1e-6)


# What each routing owns in a layer of 6 children with 4 dimensions and 3 parents with 5.
OWNED = {
    "dynamic": {},
    "kmeans": {},
    "uniform": {},
    "random": {},
    "em": {"beta_a": (3,), "beta_u": (3,)},
    "variational": {"beta_a": (3,), "beta_u": (3,)},
    "self": {"logit_kernel": (6, 4, 3), "logit_bias": (6, 3)},
    "attention": {"scale": (5,), "offset": (5,)},
    "efficient": {"prior": (6, 3)},
    "heinsen": capsjax.HeinsenParameters.shapes(6, 4, 3, 5),
}


@pytest.mark.parametrize("name", routing.algorithms())
def test_a_layer_owns_what_its_routing_learns(name):
    layer = DenseCapsules(6, 4, 3, 5, routing=name, rngs=nnx.Rngs(0))
    owned = {key: value.shape for key, value in nnx.state(layer.router, nnx.Param).items()}
    assert owned == OWNED[name]
    assert (layer.kernel is None) == (name == "heinsen")
    routed = nnx.eval_shape(layer, normal(2, 6, 4))
    assert (routed.poses.shape, routed.activations.shape) == ((2, 3, 5), (2, 3))


def test_dense_capsules_hand_activations_to_their_routing():
    poses, activations = normal(6, 4), jnp.linspace(0.1, 0.9, 6)
    for name in ("em", "variational", "self"):
        layer = DenseCapsules(6, 4, 3, 5, routing=name, rngs=nnx.Rngs(0))
        explicit = run(layer, poses, activations=capsjax.length(poses))
        given = run(layer, poses, activations=activations)
        assert np.abs(np.asarray(given.poses) - np.asarray(explicit.poses)).max() > 1e-3
    # The lengths take the place of activations before an algorithm sees them.
    assert_close(run(layer, poses).poses, explicit.poses)


@pytest.mark.parametrize("name", ["dynamic", "kmeans", "em"])
@pytest.mark.parametrize("kind", ["conv", "grid"])
def test_layers_on_a_grid_check_activations_for_every_routing(kind, name):
    layer = vector_layer(kind, routing=name)
    for activations, got in (("no", "got str"), (jnp.ones((5, 4, 2), int), "got dtype int32")):
        with pytest.raises(TypeError, match=f"activations must be .*, {got}"):
            layer(normal(5, 4, 2, 4), activations=activations)


@pytest.mark.parametrize("name", ["dynamic", "kmeans", "em"])
def test_dense_capsules_check_activations_for_every_routing(name):
    layer = DenseCapsules(6, 4, 3, 5, routing=name, rngs=nnx.Rngs(0))
    poses = normal(2, 6, 4)
    for shape in ((6,), (2, 6), (2, 1)):
        activations = jax.ShapeDtypeStruct(shape, jnp.float32)
        jax.eval_shape(lambda a: layer(poses, activations=a), activations)
    for shape in ((2,), (6, 2), (2, 6, 1), (3, 2, 6)):
        with pytest.raises(ValueError, match=r"activations must broadcast to \(2, 6\), got shape"):
            layer(poses, activations=jnp.ones(shape))
    for activations, got in (("no", "got str"), (jnp.ones(6, int), "got dtype int32")):
        with pytest.raises(TypeError, match=f"activations must be .*, {got}"):
            layer(poses, activations=activations)


def test_options_of_routing_reach_it():
    layer = DenseCapsules(
        6,
        4,
        3,
        5,
        routing="em",
        num_iterations=2,
        inverse_temperature=2.0,
        beta_u_init=nnx.initializers.constant(0.5),
        rngs=nnx.Rngs(0),
    )
    poses = normal(6, 4)

    @jax.jit
    def by_hand(poses, kernel):
        return capsjax.em_routing(
            capsjax.dense_votes(poses, kernel),
            capsjax.length(poses),
            num_iterations=2,
            inverse_temperature=2.0,
            beta_a=jnp.zeros(3),
            beta_u=jnp.full(3, 0.5),
        )

    expected = by_hand(poses, layer.kernel[...])
    assert_close(run(layer, poses).activations, expected.activations)
    seeds = [DenseCapsules(6, 4, 3, 5, routing="random", seed=s, rngs=nnx.Rngs(0)) for s in (0, 1)]
    couplings = [np.asarray(run(layer, poses).coupling) for layer in seeds]
    assert (couplings[0] != couplings[1]).any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"routing": "sinkhorn"}, "routing must be one of .*dynamic, .* got 'sinkhorn'"),
        ({"routing": "em", "leaky": True}, "routing 'em' has no option 'leaky', only num_iter"),
        ({"routing": "em", "use_bias": True}, "routing 'em' has no bias"),
        ({"routing": "uniform", "num_iterations": 3}, "'uniform' has no option 'num_iterations'"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        DenseCapsules(6, 4, 3, 5, rngs=nnx.Rngs(0), **options)


def test_logits_are_for_dynamic_routing():
    layer = DenseCapsules(6, 4, 3, 5, routing="kmeans", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="routing 'kmeans' takes no prior logits"):
        layer(normal(6, 4), logits=jnp.zeros((6, 3)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: conv(matrix=True, features=5), "features must be a square number, got 5"),
        (lambda: conv("heinsen"), "'heinsen' makes its own votes"),
        (lambda: vector_layer("grid", routing="heinsen"), "'heinsen' makes its own votes"),
        (
            lambda: GridCapsules(2, 4, 3, 1, coordinates=True, rngs=nnx.Rngs(0)),
            "coordinates of num_spatial_dims=2 do not fit poses of 1 out_features",
        ),
        (lambda: conv()(normal(5, 4, 3, 4)), r"poses must have shape .*, 2, 4\], got .*\(5, 4, 3"),
        (lambda: conv()(normal(2, 4, 2, 4)), r"at least as large as the kernel .* got \(2, 4\)"),
        (
            lambda: conv("em")(normal(5, 4, 2, 4), activations=jnp.ones((5, 4))),
            r"activations must have shape \(5, 4, 2\), got \(5, 4\)",
        ),
        (
            lambda: vector_layer("grid")(normal(5, 4, 2, 4), where=jnp.ones((3,), bool)),
            r"where must broadcast to \(5, 4, 2\), got shape \(3,\)",
        ),
    ],
)
def test_bad_sizes_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
