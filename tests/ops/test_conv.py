import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from comparing import FLOATS, assert_close, assert_gradients
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax

from capsjax import conv_general_dilated
from capsjax.nn import ConvCapsules, PrimaryCapsules
from capsjax.ops import ReceptiveFields, _hopper, phases
from capsjax.ops.fourier import gains_by_fourier
from capsjax.ops.patches import conv_by_lookup

NHWC = ("NHWC", "HWIO", "NHWC")
OWN = ["patches", "lookup", "fourier", "phases"]


def arrays(batch, height, width, channels, kh, kw, features, dtype="float32"):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, height, width, channels)).astype(jnp.dtype(dtype))
    kernel = rng.normal(size=(kh, kw, channels, features)).astype(jnp.dtype(dtype))
    return jnp.asarray(images), jnp.asarray(kernel)


# Compiled as one program: its steps one by one would be a program each.
@functools.partial(
    jax.jit, static_argnames=("strides", "padding", "implementation", "preferred_element_type")
)
def conv(images, kernel, strides=(1, 1), padding="VALID", implementation=None, **options):
    return conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        dimension_numbers=NHWC,
        implementation=implementation,
        **options,
    )


# Every window in float32, and one with strides and padding in every dtype; the rest is slow.
WINDOWS = [((1, 1), ((0, 0), (0, 0))), ((2, 3), ((0, 0), (0, 0))), ((2, 1), ((1, 2), (0, 3)))]
WINDOWS_AND_DTYPES = [
    pytest.param(
        *window,
        dtype,
        marks=() if dtype == "float32" or window is WINDOWS[-1] else pytest.mark.slow,
    )
    for window in WINDOWS
    for dtype in FLOATS
]


@pytest.mark.parametrize("implementation", [*OWN, "xla", None])
@pytest.mark.parametrize(("strides", "pads", "dtype"), WINDOWS_AND_DTYPES)
def test_is_the_sum_over_the_window(implementation, dtype, strides, pads):
    images, kernel = arrays(2, 9, 8, 3, 3, 4, 5, dtype)
    expected = references.convolution(
        *(np.asarray(x, np.float64) for x in (images, kernel)), strides, pads
    )
    out = conv(images, kernel, strides, pads, implementation)
    assert out.dtype == dtype
    assert_close(out, expected, terms=3 * 4 * 3)


@settings(max_examples=6)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.sampled_from(["SAME", "VALID", "SAME_LOWER", ((2, 1), (0, 3))]),
)
def test_all_agree_in_value_and_gradients(size, kernel_size, strides, padding):
    images, kernel = arrays(2, *size, 3, *kernel_size, 4)

    def loss(implementation, images, kernel):
        out = conv(images, kernel, strides, padding, implementation)
        return jnp.sum(jnp.sin(out)), out

    @jax.jit
    def all_of_them(*x):
        return [
            jax.value_and_grad(functools.partial(loss, i), (0, 1), has_aux=True)(*x)
            for i in (*OWN, "xla")
        ]

    results = all_of_them(images, kernel)
    terms = kernel_size[0] * kernel_size[1] * 3 * size[0] * size[1]
    for result in results[:-1]:
        for a, b in zip(*map(jax.tree.leaves, (result, results[-1])), strict=True):
            # Sums that nearly cancel have the rounding errors of their terms.
            assert_close(a, b, terms=terms, scale=max(1.0, float(np.abs(b).max(initial=0))))


@pytest.mark.parametrize("implementation", OWN)
def test_paper_s_primary_capsules(implementation):
    images, kernel = arrays(2, 20, 20, 256, 9, 9, 256)
    a, b = (conv(images, kernel, (2, 2), "VALID", i) for i in (implementation, "xla"))
    assert_close(a, b, terms=81 * 256)


def lowered(platform, images, kernel, stride, dtype="float32", implementation=None, gradient=False):
    def function(images, kernel):
        return conv(images, kernel, (stride, stride), implementation=implementation)

    def gradients(images, kernel):
        return jax.grad(lambda *x: jnp.sum(function(*x)), (0, 1))(images, kernel)

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (images, kernel)]
    traced = jax.jit(gradients if gradient else function).trace(*shapes)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_lowered_text_shows_the_implementation(platform):
    def counts(implementation):
        text = lowered(platform, (1, 9, 9, 2), (3, 3, 2, 4), 2, implementation=implementation)
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert counts("patches") == counts("lookup") == (0, 1)
    assert counts("fourier") == (0, 6)
    assert counts("xla") == counts("phases") == (1, 0)
    assert counts(None) == ((0, 1) if platform == "cpu" else (1, 0))


def test_the_gradient_of_the_images_multiplies_by_no_zeros_on_tpus():
    images, kernel = arrays(1, 9, 9, 2, 3, 3, 4)

    def dilated(implementation, strides):
        gradient = jax.grad(lambda x: conv(x, kernel, strides, implementation=implementation).sum())
        text = export.export(jax.jit(gradient), platforms=["tpu"])(images).mlir_module()
        assert "stablehlo.convolution" in text
        return "lhs_dilate = [2, 2]" in text

    assert dilated("xla", (2, 2))
    assert not dilated("phases", (2, 2))
    assert not dilated(None, (2, 2))
    assert not dilated("xla", (1, 1))


def test_the_gradient_stays_dense_for_several_kernels():
    images, kernel = arrays(1, 9, 9, 2, 3, 3, 4)

    def gradient(kernel):
        return jax.grad(lambda x: conv(x, kernel, (2, 2), implementation="phases").sum())(images)

    text = jax.jit(jax.vmap(gradient)).lower(jnp.stack([kernel, kernel])).as_text()
    assert "stablehlo.convolution" in text
    assert "lhs_dilate = [2, 2]" not in text


@pytest.mark.parametrize(("batch", "convolutions"), [(128, 36), (8, 4)])
def test_phases_are_divided_where_many_zeros_would_be_multiplied(batch, convolutions):
    shapes = (batch, 20, 20, 256), (9, 9, 256, 256)
    text = lowered("tpu", *shapes, 2, "bfloat16", gradient=True)
    # One more is the gradient of the kernel.
    assert text.count("stablehlo.convolution") == convolutions + 1


# Kernels with one to five taps per phase, positions in no field, and a stride above the kernel.
@pytest.mark.parametrize(
    ("size", "kernel_size", "strides", "padding"),
    [
        ((12, 13), (9, 8), (2, 2), "VALID"),
        ((13, 11), (4, 9), (3, 2), ((1, 0), (2, 3))),
        ((9, 9), (9, 2), (2, 3), "VALID"),
    ],
)
def test_gradients_by_divided_phases(size, kernel_size, strides, padding, monkeypatch):
    monkeypatch.setattr(phases, "_WORTH_DIVIDING", 0)

    def gradients(implementation, images, kernel):
        def loss(*x):
            out = conv_general_dilated(
                *x, strides, padding, dimension_numbers=NHWC, implementation=implementation
            )
            return jnp.sum(jnp.sin(out))

        return jax.grad(loss, (0, 1))(images, kernel)

    with jax.enable_x64(True):
        x = arrays(2, *size, 2, *kernel_size, 3, "float64")
        results = jax.jit(lambda *x: [gradients(name, *x) for name in ("phases", "xla")])(*x)
        for a, b in zip(*results, strict=True):
            assert_close(a, b, terms=math.prod(kernel_size) * 3)


@pytest.mark.parametrize(
    ("platform", "dtype", "batch", "products"),
    [
        ("cpu", "float32", 2, 1),
        ("cpu", "float32", 64, 6),
        ("cpu", "bfloat16", 64, 6),
        ("cuda", "float32", 2, 0),
        ("cuda", "float32", 64, 6),
        ("cuda", "bfloat16", 64, 1),
        ("cuda", "bfloat16", 1024, 6),  # The patches would take more than 1 GiB.
        ("tpu", "float32", 64, 0),
        ("tpu", "bfloat16", 64, 0),
    ],
)
def test_by_products_where_they_are_less_work(platform, dtype, batch, products, monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: "needs another GPU")
    shapes = (batch, 20, 20, 256), (9, 9, 256, 256)
    text = lowered(platform, *shapes, 2, dtype)
    assert text.count("stablehlo.dot_general") == products
    assert text.count('"stablehlo.gather"(') == (products == 1 and platform == "cuda")


@pytest.mark.parametrize(
    ("images", "kernel", "dtype", "gathers"),
    [
        ((128, 28, 28, 1), (9, 9, 1, 256), "float32", True),
        ((128, 28, 28, 1), (9, 9, 1, 256), "bfloat16", True),
        ((128, 28, 28, 1), (5, 5, 1, 32), "float32", True),
        ((128, 32, 32, 2), (9, 9, 2, 256), "float32", False),
        ((128, 32, 32, 3), (3, 3, 3, 64), "bfloat16", False),
        ((128, 512, 512, 1), (9, 9, 1, 64), "float32", False),
    ],
)
def test_by_lookup_on_gpus_for_few_channels(images, kernel, dtype, gathers):
    text = lowered("cuda", images, kernel, 1, dtype)
    assert ("stablehlo.gather" in text, "stablehlo.convolution" in text) == (gathers, not gathers)


def test_gradients_by_lookup_read_and_add_nothing_in_memory(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: "needs another GPU")
    for shapes in (((64, 20, 20, 256), (9, 9, 256, 256), 2), ((4, 28, 28, 1), (9, 9, 1, 8), 1)):
        text = lowered("cuda", *shapes, dtype="bfloat16", gradient=True)
        assert text.count('"stablehlo.gather"(') == 2
        assert "stablehlo.scatter" not in text


# Like the paper's, but smaller: one channel, and a stride that does not divide the kernel. Rows of
# the product have room for the bias with one channel or four, but not with 32.
@pytest.mark.parametrize("dtype", ["float64", *FLOATS])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        ((14, 13, 1), 1, "VALID"),
        ((13, 12, 4), 2, ((1, 0), (0, 2))),
        ((10, 9, 32), 1, "VALID"),
    ],
)
def test_gradients_by_lookup(size, stride, padding, dtype):
    def all_of_them(implementation, images, kernel, bias, cotangent):
        def function(images, kernel, bias):
            return conv(images, kernel, (stride, stride), padding, implementation, bias=bias)

        out, back = jax.vjp(function, images, kernel, bias)
        return out, *back(cotangent)

    with jax.enable_x64(dtype == "float64"):
        images, kernel = arrays(2, *size, 9, 9, 3, dtype)
        bias = jnp.asarray([0.3, -20.0, 1.0], dtype)
        out = jax.eval_shape(lambda *x: conv(*x, (stride, stride), padding), images, kernel)
        cotangent = np.random.default_rng(1).normal(size=out.shape).astype(jnp.dtype(dtype))
        results = jax.jit(functools.partial(all_of_them, "lookup"))(images, kernel, bias, cotangent)
    with jax.enable_x64(True):
        wide = (np.asarray(x, np.float64) for x in (images, kernel, bias, cotangent))
        expected = jax.jit(functools.partial(all_of_them, "xla"))(*wide)
        for a, b in zip(results, expected, strict=True):
            assert a.dtype == dtype
            assert_close(a, b, terms=81 * size[-1], dtype=dtype)


def test_lookup_adds_the_bias_in_the_product_where_its_rows_have_room():
    def primitives(kernel_size):
        images, kernel = arrays(1, 8, 8, 2, *kernel_size, 3)
        fields = ReceptiveFields.of((8, 8), kernel_size, (1, 1), "VALID")
        traced = jax.make_jaxpr(lambda *x: conv_by_lookup(*x[:2], fields, None, None, x[2]))(
            images, kernel, jnp.ones(3)
        )
        return {equation.primitive.name for equation in traced.eqns}

    assert "add" not in primitives((3, 3))
    assert "add" in primitives((4, 4))


@pytest.mark.parametrize("implementation", [*OWN, "xla", None])
def test_adds_a_bias(implementation):
    images, kernel = arrays(2, 9, 8, 3, 3, 4, 5)
    bias = np.arange(5.0, dtype=np.float32) - 2

    def function(images, kernel, bias):
        return conv(images, kernel, (2, 1), "SAME", implementation, bias=bias)

    expected = conv(images, kernel, (2, 1), "SAME", "xla") + jnp.broadcast_to(bias, (2, 5, 8, 5))
    np.testing.assert_allclose(function(images, kernel, bias), expected, rtol=1e-4, atol=1e-4)
    with jax.enable_x64(True):
        assert_gradients(function, images, kernel, bias, forward=True)
    biases = np.stack([bias, 3 * bias])
    mapped = jax.vmap(function, (None, None, 0))(images, kernel, biases)
    for each, one in zip(mapped, biases, strict=True):
        np.testing.assert_allclose(each, function(images, kernel, one), rtol=1e-4, atol=1e-4)


def test_adds_a_bias_to_the_features_of_any_layout():
    images, kernel = arrays(2, 9, 8, 3, 3, 4, 5)
    bias = np.arange(5.0, dtype=np.float32)
    by_features = conv_general_dilated(
        jnp.transpose(images, (0, 3, 1, 2)),
        jnp.transpose(kernel, (3, 2, 0, 1)),
        (1, 1),
        "VALID",
        bias=bias,
    )
    np.testing.assert_allclose(
        jnp.transpose(by_features, (0, 2, 3, 1)),
        conv(images, kernel, bias=bias),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 5)])
@pytest.mark.parametrize("implementation", [None, "lookup", "xla"])
def test_a_bias_has_one_number_per_feature(shape, implementation):
    images, kernel = arrays(2, 9, 8, 3, 3, 4, 5)
    message = re.escape(f"bias must have shape [O] = [5], got shape {shape}")
    with pytest.raises(ValueError, match=message):
        conv(images, kernel, implementation=implementation, bias=jnp.ones(shape))
    with pytest.raises(TypeError, match="bias must be an array, got str"):
        conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=NHWC, bias="zeros")
    with pytest.raises(TypeError, match="bias must be a floating-point array, got dtype int32"):
        conv(images, kernel, implementation=implementation, bias=np.arange(5))
    with pytest.raises(TypeError, match="lhs must be floating point for a bias, got dtype int32"):
        conv(
            images.astype(int), kernel.astype(int), implementation=implementation, bias=jnp.ones(5)
        )


@pytest.mark.parametrize("implementation", [*OWN, "xla", None])
def test_takes_arrays_of_numpy(implementation):
    images, kernel = (np.asarray(x) for x in arrays(2, 9, 8, 3, 3, 4, 5))
    options = {"dimension_numbers": NHWC, "implementation": implementation}
    out = conv_general_dilated(images.astype(np.float64), kernel, (1, 1), "VALID", **options)
    np.testing.assert_allclose(out, conv(images, kernel), rtol=1e-4, atol=1e-4)


def test_a_gradient_of_a_bias_does_not_overflow_in_float16():
    images, kernel = jnp.ones((128, 14, 14, 1), jnp.float16), jnp.zeros((3, 3, 1, 2), jnp.float16)
    for implementation in ("lookup", "patches", "xla"):

        def loss(bias, implementation=implementation):
            out = conv(images, kernel, implementation=implementation, bias=bias)
            return 4 * jnp.sum(out.astype(jnp.float32))

        np.testing.assert_array_equal(jax.grad(loss)(jnp.zeros(2)), 4 * 128 * 12 * 12)


def test_sizes_of_images_may_be_symbolic():
    shape = export.symbolic_shape("batch, rows, columns, 3")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    for layer in (
        nnx.Conv(3, 4, (3, 3), conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0)),
        PrimaryCapsules(3, 2, 4, kernel_size=3, keep_grid=True, rngs=nnx.Rngs(0)),
    ):
        exported = export.export(jax.jit(layer))(images)
        x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
        np.testing.assert_allclose(exported.call(x), layer(x), rtol=1e-4, atol=1e-5)
    grid = jax.ShapeDtypeStruct((*shape, 4), jnp.float32)
    capsules = ConvCapsules(3, 4, 2, 5, kernel_size=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="poses must have a grid of constant size, got shape"):
        export.export(jax.jit(capsules))(grid)


def test_in_one_program_for_several_platforms():
    images, kernel = arrays(1, 9, 9, 2, 3, 3, 4)
    for bias in (None, jnp.arange(4.0)):
        function = jax.jit(lambda *x, bias=bias: conv(*x, (2, 2), bias=bias))
        exported = export.export(function, platforms=["cpu", "cuda", "tpu"])(images, kernel)
        np.testing.assert_allclose(
            exported.call(images, kernel), function(images, kernel), rtol=1e-6
        )


@pytest.mark.parametrize("implementation", [*OWN, "xla", None])
def test_under_transformations(implementation):
    images, kernel = arrays(2, 8, 8, 2, 3, 3, 3)

    def function(images, kernel):
        return conv(images, kernel, (2, 2), "SAME", implementation)

    def gradients(images, kernel):
        return jax.grad(lambda *x: jnp.sum(function(*x) ** 2), (0, 1))(images, kernel)

    with jax.enable_x64(True):
        # The second derivatives go through the first.
        assert_gradients(lambda *x: (function(*x), gradients(*x)), images, kernel, forward=True)

    @jax.jit
    def transformed(images, kernels):
        mapped = jax.vmap(function, (None, 0))(images, kernels)
        recomputed = jax.grad(lambda x: jnp.sum(jax.remat(function)(x, kernels[0]) ** 2))(images)
        return mapped, recomputed, gradients(images, kernels[0])[0]

    mapped, recomputed, plain = map(np.asarray, transformed(images, np.stack([kernel, 2 * kernel])))
    np.testing.assert_allclose(mapped[1], 2 * mapped[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(recomputed, plain, rtol=1e-5)


@pytest.mark.parametrize("strides", [1, 2, (2, 1)])
def test_goes_into_flax_convolutions(strides):
    images, _ = arrays(2, 9, 9, 3, 1, 1, 1)
    own, plain = (
        nnx.Conv(3, 4, (3, 3), strides, rngs=nnx.Rngs(0), **kwargs)
        for kwargs in ({"conv_general_dilated": conv_general_dilated}, {})
    )
    results = nnx.jit(lambda *layers: [layer(images) for layer in layers])(own, plain)
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)
    linen_own, linen_plain = (
        linen.Conv(4, (3, 3), strides, **kwargs)
        for kwargs in ({"conv_general_dilated": conv_general_dilated}, {})
    )

    @jax.jit
    def both(images):
        variables = linen_plain.init(jax.random.key(0), images)
        return [layer.apply(variables, images) for layer in (linen_own, linen_plain)]

    np.testing.assert_allclose(*both(images), rtol=1e-5, atol=1e-6)


CANNOT = [
    ({"dimension_numbers": None}, "needs dimension_numbers with channels last, got None"),
    ({"rhs_dilation": (2, 2)}, r"supports no dilation, got .*rhs_dilation=\(2, 2\)"),
    ({"lhs_dilation": (2, 2)}, r"supports no dilation, got lhs_dilation=\(2, 2\)"),
    ({"feature_group_count": 3}, "supports no groups, got feature_group_count=3"),
]


@pytest.mark.parametrize(("options", "reason"), CANNOT, ids=[r for _, r in CANNOT])
def test_arguments_that_need_xla(options, reason):
    images, kernel = arrays(3, 7, 7, 3, 3, 3, 3)
    options = {"dimension_numbers": NHWC, **options}
    if options["dimension_numbers"] is None:
        images, kernel = jnp.moveaxis(images, 3, 1), jnp.moveaxis(kernel, (3, 2), (0, 1))
    if "feature_group_count" in options:
        kernel = kernel[:, :, :1]
    arguments = (images, kernel, (1, 1), ((0, 0), (0, 0)))
    expected = lax.conv_general_dilated(*arguments, **options)
    np.testing.assert_array_equal(conv_general_dilated(*arguments, **options), expected)
    for name in OWN:
        with pytest.raises(NotImplementedError, match=f"implementation='{name}' {reason}"):
            conv_general_dilated(*arguments, **options, implementation=name)


RANKS = {
    1: ((7,), (3,), (2,), ((1, 2),)),
    3: ((5, 4, 6), (2, 3, 2), (2, 1, 2), ((1, 0), (0, 1), (0, 0))),
}
NUMBERS = {1: ("NWC", "WIO", "NWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@pytest.mark.parametrize("rank", RANKS)
def test_series_and_volumes(rank):
    grid, kernel_size, strides, pads = RANKS[rank]
    rng = np.random.default_rng(0)
    series, kernel = rng.normal(size=(2, *grid, 3)), rng.normal(size=(*kernel_size, 3, 4))
    expected = references.convolution(series, kernel, strides, pads)

    @jax.jit
    def all_of_them(*arguments):
        def loss(implementation, *arguments):
            out = conv_general_dilated(
                *arguments,
                strides,
                pads,
                dimension_numbers=NUMBERS[rank],
                implementation=implementation,
            )
            return jnp.sum(jnp.sin(out)), out

        return [
            jax.grad(functools.partial(loss, name), (0, 1), has_aux=True)(*arguments)
            for name in (*OWN, "xla", None)
        ]

    results = all_of_them(jnp.float32(series), jnp.float32(kernel))
    for gradients, out in results:
        assert_close(out, expected, terms=kernel[..., 0].size)
        for a, b in zip(gradients, results[OWN.index("phases") + 1][0], strict=True):
            assert_close(a, b, terms=series.size)
    with pytest.raises(NotImplementedError, match=f"'patches' needs {rank} positive strides"):
        conv_general_dilated(
            series,
            kernel,
            (1, 1),
            pads,
            dimension_numbers=NUMBERS[rank],
            implementation="patches",
        )


def test_no_transforms_as_products_of_large_images():
    def gains(size):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, *size, 3), (9, 9, 3, 64))]
        fields = ReceptiveFields.of(size, (9, 9), (2, 2), "VALID")
        return gains_by_fourier(*shapes, fields)

    assert gains((64, 64))
    assert not gains((96, 96))


def test_channels_that_differ_are_named():
    with pytest.raises(NotImplementedError, match="images and kernel of the same channels"):
        conv(jnp.ones((1, 5, 5, 3)), jnp.ones((3, 3, 2, 4)), implementation="patches")


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation must be None or one of .*got 'fft'"):
        conv(*arrays(1, 5, 5, 1, 3, 3, 1), implementation="fft")


def test_accumulates_in_the_preferred_dtype():
    images, kernel = arrays(1, 8, 8, 4, 3, 3, 2, "bfloat16")
    for implementation in (*OWN, "xla"):
        out = conv(
            images, kernel, implementation=implementation, preferred_element_type=jnp.float32
        )
        assert out.dtype == jnp.float32


@pytest.mark.parametrize("implementation", [*OWN, None])
def test_an_empty_batch_and_no_output_features(implementation):
    images, kernel = arrays(2, 8, 8, 3, 3, 3, 4)
    assert conv(images[:0], kernel, implementation=implementation).shape == (0, 6, 6, 4)
    assert conv(images, kernel[..., :0], implementation=implementation).shape == (2, 6, 6, 0)


ODD = {
    "kernel larger than image": {"rhs": jnp.ones((12, 12, 3, 4))},
    "one pair of padding": {"padding": ((1, 1),)},
    "one stride": {"window_strides": (1,)},
    "dilation without a sequence": {"rhs_dilation": 2},
    "narrower result": {"preferred_element_type": jnp.bfloat16},
}


@pytest.mark.parametrize("name", ODD)
def test_answers_odd_arguments_as_lax_does(name):
    images, kernel = arrays(2, 8, 8, 3, 3, 3, 4)
    arguments = {
        "lhs": images,
        "rhs": kernel,
        "window_strides": (1, 1),
        "padding": "VALID",
        "dimension_numbers": NHWC,
        **ODD[name],
    }

    def outcome(function):
        try:
            return function(**arguments).shape
        except (TypeError, ValueError) as error:
            return str(error).splitlines()[0]

    assert outcome(conv_general_dilated) == outcome(lax.conv_general_dilated)
    with pytest.raises(NotImplementedError, match="implementation='patches' "):
        conv_general_dilated(**arguments, implementation="patches")
