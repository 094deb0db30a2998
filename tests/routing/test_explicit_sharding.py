"""Arrays whose types say how they are divided among devices (JAX's explicit sharding)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import arguments
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import capsjax
from capsjax import models, nn
from capsjax.data import Cropped, Distorted, Pairs, Placed, Shifted
from capsjax.ops.bias import add_bias
from capsjax.routing import algorithm, algorithms

IN_GATE = {"attention", "dynamic", "em", "uniform"}
PRESETS = ("small", "baseline", "efficient_capsnet", "matrix_capsnet")
random = np.random.default_rng(0)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("batch", "more"), axis_types=(AxisType.Explicit,) * 2)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in IN_GATE)) for n in algorithms()]
)
def test_routing_keeps_the_sharding_of_the_batch(name, mesh):
    arrays, options = arguments(name, 8)
    function = functools.partial(algorithm(name).function, **options)

    def loss(*arrays):
        return jnp.sum(function(*arrays).poses[..., 0] ** 2)

    gradient = jax.jit(jax.grad(loss))
    expected, d_expected = function(*arrays), gradient(*arrays)
    with jax.set_mesh(mesh):
        arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("batch")))
        for call in (function, jax.jit(function)):
            routed = call(*arrays)
            assert jax.typeof(routed.poses).sharding.spec[0] == "batch"
            np.testing.assert_allclose(routed.poses, expected.poses, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradient(*arrays), d_expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("axis", range(4))
def test_any_axis_may_be_sharded(axis, mesh):
    votes = random.normal(size=(4, 4, 4, 4)).astype(np.float32)
    expected = capsjax.dynamic_routing(votes)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "more"))
        routed = capsjax.dynamic_routing(jax.device_put(votes, sharding))
    np.testing.assert_allclose(routed.poses, expected.poses, rtol=1e-5, atol=1e-6)


def test_votes_are_stored_however_many_they_are(mesh):
    poses, weights = jnp.full((8, 400, 3), 0.1), jnp.full((400, 3, 32, 12), 0.1)
    assert 8 * 400 * 32 * 12 > 2**20
    expected = capsjax.dense_capsules(poses, weights)
    with jax.set_mesh(mesh):
        poses = jax.device_put(poses, NamedSharding(mesh, PartitionSpec("batch")))
        routed = capsjax.dense_capsules(poses, weights)
        np.testing.assert_allclose(routed.poses, expected.poses, rtol=1e-4)
        with pytest.raises(NotImplementedError, match="explicitly sharded arrays need"):
            capsjax.dense_capsules(poses, weights, implementation="blocked")


@pytest.mark.parametrize(
    "preset",
    ["small", *(pytest.param(p, marks=pytest.mark.slow) for p in PRESETS if p != "small")],
)
def test_a_network_predicts(preset, mesh):
    # JAX itself has no gradient of a convolution's kernel here.
    network = models.create(preset, rngs=nnx.Rngs(0))
    network.eval()
    images = random.random((8, 28, 28, 1), np.float32)
    predict = jax.jit(lambda images: network(images).scores)
    expected = predict(images)
    with jax.set_mesh(mesh):
        images = jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch")))
        scores = predict(images)
        assert jax.typeof(scores).sharding.spec[0] == "batch"
    np.testing.assert_allclose(scores, expected, rtol=1e-3)


@pytest.mark.parametrize("routing", ["dynamic", pytest.param("em", marks=pytest.mark.slow)])
def test_layers_of_grids_keep_the_sharding_of_the_batch(routing, mesh):
    rngs = nnx.Rngs(0)
    layers = [
        nn.ConvCapsules(2, 4, 3, 4, kernel_size=3, strides=2, routing=routing, rngs=rngs),
        nn.GridCapsules(3, 4, 5, 4, routing=routing, rngs=rngs),
    ]
    poses = random.normal(size=(8, 5, 5, 2, 4)).astype(np.float32)
    activations = jnp.full(poses.shape[:-1], 0.5)

    @jax.jit
    @jax.grad
    def gradient(poses, activations):
        for layer in layers:
            poses, activations, _ = layer(poses, activations=activations)
        return jnp.sum(poses[..., 0])

    expected = gradient(poses, activations)
    with jax.set_mesh(mesh):
        batch = NamedSharding(mesh, PartitionSpec("batch"))
        got = gradient(*(jax.device_put(x, batch) for x in (poses, activations)))
        assert jax.typeof(got).sharding.spec[0] == "batch"
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("task", [Shifted(), Pairs(), Placed(), Distorted(), Cropped(4)], ids=str)
@pytest.mark.parametrize("sharded", ["keys", "images", "both"])
def test_images_are_transformed_where_they_are(task, sharded, mesh):
    several = (2,) if isinstance(task, Pairs) else ()
    images = random.integers(0, 255, (8, *several, 6, 6, 1), np.uint8)
    keys = jax.random.split(jax.random.key(0), 8)
    render = jax.jit(functools.partial(task.render, train=True))
    expected, _ = render(keys, images)
    with jax.set_mesh(mesh):
        batch = NamedSharding(mesh, PartitionSpec("batch"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        keys = jax.device_put(keys, everywhere if sharded == "images" else batch)
        images = jax.device_put(images, everywhere if sharded == "keys" else batch)
        pixels, _ = render(keys, images)
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


def test_a_convolution_that_is_named_says_what_came(mesh):
    images, kernel = jnp.ones((8, 12, 12, 1)), jnp.ones((3, 3, 1, 4))
    convolve = functools.partial(
        capsjax.conv_general_dilated,
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    with jax.set_mesh(mesh):
        images = jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch")))
        assert jax.typeof(convolve(images, kernel)).sharding.spec[0] == "batch"
        with pytest.raises(
            NotImplementedError, match=r"no explicit sharding, got float32\[8@batch"
        ):
            convolve(images, kernel, implementation="patches")


def test_the_gradient_of_a_bias_is_summed_in_float32(mesh):
    channels, d_out = jnp.zeros((8, 11, 13, 2), jnp.bfloat16), jnp.ones((8, 11, 13, 2))
    with jax.set_mesh(mesh):
        batch = NamedSharding(mesh, PartitionSpec("batch"))
        channels, d_out = jax.device_put((channels, d_out.astype(jnp.bfloat16)), batch)
        d_bias = jax.jit(lambda b, d: jax.vjp(lambda b: add_bias(channels, b), b)[1](d)[0])(
            jnp.zeros(2), d_out
        )
    np.testing.assert_array_equal(d_bias, 8 * 11 * 13)


@pytest.mark.parametrize("implementation", ["patches", "lookup", "fourier", "phases", "xla"])
def test_gradients_of_a_convolution_of_replicated_arrays(implementation, mesh):
    shapes = (2, 9, 8, 3), (3, 4, 3, 5), (5,)
    arrays = tuple(random.normal(size=shape) for shape in shapes)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(images, kernel, bias):
        convolved = capsjax.conv_general_dilated(
            images,
            kernel,
            window_strides=(2, 2),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            bias=bias,
            implementation=implementation,
        )
        return jnp.sum(convolved**2)

    expected = gradients(*arrays)
    with jax.set_mesh(mesh):
        got = gradients(*jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))
    for gradient, value in zip(got, expected, strict=True):
        np.testing.assert_allclose(gradient, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [("batch",), (None, None, "more")])
def test_the_reconstruction_loss_of_sharded_images(spec, mesh):
    images, targets = random.random((2, 8, 6, 8, 1)).astype(np.float32)
    loss = functools.partial(capsjax.reconstruction_loss, axis=(-3, -2, -1))
    expected = loss(images, targets)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        losses = loss(*jax.device_put((images, targets), sharding))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
