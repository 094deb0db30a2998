import copy
import functools
import pickle
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import all_finite, assert_close, assert_gradients
from flax import linen, nnx
from flax.nnx import bridge

from capsjax import dense_votes, dynamic_routing, models
from capsjax.nn import (
    ConvCapsules,
    Decoder,
    DenseCapsules,
    GridCapsules,
    MatrixConvCapsules,
    MatrixGridCapsules,
    MatrixPrimaryCapsules,
    PrimaryCapsules,
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def output(layer, *inputs):
    out = layer(*inputs)
    return out if isinstance(out, jax.Array) else out.poses


run = nnx.jit(output)


def count(module):
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


def bias_init(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


def primary(**options):
    return PrimaryCapsules(3, 2, 4, kernel_size=3, rngs=nnx.Rngs(0), **options)


def by_hand(layer, images, strides=(2, 2), pads=((0, 0), (0, 0))):
    """The squashed capsules, grouped with an explicit loop over types."""
    kernel, bias = (np.asarray(x[...], np.float64) for x in (layer.conv.kernel, layer.bias))
    channels = references.convolution(np.asarray(images, np.float64), kernel, strides, pads)
    channels = channels * layer.coupling + bias
    batch, rows, columns, _ = channels.shape
    capsules = np.zeros((batch, rows, columns, 2, 4))
    for kind in range(2):
        capsules[:, :, :, kind] = channels[..., 4 * kind : 4 * kind + 4]
    return references.squash(capsules).reshape(batch, -1, 4)


@pytest.mark.parametrize("coupling", [1.0, 0.25])
def test_primary_capsules_group_channels_of_one_position(coupling):
    images = normal(2, 9, 9, 3)
    layer = primary(coupling=coupling, bias_init=bias_init)
    assert_close(run(layer, images), by_hand(layer, images), terms=27)


def test_the_factor_of_primary_capsules_is_a_constant():
    assert type(primary(coupling=jnp.asarray(0.25)).coupling) is float
    with pytest.raises(ValueError, match=r"coupling must be one number, got shape \(2,\)"):
        primary(coupling=jnp.ones(2))


def test_primary_capsules_are_valid_by_default_and_can_be_same():
    images = normal(2, 9, 9, 3)
    assert nnx.eval_shape(primary(), images).shape == (2, 4 * 4 * 2, 4)
    layer = primary(padding="SAME", strides=1)
    expected = by_hand(layer, images, (1, 1), ((1, 1), (1, 1)))
    assert_close(run(layer, images), expected, terms=27)


def test_primary_capsules_have_no_relu():
    # A ReLU before the squash would make every component non-negative.
    assert (np.asarray(run(primary(), normal(2, 9, 9, 3))) < 0).any()


def test_primary_capsules_change_at_one_position_only_with_its_window():
    images, changed = np.array(normal(2, 9, 9, 3)), np.array(normal(2, 9, 9, 3))
    changed[0, 0, 0] += 1
    before, after = (np.asarray(run(primary(), x)[0]) for x in (images, changed))
    changed = (before != after).reshape(4, 4, 8).any(-1)
    assert changed[0, 0]
    assert changed.sum() == 1


def test_dense_capsules_are_votes_and_routing():
    layer = DenseCapsules(
        6,
        4,
        3,
        5,
        num_iterations=2,
        use_bias=True,
        leaky=True,
        bias_init=bias_init,
        rngs=nnx.Rngs(0),
    )
    logits, where = normal(6, 3, seed=1), np.arange(6) != 1

    @nnx.jit
    def both(layer, poses):
        expected = dynamic_routing(
            dense_votes(poses, layer.kernel[...]),
            num_iterations=2,
            bias=layer.router.bias[...],
            leaky=True,
            logits=logits,
            where=where,
        )
        return layer(poses, logits=logits, where=where), expected

    jax.tree.map(assert_close, *both(layer, normal(2, 6, 4)))
    assert count(layer) == 6 * 4 * 3 * 5 + 3 * 5


def test_stop_gradient_reaches_the_layer():
    poses, gradients = normal(2, 6, 4), []
    for stop_gradient in (False, True):
        layer = DenseCapsules(6, 4, 3, 5, stop_gradient=stop_gradient, rngs=nnx.Rngs(0))
        gradient = jax.jit(jax.grad(lambda x, f=layer: f(x).activations[..., 0].sum()))
        gradients.append(np.asarray(gradient(poses)))
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-5


def test_decoder_is_a_multilayer_perceptron_of_the_masked_capsules():
    decoder = Decoder(
        3, 4, (2, 3, 1), hidden_features=(5, 7), bias_init=bias_init, rngs=nnx.Rngs(0)
    )
    poses, mask = normal(2, 3, 4), np.array([[0, 1, 0], [1, 0, 0]], np.int32)
    x = (np.asarray(poses, np.float64) * mask[..., None]).reshape(2, 12)
    weights = [
        [np.asarray(w[...], np.float64) for w in (layer.kernel, layer.bias)]
        for layer in decoder.layers
    ]
    for kernel, bias in weights[:-1]:
        x = np.maximum(0, x @ kernel + bias)
    kernel, bias = weights[-1]
    expected = 1 / (1 + np.exp(-(x @ kernel + bias)))
    assert_close(run(decoder, poses, mask), expected.reshape(2, 2, 3, 1), terms=12)
    assert count(decoder) == 12 * 5 + 5 + 5 * 7 + 7 + 7 * 6 + 6


def test_no_gradient_reaches_a_masked_capsule():
    decoder = Decoder(3, 4, (2, 2, 1), hidden_features=(8,), rngs=nnx.Rngs(0))
    mask, poses = np.array([0, 1, 0]), np.array(normal(3, 4))

    @jax.jit
    def with_gradient(poses):
        image, pullback = jax.vjp(lambda p: decoder(p, mask), poses)
        return image, pullback(jnp.ones_like(image))[0]

    images, gradients = [], []
    for masked in (0, np.inf):
        poses[0] = masked
        for results, x in zip((images, gradients), with_gradient(poses), strict=True):
            results.append(np.asarray(x))
    np.testing.assert_array_equal(*images)
    np.testing.assert_array_equal(gradients[0][[0, 2]], 0)
    assert (gradients[0][1] != 0).any()


def test_decoder_names_a_mask_of_the_wrong_shape():
    decoder = Decoder(3, 4, (2, 2, 1), hidden_features=(5,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"mask must have shape .* = \(2, 3\), got \(3,\)"):
        decoder(normal(2, 3, 4), np.ones(3))


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 2, 4), (12,)])  # the first of as many numbers
def test_decoder_names_poses_of_the_wrong_shape(shape):
    decoder = Decoder(3, 4, (2, 2, 1), hidden_features=(5,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"poses must have .* = \[..., 3, 4\], got shape \("):
        decoder(normal(*shape), np.ones(shape[:-1]))


LAYERS = {
    "primary": (functools.partial(PrimaryCapsules, 3, 2, 4, kernel_size=3), (normal(2, 9, 9, 3),)),
    "dense": (functools.partial(DenseCapsules, 6, 4, 3, 5), (normal(2, 6, 4),)),
    "decoder": (
        functools.partial(Decoder, 3, 4, (2, 3, 1), hidden_features=(5,)),
        (normal(2, 3, 4), np.ones((2, 3), np.float32)),
    ),
}


def layer_of(name, **options):
    make, inputs = LAYERS[name]
    return make(rngs=nnx.Rngs(0), **options), inputs


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_computes_with_float32_parameters(name):
    layer, inputs = layer_of(name, dtype=jnp.bfloat16)
    exact, _ = layer_of(name)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.float32)}
    out = run(layer, *inputs)
    assert out.dtype == jnp.bfloat16
    assert_close(out, run(exact, *inputs), terms=27, dtype=jnp.bfloat16, scale=1.0)


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_may_be_narrow(name):
    layer, inputs = layer_of(name, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.bfloat16)}
    # Inputs are float32: they promote.
    assert nnx.eval_shape(output, layer, *inputs).dtype == jnp.float32


@pytest.mark.parametrize("name", LAYERS)
def test_leading_axes_are_free(name):
    layer, inputs = layer_of(name)
    whole = run(layer, *inputs)
    for reshape in (lambda x: x[0], lambda x: x[None], lambda x: np.stack([x, x])):
        out = run(layer, *(jnp.asarray(reshape(np.asarray(x))) for x in inputs))
        np.testing.assert_allclose(out, reshape(np.asarray(whole)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_parameters_and_inputs(name):
    # In float64, where steps are so small that none crosses the kink of a ReLU.
    with jax.enable_x64(True):
        layer, inputs = layer_of(name, param_dtype=jnp.float64)
        graphdef, state = nnx.split(layer)

        def function(state, x, **options):
            return output(functools.partial(nnx.merge(graphdef, state), **options), x, *inputs[1:])

        # Votes that are not stored have reverse-mode derivatives only.
        options = {"implementation": "reference"} if name == "dense" else {}
        assert_gradients(
            functools.partial(function, **options), state, inputs[0], forward=True, rtol=1e-5
        )
        if name == "dense":
            blocked = functools.partial(function, implementation="blocked")
            assert_gradients(blocked, state, inputs[0], rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_nnx_transformations(name):
    layer, inputs = layer_of(name)
    expected = output(layer, *inputs)
    np.testing.assert_allclose(run(layer, *inputs), expected, rtol=1e-5, atol=1e-6)
    gradients = nnx.jit(nnx.grad(lambda m: output(m, *inputs).sum()))(layer)
    assert all_finite(gradients)


def test_goes_into_a_linen_module():
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4)(x)
            return bridge.to_linen(DenseCapsules, 6, 4, 3, 5)(x).activations

    variables = jax.jit(Network().init)(jax.random.key(0), normal(2, 6, 2))

    @jax.jit
    def with_gradient(variables):
        out, pullback = jax.vjp(lambda v: Network().apply(v, normal(2, 6, 2)), variables)
        return out, pullback(jnp.ones_like(out))

    out, gradients = with_gradient(variables)
    assert out.shape == (2, 3)
    assert all_finite(gradients)


def test_dense_capsules_return_the_coupling_of_the_reference():
    layer = DenseCapsules(6, 3, 4, 5, rngs=nnx.Rngs(0))
    poses = jnp.ones((2, 6, 3))
    assert nnx.eval_shape(layer, poses).coupling is None
    routed = jax.jit(lambda x: layer(x, implementation="reference"))(poses)
    np.testing.assert_allclose(routed.coupling.sum(-1), 1, rtol=1e-6)
    blocked = jax.jit(lambda x: layer(x, implementation="blocked"))(poses)
    np.testing.assert_allclose(routed.poses, blocked.poses, rtol=1e-5)
    prior = jnp.zeros((6, 4))
    primed = jax.jit(lambda x: layer(x, logits=prior))(poses)
    np.testing.assert_allclose(primed.coupling, routed.coupling, rtol=1e-6)
    with pytest.raises(ValueError, match="None or 'reference' for votes that have to be stored"):
        layer(poses, logits=prior, implementation="blocked")
    with pytest.raises(ValueError, match="implementation must be None or one of reference for"):
        DenseCapsules(6, 3, 4, 5, routing="em", implementation="blocked", rngs=nnx.Rngs(0))


MADE = {
    "in_capsules": lambda x: DenseCapsules(x, 4, 3, 5, rngs=nnx.Rngs(0)),
    "out_features": lambda x: DenseCapsules(6, 4, 3, x, rngs=nnx.Rngs(0)),
    "num_iterations": lambda x: DenseCapsules(6, 4, 3, 5, num_iterations=x, rngs=nnx.Rngs(0)),
    "in_types": lambda x: ConvCapsules(x, 4, 3, 5, kernel_size=3, rngs=nnx.Rngs(0)),
    "out_types": lambda x: ConvCapsules(2, 4, x, 5, kernel_size=3, rngs=nnx.Rngs(0)),
    "out_capsules": lambda x: GridCapsules(2, 4, x, 5, rngs=nnx.Rngs(0)),
    "features": lambda x: MatrixGridCapsules(2, 3, x, rngs=nnx.Rngs(0)),
    "num_types": lambda x: PrimaryCapsules(3, x, 4, rngs=nnx.Rngs(0)),
    "in_features": lambda x: Decoder(3, x, (2, 2, 1), rngs=nnx.Rngs(0)),
    r"image_shape\[0\]": lambda x: Decoder(3, 4, (x, 2, 1), rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", MADE)
def test_sizes_are_positive_integers(name):
    for value in (None, True, 2.0, "3"):
        with pytest.raises(TypeError, match=f"^{name} must be a Python integer, got"):
            MADE[name](value)
    for value, expected in ((0, "at least 1, got 0"), (-1, "at least 1"), (2**64, "at most 21474")):
        with pytest.raises(ValueError, match=f"^{name} must be {expected}"):
            MADE[name](value)
    for value in (jnp.asarray(4), np.int64(4)):  # a square number
        assert hash(nnx.graphdef(MADE[name](value))) == hash(nnx.graphdef(MADE[name](4)))


SCALARS = {
    "inverse_temperature": functools.partial(DenseCapsules, 6, 4, 3, 5, routing="em"),
    "seed": functools.partial(GridCapsules, 2, 4, 3, 5, routing="random"),
    "num_iterations": functools.partial(ConvCapsules, 2, 4, 3, 5, kernel_size=3),
}


@pytest.mark.parametrize("name", SCALARS)
def test_options_are_constants(name):
    for scalar in (jnp.asarray(2), np.int32(2)):
        ((_, option),) = SCALARS[name](**{name: scalar}, rngs=nnx.Rngs(0)).router.options
        assert type(option) is int
    for value in ([2], jnp.ones(2), jax.random.key(0)):
        with pytest.raises(TypeError, match=f"^{name} must be a (number or hash|Python int)"):
            SCALARS[name](**{name: value}, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=f"^{name} must be"):
        jax.jit(lambda x: SCALARS[name](**{name: x}, rngs=nnx.Rngs(0)) and x)(1.0)


HASHED = {
    "dense": functools.partial(DenseCapsules, 6, 4, 3, 5, num_iterations=2, leaky=True),
    "conv": functools.partial(ConvCapsules, 2, 4, 3, 5, kernel_size=3, routing="em"),
    "grid": functools.partial(GridCapsules, 2, 4, 3, 5, routing="self"),
    "matrix conv": functools.partial(MatrixConvCapsules, 2, 3, 4, kernel_size=3),
    "matrix grid": functools.partial(MatrixGridCapsules, 2, 3, 4, inverse_temperature=0.5),
    "heinsen": functools.partial(DenseCapsules, 6, 4, 3, 5, routing="heinsen"),
    "matrix primary": functools.partial(MatrixPrimaryCapsules, 3, 2, 4),
    "small": functools.partial(models.create, "small"),
    "matrix_capsnet_small": functools.partial(models.create, "matrix_capsnet_small"),
    "efficient_capsnet": functools.partial(models.create, "efficient_capsnet"),
    **{name: make for name, (make, _) in LAYERS.items() if name != "dense"},
}


@pytest.mark.parametrize("name", HASHED)
def test_graphs_are_hashable(name):
    first, second = (nnx.eval_shape(lambda: HASHED[name](rngs=nnx.Rngs(0))) for _ in range(2))
    assert hash(nnx.graphdef(first)) == hash(nnx.graphdef(second))
    assert nnx.graphdef(first) == nnx.graphdef(second)


def test_a_graph_can_be_a_static_argument_and_copied():
    layer, poses = HASHED["dense"](rngs=nnx.Rngs(0)), normal(2, 6, 4)
    call = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x).poses, static_argnums=0)
    expected = call(*nnx.split(layer), poses)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(call(*nnx.split(copied), poses), expected)


SWITCHED = {
    "use_bias": functools.partial(DenseCapsules, 6, 4, 3, 5),
    "coordinates": functools.partial(GridCapsules, 2, 4, 3, 5),
    "keep_grid": functools.partial(PrimaryCapsules, 3, 2, 4),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_switches_are_bools(name):
    for value in (None, 1, "no"):
        with pytest.raises(TypeError, match=f"^{name} must be True or False, got {value!r}"):
            SWITCHED[name](**{name: value}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(DenseCapsules, 6, 4, 3, 5),
        functools.partial(ConvCapsules, 2, 4, 3, 5, kernel_size=3),
        functools.partial(PrimaryCapsules, 3, 2, 4),
        functools.partial(MatrixPrimaryCapsules, 3, 2, 4),
        functools.partial(Decoder, 3, 4, (2, 2, 1)),
    ],
    ids=lambda make: make.func.__name__,
)
def test_streams_initialisers_and_inputs_are_named(make):
    for rngs in (None, 0, jax.random.key(0)):
        with pytest.raises(TypeError, match="rngs must be an nnx.Rngs .* such as nnx.Rngs"):
            make(rngs=rngs)
    with pytest.raises(TypeError, match="kernel_init must be a function, got None"):
        make(kernel_init=None, rngs=nnx.Rngs(0))
    initialisers = nnx.initializers
    for init, error, got in (
        (initialisers.lecun_normal, TypeError, "a floating-point array, got function"),
        (
            lambda key, shape, dtype: np.ones(shape, int),
            TypeError,
            "a floating-point array, got in",
        ),
        (
            lambda key, shape, dtype: jnp.ones((1,), dtype),
            ValueError,
            r"an array of shape .*\(1,\)",
        ),
    ):
        with pytest.raises(error, match=f"kernel_init must return {got}"):
            make(kernel_init=init, rngs=nnx.Rngs(0))
    divided = nnx.with_partitioning(initialisers.lecun_normal(), ())
    assert make(kernel_init=divided, rngs=nnx.Rngs(0)) is not None
    for dtype in ("bfloat", int, complex, 3):
        for name in ("dtype", "param_dtype"):
            with pytest.raises(TypeError, match=f"^{name} must be a floating-point dtype, got .*"):
                make(**{name: dtype}, rngs=nnx.Rngs(0))
    for precision in ("sharp", 3):
        with pytest.raises(ValueError, match="precision must be None or a precision of JAX's"):
            make(precision=precision, rngs=nnx.Rngs(0))
    assert make(dtype="bfloat16", precision="highest", rngs=nnx.Rngs(0)) is not None
    name = "inputs" if "Primary" in make.func.__name__ else "poses"
    arguments = (None, None) if make.func is Decoder else (None,)
    with pytest.raises(TypeError, match=f"{name} must be an array, got None"):
        make(rngs=nnx.Rngs(0))(*arguments)


def test_the_function_of_a_convolution_can_be_replaced():
    layer = MatrixPrimaryCapsules(3, 2, 4, bias_init=bias_init, rngs=nnx.Rngs(0))
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    other = MatrixPrimaryCapsules(3, 2, 4, rngs=nnx.Rngs(0))
    expected, without_bias = layer(inputs)[0], other(inputs)[0]
    own = layer.conv.conv_general_dilated

    def doubled(*args, **options):
        return 2 * jax.lax.conv_general_dilated(*args, **options)

    layer.conv.conv_general_dilated = doubled
    for each in (layer, nnx.clone(layer), copy.deepcopy(layer), nnx.merge(*nnx.split(layer))):
        np.testing.assert_allclose(each(inputs)[0], expected + without_bias, rtol=1e-5, atol=1e-5)
    # What another layer or this one has computed with brings no bias along.
    other.conv.conv_general_dilated = layer.conv.conv_general_dilated
    np.testing.assert_allclose(other(inputs)[0], 2 * without_bias, rtol=1e-5, atol=1e-5)
    layer.conv.conv_general_dilated = own
    del other.conv.conv_general_dilated
    for each, value in ((other, without_bias), (layer, expected + without_bias)):
        np.testing.assert_allclose(each(inputs)[0], value, rtol=1e-5, atol=1e-5)
    with mock.patch.object(other.conv, "conv_general_dilated", doubled):
        np.testing.assert_allclose(other(inputs)[0], 2 * without_bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other(inputs)[0], without_bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_an_empty_batch_gives_an_empty_result(name, leading):
    layer, inputs = layer_of(name)
    shapes = [jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype) for x in inputs]
    whole = jax.eval_shape(lambda *x: output(layer, *x), *inputs)
    empty = jax.eval_shape(lambda *x: output(layer, *x), *shapes)
    assert empty.shape == (*leading, *whole.shape[1:])


@pytest.mark.parametrize("routing", ["kmeans", "em"])
@pytest.mark.parametrize("kind", [ConvCapsules, GridCapsules])
def test_an_empty_batch_of_grids_gives_an_empty_result(kind, routing):
    options = {"kernel_size": 2} if kind is ConvCapsules else {}
    layer = kind(2, 4, 3, 5, routing=routing, rngs=nnx.Rngs(0), **options)
    shape = jax.ShapeDtypeStruct((0, 3, 3, 2, 4), jnp.float32)
    places = (2, 2) if kind is ConvCapsules else ()
    routed = jax.eval_shape(lambda x: layer(x), shape)
    assert (routed.poses.shape, routed.activations.shape) == ((0, *places, 3, 5), (0, *places, 3))


@pytest.mark.parametrize("options", [{}, {"keep_grid": True, "coupling": 0.5}, {"padding": "SAME"}])
def test_primary_capsules_are_the_same_on_tpus(request, options):
    layer, images = primary(bias_init=bias_init, **options), normal(2, 9, 8, 3)

    def loss(layer, images):
        capsules = layer(images)
        return jnp.sum(jnp.sin(3 * capsules)), capsules

    run = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    here = run(layer, images)
    request.getfixturevalue("as_on_tpu")
    on_tpu = run(layer, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), here, on_tpu)
