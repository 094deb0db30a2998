"""Layers on series, images and volumes: the same computation along any number of axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import nnx

from capsjax.nn import (
    ConvCapsules,
    Decoder,
    GridCapsules,
    MatrixConvCapsules,
    MatrixGridCapsules,
    MatrixPrimaryCapsules,
    PrimaryCapsules,
)
from capsjax.ops import ReceptiveFields


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def make(name, rank, unit=False):
    """A layer along so many axes, or with a kernel of 1 along one more."""
    axes, one = rank + unit, ((1,) if unit else ())
    window = {
        "kernel_size": (*(3, 2, 2)[:rank], *one),
        "strides": (*(2, 1, 1)[:rank], *one),
        "padding": (*((1, 0), (0, 1), (0, 0))[:rank], *((0, 0) for _ in one)),
    }
    kind, sizes, options = {
        "primary": (PrimaryCapsules, (3, 2, 4), {"keep_grid": True, **window}),
        "matrix primary": (MatrixPrimaryCapsules, (3, 2, 4), window),
        "conv": (ConvCapsules, (2, 4, 3, 5), window),
        "matrix conv": (MatrixConvCapsules, (2, 3, 4), window),
        "grid": (GridCapsules, (2, 4, 3, 5), {"num_spatial_dims": axes}),
        "matrix grid": (
            MatrixGridCapsules,
            (2, 3, 16),
            {"num_spatial_dims": axes, "coordinates": False},
        ),
    }[name]
    return kind(*sizes, **options, rngs=nnx.Rngs(0))


LAYERS = ("primary", "matrix primary", "conv", "matrix conv", "grid", "matrix grid")
CAPSULES = LAYERS[2:]


def inputs(name, grid):
    """What a layer is called with: feature maps, or poses, activations and a mask."""
    if name not in CAPSULES:
        return normal(*grid, 3), {}
    poses = np.asarray(normal(*grid, 2, 16 if name == "matrix grid" else 4))
    where = np.ones((*grid, 2), bool)
    where[(1,) * len(grid)] = False
    return poses, {"activations": references.sigmoid(poses[..., 0]), "where": where}


@nnx.jit
def apply(layer, x, options):
    return layer(x, **options)


@pytest.mark.parametrize(
    ("name", "rank"), [*((name, 1) for name in LAYERS), ("primary", 2), ("matrix conv", 2)]
)
def test_a_kernel_of_one_along_an_axis_is_a_layer_without_it(name, rank):
    @jax.jit
    def both(x, options):
        wide, wide_options = jax.tree.map(lambda a: jnp.expand_dims(a, rank), (x, options))
        unit = make(name, rank, unit=True)
        return make(name, rank)(x, **options), unit(wide, **wide_options)

    expected, got = both(*inputs(name, (5, 3)[:rank]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.size == b.size
        np.testing.assert_allclose(np.asarray(a).reshape(b.shape), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_leading_axes_are_free_and_mapped_over(name, rank):
    x, options = inputs(name, (5, 3, 2)[:rank])

    def layer(x, **options):
        return make(name, rank)(x, **options)

    def shapes(function, *arguments, **options):
        return [y.shape for y in jax.tree.leaves(jax.eval_shape(function, *arguments, **options))]

    expected = shapes(layer, x, **options)
    several = {
        key: np.broadcast_to(value, (2, 3, *value.shape))
        for key, value in {"x": x, **options}.items()
        if key != "where"
    }
    got = shapes(layer, several.pop("x"), **{**options, **several})
    assert got == [(2, 3, *shape) for shape in expected]
    assert shapes(jax.vmap(layer), x[None]) == [(1, *shape) for shape in expected]


def test_series_of_a_batch_are_not_mixed():
    layer = PrimaryCapsules(3, 2, 8, kernel_size=(9,), strides=2, rngs=nnx.Rngs(0))
    x = normal(4, 50, 3)
    together = np.asarray(apply(layer, x, {}))
    assert together.shape == (4, 42, 8)
    np.testing.assert_allclose(together[2], apply(layer, x[2], {}), rtol=1e-5, atol=1e-6)

    def volumes(x):
        return PrimaryCapsules(1, 2, 4, kernel_size=(3, 3, 3), rngs=nnx.Rngs(0))(x)

    assert jax.eval_shape(volumes, normal(2, 7, 7, 5, 1)).shape == (2, 3 * 3 * 2 * 2, 4)


def test_a_network_on_volumes_has_gradients():
    def make_network():
        rngs, size = nnx.Rngs(0), (2, 1, 2)
        return nnx.List(
            [
                PrimaryCapsules(1, 2, 4, kernel_size=size, strides=1, keep_grid=True, rngs=rngs),
                ConvCapsules(2, 4, 2, 4, kernel_size=size, rngs=rngs),
                GridCapsules(2, 4, 3, 4, num_spatial_dims=3, coordinates=True, rngs=rngs),
                Decoder(3, 4, (3, 2, 3, 1), hidden_features=(4,), rngs=rngs),
            ]
        )

    @nnx.grad
    def gradients(network, x):
        primary, conv, classes, decoder = network
        poses = classes(conv(primary(x)).poses).poses
        reconstruction = decoder(poses, jnp.ones((2, 3)))
        assert reconstruction.shape == x.shape
        return jnp.sum((reconstruction - x) ** 2)

    of_new_network = nnx.jit(lambda x: gradients(make_network(), x))
    for leaf in jax.tree.leaves(of_new_network(normal(2, 3, 2, 3, 1))):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize("rank", [1, 3])
def test_coordinates_have_a_component_for_each_axis(rank):
    grid = (2, 3, 4)[:rank]
    last = tuple(n - 1 for n in grid)
    one = np.zeros((*grid, 1), bool)
    one[last] = True

    @functools.partial(jax.jit, static_argnums=0)
    def shift(make, x):
        plain, moved = (make(coordinates=c, rngs=nnx.Rngs(0)) for c in (False, True))
        return moved(x, where=one).poses - plain(x, where=one).poses

    for kind, components in ((GridCapsules, [0, 1, 2]), (MatrixGridCapsules, [2, 5, 8])):
        sizes = (1, 9, 1, 9) if kind is GridCapsules else (1, 1, 9)
        make = functools.partial(kind, *sizes, routing="em", num_spatial_dims=rank)
        expected = np.zeros((1, 9))
        expected[0, components[:rank]] = [(n - 0.5) / n for n in grid]
        np.testing.assert_allclose(shift(make, normal(*grid, 1, 9)), expected, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "same_lower", 1, (1, 1), [(0, 2), 1]])
def test_paddings_are_those_of_a_convolution(padding):
    def both(x):
        options = {"kernel_size": (3, 2), "strides": 1, "padding": padding, "rngs": nnx.Rngs(0)}
        capsules = ConvCapsules(1, 2, 1, 2, **options)
        primary = PrimaryCapsules(2, 1, 2, keep_grid=True, **options)
        return capsules(x[:, :, None]).poses, primary(x)

    of_poses, of_images = jax.eval_shape(both, normal(5, 4, 2))
    assert of_poses.shape == of_images.shape


def conv(**options):
    return ConvCapsules(2, 4, 3, 5, rngs=nnx.Rngs(0), **{"kernel_size": (3,), **options})


def primary(**options):
    return PrimaryCapsules(3, 2, 4, rngs=nnx.Rngs(0), **{"kernel_size": (3,), **options})


@pytest.mark.parametrize("layer", [conv, primary])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kernel_size": ()}, r"kernel_size must be a positive integer or a seq.*, got \(\)"),
        ({"kernel_size": (3, 0)}, r"kernel_size must be .*, got \(3, 0\)"),
        ({"kernel_size": 2.5}, "kernel_size must be .*, got 2.5"),
        ({"strides": (1, 1)}, r"strides must .* axis of kernel_size \(3,\), got \(1, 1\)"),
        ({"strides": 0}, "strides must be a positive integer .* got 0"),
        ({"padding": ((0, 0), (1, 1))}, r"padding must .* axis of kernel_size \(3,\), got"),
        ({"padding": "FULL"}, "padding must be one of VALID, SAME, .*, got 'FULL'"),
        ({"padding": None}, "padding must be one of VALID, SAME, .*, got None"),
    ],
)
def test_a_bad_window_is_named(layer, options, match):
    with pytest.raises(ValueError, match=match):
        layer(**options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: conv()(normal(2, 4)), r"poses must have shape \[..., L, I, K\] = .*\(2, 4\)"),
        (
            lambda: conv(kernel_size=(1, 1, 1))(normal(5, 5, 2, 4)),
            r"poses must have shape \[..., Z, H, W, I, K\] = ",
        ),
        (
            lambda: primary()(normal(3)),
            r"inputs must have shape \[..., L, C\] = \[..., L, 3\], got",
        ),
        (lambda: primary()(normal(9, 2)), r"inputs must .* \[..., L, 3\], got shape \(9, 2\)"),
        (lambda: primary()(normal(2, 3)), r"inputs must be at least as large .* got \(2,\)"),
        (
            lambda: MatrixPrimaryCapsules(3, 2, 4, kernel_size=3, rngs=nnx.Rngs(0))(
                normal(2, 5, 3)
            ),
            r"inputs must be at least as large as the kernel \(3, 3\), got \(2, 5\)",
        ),
        (
            lambda: GridCapsules(2, 4, 3, 5, num_spatial_dims=0, rngs=nnx.Rngs(0)),
            "num_spatial_dims must be .*, got 0",
        ),
        (
            lambda: MatrixGridCapsules(2, 3, 4, num_spatial_dims=3, rngs=nnx.Rngs(0)),
            "coordinates of num_spatial_dims=3 do not fit poses of 4 out_features",
        ),
        (
            lambda: GridCapsules(2, 4, 3, 5, num_spatial_dims=3, rngs=nnx.Rngs(0))(
                normal(5, 5, 2, 4)
            ),
            r"poses must have shape \[..., Z, H, W, I, K\]",
        ),
    ],
)
def test_a_bad_rank_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_receptive_fields_of_volumes_gather_and_spread():
    fields = ReceptiveFields((4, 3, 5), (2, 3, 2), (2, 1, 3), ((1, 0), (1, 1), (0, 0)))
    x, ones = normal(4, 3, 5, 2), np.ones((*fields.shape, fields.size, 2), np.float32)
    gathered, total, highest = jax.jit(
        lambda x, ones: (fields.gather(x, fill=-7), fields.sum(ones), fields.max(ones))
    )(x, ones)
    gathered = np.asarray(gathered).reshape(*fields.shape, 2, 3, 2, 2)
    padded = np.pad(x, ((1, 0), (1, 1), (0, 0), (0, 0)), constant_values=-7)
    covered = np.zeros(padded.shape)
    for place in np.ndindex(*fields.shape):
        corner = np.multiply(place, fields.strides)
        window = tuple(slice(n, n + k) for n, k in zip(corner, fields.kernel, strict=True))
        np.testing.assert_array_equal(gathered[place], padded[window])
        covered[window] += 1
    np.testing.assert_array_equal(total, covered[1:, 1:-1])
    np.testing.assert_array_equal(np.isfinite(highest), covered[1:, 1:-1] > 0)
