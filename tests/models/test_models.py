import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import all_finite, assert_close
from flax import nnx

from capsjax import length, margin_loss, models, routing
from capsjax.models import BaselineConfig, CapsNetConfig
from capsjax.ops import exponential_squash


def count(preset, **overrides):
    """Parameters, without making any."""
    network = nnx.eval_shape(lambda: models.create(preset, rngs=nnx.Rngs(0), **overrides))
    return sum(x.size for x in jax.tree.leaves(nnx.state(network, nnx.Param)))


@pytest.mark.parametrize(
    ("preset", "overrides", "parameters"),
    [
        ("paper", {}, 8_215_568),
        ("official", {}, 8_215_728),
        ("official", {"decoder_features": ()}, 6_804_384),
        ("official", {"image_shape": (36, 36, 1)}, 11_361_968),
        ("cifar10", {}, 22_476_448),
        ("small", {}, 1_051_344),
        ("baseline", {}, 35_445_522),
        ("baseline_small", {}, 1_059_146),
        ("baseline_pairs", {"image_shape": (36, 36, 1)}, 24_535_306),
        ("efficient_capsnet", {}, 161_824),
        ("large_images", {}, 469_312),
        # The paper gives 310,000 and 68,000 for images of another size and number of classes.
        ("matrix_capsnet", {}, 318_964),
        ("matrix_capsnet_small", {}, 68_444),
    ],
)
def test_parameter_counts(preset, overrides, parameters):
    assert count(preset, **overrides) == parameters


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"implementation": "cudnn"}, "implementation must be None or one of reference, blocked"),
        ({"routing": "em", "implementation": "blocked"}, "one of reference for routing 'em', got"),
    ],
)
def test_an_implementation_that_is_not_there_is_named_before_anything_is_built(fields, match):
    with pytest.raises(ValueError, match=match):
        CapsNetConfig(**fields)


def test_sizes_of_the_paper():
    config = models.configure("paper")
    assert config.grid == (6, 6)
    assert config.num_primary == 1152
    found = {
        "/".join(map(str, path)): leaf.shape
        for path, leaf in nnx.to_flat_state(nnx.state(shapes(config), nnx.Param))
    }
    assert found["conv/kernel"] == (9, 9, 1, 256)
    assert found["primary/conv/kernel"] == (9, 9, 256, 256)
    assert found["classes/kernel"] == (1152, 8, 10, 16)
    assert found["decoder/layers/2/kernel"] == (1024, 784)


TINY = CapsNetConfig(
    image_shape=(14, 12, 1),
    num_classes=3,
    conv_features=6,
    conv_kernel=3,
    primary_types=2,
    primary_features=4,
    primary_kernel=3,
    class_features=5,
    decoder_features=(7,),
)


@functools.cache
def build(config):
    """The network; tests share it, and its parameters are made by one program."""
    return nnx.jit(lambda: models.build(config, rngs=nnx.Rngs(0)))()


def shapes(config):
    """The network as shapes, for tests that compute nothing."""
    return nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))


@nnx.jit
def apply(network, images, **options):
    return network(images, **options)


def images(batch=2, shape=TINY.image_shape):
    return jnp.asarray(np.random.default_rng(0).random((batch, *shape)), jnp.float32)


def test_is_the_paper_s_network():
    """Against the formulas, chained by hand in float64."""
    config = dataclasses.replace(
        TINY, routing_bias=True, primary_coupling=0.5, initialisation="official"
    )
    network = build(config)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(network)))
    no_pads = ((0, 0), (0, 0))
    x = np.asarray(images(), np.float64)
    x = references.convolution(x, p["conv"]["kernel"], (1, 1), no_pads) + p["conv"]["bias"]
    x = references.convolution(np.maximum(0, x), p["primary"]["conv"]["kernel"], (2, 2), no_pads)
    u = references.squash((x * 0.5 + p["primary"]["bias"]).reshape(2, -1, 4))
    prediction = apply(network, images())
    for b in range(2):
        votes = references.dense_votes(u[b], p["classes"]["kernel"])
        v, lengths, _ = references.dynamic_routing(votes, 3, bias=p["classes"]["router"]["bias"])
        assert_close(prediction.poses[b], v, terms=100)
        assert_close(prediction.scores[b], lengths, terms=100)


def test_other_image_sizes_channels_and_classes():
    network = shapes(dataclasses.replace(TINY, image_shape=(17, 20, 3), num_classes=7))
    prediction = nnx.eval_shape(apply, network, images(shape=(17, 20, 3)))
    assert prediction.scores.shape == (2, 7)
    assert prediction.reconstruction.shape == (2, 17, 20, 3)


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (2, 3)])
def test_the_grid_is_what_the_convolutions_make(padding, strides):
    config = dataclasses.replace(
        TINY, padding=padding, conv_strides=strides[0], primary_strides=strides[1]
    )
    network = shapes(config)
    routed = nnx.eval_shape(lambda network, x: network.route(x), network, images())
    assert routed.coupling.shape == (2, config.num_primary, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_lengths_in_float32(dtype):
    network = build(dataclasses.replace(TINY, dtype=dtype))
    prediction = apply(network, images())
    assert prediction.poses.dtype == dtype
    assert {prediction.scores.dtype, prediction.reconstruction.dtype} == {jnp.dtype(jnp.float32)}
    expected = length(prediction.poses.astype(jnp.float32))
    np.testing.assert_array_equal(prediction.scores, expected)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(network))} == {jnp.dtype(jnp.float32)}


def test_the_decoder_sees_the_target_or_else_the_longest_capsule():
    network = build(TINY)
    free = apply(network, images())
    longest = np.eye(3, dtype=np.float32)[np.argmax(free.scores, -1)]
    guided = apply(network, images(), target=longest)
    np.testing.assert_allclose(free.reconstruction, guided.reconstruction, rtol=1e-6)
    other = np.roll(longest, 1, axis=-1)
    told = apply(network, images(), target=other)
    np.testing.assert_array_equal(told.scores, guided.scores)
    expected = nnx.jit(lambda network: network.decoder(free.poses, other))(network)
    np.testing.assert_allclose(told.reconstruction, expected, rtol=1e-5)
    assert np.abs(np.asarray(told.reconstruction) - np.asarray(free.reconstruction)).max() > 1e-3


def test_without_a_decoder_there_is_no_reconstruction():
    network = shapes(dataclasses.replace(TINY, decoder_features=()))
    assert nnx.eval_shape(apply, network, images()).reconstruction is None


def test_a_prediction_does_not_depend_on_its_batch():
    network, batch = build(TINY), images(4)
    together, changed = apply(network, batch), apply(network, batch.at[1:].set(0))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), together, changed)


def test_gradients_are_finite_for_blank_images():
    graphdef, state = nnx.split(build(TINY))

    def loss(state):
        prediction = nnx.merge(graphdef, state)(jnp.zeros_like(images()))
        return prediction.scores.sum() + prediction.reconstruction.sum()

    assert all_finite(jax.jit(jax.grad(loss))(state))


def test_initialisers_of_the_authors_code():
    # Smaller, with enough of each for their standard deviation.
    sizes = {"conv_features": 64, "primary_types": 8, "decoder_features": (64, 128)}
    network = build(models.configure("official", **sizes))
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(network)))
    biases = [state["conv"]["bias"], state["primary"]["bias"], state["classes"]["router"]["bias"]]
    biases += [layer["bias"] for layer in state["decoder"]["layers"].values()]
    for bias in biases:
        np.testing.assert_array_equal(bias, np.float32(0.1))
    kernels = {
        0.05: [state["conv"]["kernel"]],
        0.1: [state["primary"]["conv"]["kernel"], state["classes"]["kernel"]]
        + [layer["kernel"] for layer in state["decoder"]["layers"].values()],
    }
    for stddev, arrays in kernels.items():
        for array in arrays:
            # TensorFlow's truncated normal redraws beyond two σ; what is left has 0.88 σ.
            assert np.abs(array).max() <= 2 * stddev * 1.0001
            np.testing.assert_allclose(np.std(array), 0.8796 * stddev, rtol=0.03)
    assert network.primary.coupling == 1 / 32


def test_official_differs_from_paper_by_what_it_says():
    paper, official = (models.configure(name) for name in ("paper", "official"))
    differing = {
        field.name
        for field in dataclasses.fields(paper)
        if getattr(paper, field.name) != getattr(official, field.name)
    }
    assert differing == {"primary_coupling", "routing_bias", "initialisation"}


@pytest.mark.parametrize("preset", ["official", "cifar10", "smallnorb", "svhn"])
def test_the_authors_primary_capsules_share_a_single_child(preset):
    config = models.configure(preset)
    assert config.initialisation == "official"
    # The softmax of zeros over the types, and over one more in leaky routing.
    assert config.primary_coupling == 1 / (config.primary_types + config.leaky)


SMALLEST = {
    "small": {"conv_features": 4, "primary_types": 1, "decoder_features": (7,)},
    "matrix_capsnet_small": {"conv_features": 4, "primary_types": 2, "capsule_types": (3, 2)},
    "efficient_capsnet": {"conv_features": (4, 4, 4, 16), "decoder_features": (7,)},
}
ROUTED = [
    (p, r)
    for p in SMALLEST
    for r in routing.algorithms()
    if (p, r) != ("matrix_capsnet_small", "heinsen")
]


def predict(preset, name):
    network = models.create(preset, rngs=nnx.Rngs(0), routing=name, **SMALLEST[preset])
    network.eval()
    return network(jnp.ones((2, 28, 28, 1)), target=jax.nn.one_hot(jnp.arange(2), 10))


@pytest.mark.parametrize(("preset", "name"), ROUTED)
def test_every_network_takes_every_routing(preset, name):
    """Only traced: what layers compute is tested with the layers."""
    prediction = nnx.eval_shape(lambda: predict(preset, name))
    assert (prediction.scores.shape, prediction.poses.shape) == ((2, 10), (2, 10, 16))
    assert (prediction.reconstruction is None) == (preset == "matrix_capsnet_small")
    if prediction.reconstruction is not None:
        assert prediction.reconstruction.shape == (2, 28, 28, 1)


@pytest.mark.parametrize(
    "preset",
    [pytest.param(p, marks=[pytest.mark.slow] * p.startswith("matrix")) for p in SMALLEST]
    + ["baseline"],
)
def test_an_empty_batch_gives_empty_predictions(preset):
    def scores_and_gradient(x):
        network = models.create(preset, rngs=nnx.Rngs(0), **SMALLEST.get(preset, {}))
        network.eval()

        def total(x):
            scores = network(x, target=jnp.zeros((0, 10))).scores
            return scores.sum(), scores

        gradient, scores = jax.grad(total, has_aux=True)(x)
        return scores, gradient

    x = jax.ShapeDtypeStruct((0, 28, 28, 1), jnp.float32)
    scores, gradient = jax.eval_shape(scores_and_gradient, x)
    assert (scores.shape, gradient.shape) == ((0, 10), x.shape)


@pytest.mark.parametrize("preset", SMALLEST)
def test_every_network_computes_finite_scores(preset):
    network = nnx.clone(build(models.configure(preset, **SMALLEST[preset])))
    network.eval()
    assert all_finite(apply(network, images(2, (28, 28, 1))).scores)


def test_matrix_capsnet_is_em_over_its_layers():
    config = models.configure("matrix_capsnet_small", **SMALLEST["matrix_capsnet_small"])
    assert config.grid == (3, 3)
    network = build(config)
    x = images(2, (28, 28, 1))

    @nnx.jit
    def by_hand(network, x):
        poses, activations = network.primary(jax.nn.relu(network.conv(x)))
        shapes = [poses.shape]
        for layer in network.capsules:
            poses, activations, _ = layer(poses, activations=activations)
            shapes.append(poses.shape)
        assert shapes == [(2, 12, 12, 2, 16), (2, 5, 5, 3, 16), (2, 3, 3, 2, 16)]
        return network.classes(poses, activations=activations).activations

    np.testing.assert_allclose(apply(network, x).scores, by_hand(network, x), rtol=1e-5)
    assert network.classes.kernel.shape == (2, 4, 10, 4)
    assert network.classes.coordinates


def test_efficient_capsnet_may_have_a_grid_of_capsules():
    fields = {**SMALLEST["efficient_capsnet"], "primary_kernel": 3, "primary_strides": 2}
    config = models.configure("efficient_capsnet", **fields)
    assert (config.grid, config.num_primary) == ((9, 9), 4 * 4 * 2)
    network = build(config)
    network.eval()
    assert network.primary.kernel.shape == (3, 3, 16, 16)
    x = images(2, (28, 28, 1))
    routed = nnx.jit(lambda network, x: network.route(x))(network, x)
    assert routed.coupling.shape == (2, 32, 10)

    @nnx.jit
    def by_hand(network, maps):
        # A capsule is K neighbouring channels in one place of the grid.
        for conv, norm in zip(network.convs, network.norms, strict=True):
            maps = norm(jax.nn.relu(conv(maps)))
        capsules = network.primary(maps).reshape(2, 4 * 4, 2, 8).reshape(2, 32, 8)
        return network.classes(exponential_squash(capsules))

    np.testing.assert_allclose(routed.poses, by_hand(network, x).poses, rtol=1e-5, atol=1e-6)
    # The paper's: one place.
    assert models.configure("efficient_capsnet").num_primary == 16


@pytest.mark.parametrize(("size", "grid"), [(64, 2), (96, 4), (128, 6), (224, 12)])
def test_large_images_have_as_many_capsules_as_small_ones(size, grid):
    config = models.configure("large_images", image_shape=(size, size, 3), num_classes=5)
    assert (config.grid, config.num_primary) == ((grid, grid), 32)
    prediction = nnx.eval_shape(lambda n: n(jnp.ones((2, size, size, 3))), shapes(config))
    assert (prediction.scores.shape, prediction.poses.shape) == ((2, 5), (2, 5, 16))


@pytest.mark.slow
def test_large_images_train():
    fields = {"image_shape": (64, 64, 1), "num_classes": 2, "conv_features": (2, 2, 2, 8)}

    @nnx.jit
    def gradients(x):
        network = models.create("large_images", rngs=nnx.Rngs(0), **fields)
        return nnx.grad(lambda n: margin_loss(n(x).scores, jnp.eye(2)).mean())(network)

    for leaf in jax.tree.leaves(gradients(images(2, (64, 64, 1)))):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_efficient_capsnet_normalises_over_the_batch_in_training_only():
    config = models.configure("efficient_capsnet", **SMALLEST["efficient_capsnet"])
    network = nnx.clone(build(config))
    x = images(2, (28, 28, 1))
    network.eval()
    alone, together = (np.asarray(apply(network, batch).scores[:1]) for batch in (x[:1], x))
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-6)
    network.train()
    before = np.asarray(network.norms[0].mean[...])
    assert (np.asarray(apply(network, x).scores[:1]) != together).any()
    assert (np.asarray(network.norms[0].mean[...]) != before).any()


@pytest.mark.parametrize(
    ("preset", "overrides", "match"),
    [
        ("small", {"routing": "sinkhorn"}, "routing must be one of .*dynamic.* got 'sinkhorn'"),
        ("small", {"routing": "em", "leaky": True}, "routing 'em' has no option 'leaky'"),
        ("small", {"routing": "em", "routing_bias": True}, "routing 'em' has no bias"),
        ("matrix_capsnet", {"pose_features": 15}, "pose_features must be a square number, got 15"),
        ("matrix_capsnet", {"capsule_strides": (2,)}, "one entry for each of the 2 capsule_types"),
        ("matrix_capsnet", {"routing": "heinsen"}, "'heinsen' makes its own votes"),
        ("matrix_capsnet", {"image_shape": (12, 12, 1)}, "too small for 2 layers of capsules"),
        ("efficient_capsnet", {"primary_features": 7}, "primary_features must divide .* got 7"),
        ("efficient_capsnet", {"conv_kernels": (5,)}, "one entry for each of the 4 conv_features"),
        ("efficient_capsnet", {"conv_features": ()}, "conv_features must have at least one"),
        ("efficient_capsnet", {"image_shape": (10, 10, 1)}, "too small for kernels"),
        ("efficient_capsnet", {"primary_kernel": 0}, "primary_kernel must be at least 1, got 0"),
        ("efficient_capsnet", {"primary_kernel": 10}, r"must fit the last .*\(9, 9\), got 10"),
        ("efficient_capsnet", {"primary_strides": 2}, "primary_strides needs a primary_kernel"),
    ],
)
def test_bad_configurations_of_other_networks_are_named(preset, overrides, match):
    with pytest.raises(ValueError, match=match):
        models.configure(preset, **overrides)


BASELINE = BaselineConfig(
    image_shape=(8, 6, 1), num_classes=3, conv_features=(4, 5), dense_features=(16, 64)
)


def test_baseline_gives_logits_and_drops_only_with_keys():
    network = build(BASELINE)
    x = images(3, (8, 6, 1))
    plain = apply(network, x)
    assert plain.scores.shape == (3, 3)
    assert plain.poses is plain.reconstruction is None
    np.testing.assert_array_equal(plain.scores, apply(network, x).scores)
    keys = jax.random.split(jax.random.key(0), 3)
    dropped = apply(network, x, keys=keys)
    assert (np.asarray(dropped.scores) != np.asarray(plain.scores)).all()
    # An image's draws are its own, whatever batch it stands in.
    order = np.array([2, 0, 0])
    others = apply(network, x[order], keys=keys[order])
    for wrong in ([0, 1, 2], jnp.arange(3)):
        with pytest.raises(TypeError, match="keys must be typed as by jax.random.key, got"):
            apply(network, x, keys=wrong)
    for wrong in (keys[0], keys[:2], keys[:, None]):
        with pytest.raises(ValueError, match=r"keys must have shape \[...\] = \(3,\), got shape"):
            apply(network, x, keys=wrong)
    np.testing.assert_allclose(others.scores, np.asarray(dropped.scores)[order], rtol=1e-5)


@pytest.mark.parametrize("pooling", [1, 2])
def test_baseline_is_convolutions_and_a_perceptron(pooling):
    config = dataclasses.replace(BASELINE, conv_kernel=5, pooling=pooling)
    network = build(config)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(network)))
    x = np.asarray(images(2, (8, 6, 1)), np.float64)
    for conv in p["convs"].values():
        pads = ((2, 2), (2, 2))
        x = references.convolution(x, conv["kernel"], (1, 1), pads) + conv["bias"]
        x = np.maximum(0, x)
        rows, columns = (n // pooling for n in x.shape[1:3])
        windows = x[:, : rows * pooling, : columns * pooling]
        x = windows.reshape(2, rows, pooling, columns, pooling, -1).max((2, 4))
    x = x.reshape(2, -1)
    for dense in p["hidden"].values():
        x = np.maximum(0, x @ dense["kernel"] + dense["bias"])
    expected = x @ p["logits"]["kernel"] + p["logits"]["bias"]
    assert_close(apply(network, images(2, (8, 6, 1))).scores, expected, terms=200)


def test_dropout_keeps_the_expected_value():
    network = build(dataclasses.replace(BASELINE, dropout_rate=0.25))
    x = images(1, (8, 6, 1))
    many = jnp.broadcast_to(x, (2000, *x.shape[1:]))
    keys = jax.random.split(jax.random.key(0), 2000)
    mean = np.asarray(apply(network, many, keys=keys).scores).mean(0)
    plain = np.asarray(apply(network, x).scores[0])
    np.testing.assert_allclose(mean, plain, atol=0.05 * np.abs(plain).max())


BAD = [
    ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ({"image_shape": (28, 0, 1)}, r"image_shape\[1\] must be at least 1, got 0"),
    ({"image_shape": (16, 16, 1)}, r"image_shape \(16, 16, 1\) is too small for kernels 9 and 9"),
    ({"padding": "CIRCULAR"}, "padding must be 'VALID' or 'SAME', got 'CIRCULAR'"),
    ({"initialisation": "he"}, "initialisation must be one of .*got 'he'"),
    ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    ({"image_shape": (28, 28)}, r"image_shape must be \(rows, .*got \(28, 28\)"),
    ({"image_shape": [28, 28, 1]}, r"image_shape must be a tuple .*got \[28, 28, 1\]"),
    (
        {"decoder_features": [0]},
        r"decoder_features must be a tuple of positive",
    ),
    ({"num_classes": True}, "num_classes must be a Python integer, got True"),
    ({"num_classes": 2**64}, "num_classes must be at most 2147483647, got 18446744073709551616"),
    ({"image_shape": 28}, "image_shape must be a tuple of positive integers, got 28"),
    ({"primary_coupling": None}, "primary_coupling must be a number, got None"),
    ({"leaky": None}, "leaky must be True or False, got None"),
    ({"dtype": "int32"}, "dtype must be one of float32, bfloat16, got 'int32'"),
    ({"convs": 3}, "preset 'paper' has no field 'convs', only image_shape, "),
]


@pytest.mark.parametrize(("overrides", "match"), BAD, ids=[m for _, m in BAD])
def test_bad_configurations_are_named(overrides, match):
    with pytest.raises(ValueError, match=match):
        models.configure("paper", **overrides)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="preset must be one of paper, .*got 'papr'"):
        models.create("papr", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\), got 1"):
        models.configure("baseline", dropout_rate=1)
    with pytest.raises(ValueError, match="dense_features must have at least one entry"):
        models.configure("baseline", dense_features=())
    for rngs in (None, 0, jax.random.key(0), nnx.Rngs(dropout=0)):
        with pytest.raises(TypeError, match="rngs must be an nnx.Rngs with a stream for params"):
            models.create("small", rngs=rngs)
    with pytest.raises(TypeError, match="config must be a configuration.* got None"):
        models.build(None, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="config must be of type BaselineConfig, got None"):
        models.BaselineCNN(None, rngs=nnx.Rngs(0))
    network = build(TINY)
    with pytest.raises(TypeError, match="images must be an array, got None"):
        network(None)
    with pytest.raises(ValueError, match=r"target must be one-hot .* got shape \(2,\); for class"):
        jax.eval_shape(lambda x: network(x, target=jnp.array([0, 1])), jnp.zeros((2, 14, 12, 1)))
    with pytest.raises(TypeError, match="images must be floating-point .* got dtype uint8"):
        network(jnp.zeros((2, 14, 12, 1), jnp.uint8))
    with pytest.raises(ValueError, match=r"images must have shape .*14, 12, 1\], got .*28, 28, 1"):
        jax.jit(lambda x: network(x))(jnp.zeros((2, 28, 28, 1)))
