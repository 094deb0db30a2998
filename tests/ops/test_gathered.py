"""The kernel that gathers blocks: its plan, its derivatives, and what it computes."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from capsjax import conv_general_dilated
from capsjax.ops import _hopper, gathered
from capsjax.ops.fields import ReceptiveFields
from capsjax.ops.phases import conv_by_xla

# Images, kernel and features of one convolution are each a sum of products of the other two.
needs_kernel = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11 or later"
)
RESULTS = ("features", "images", "kernel")
PAPER = ReceptiveFields.of((20, 20), (9, 9), (2, 2), "VALID")
PADDED = ReceptiveFields.of((5, 4), (3, 2), (2, 1), ((1, 1), (0, 0)))
NOT_ALL_READ = ReceptiveFields.of((6,), (1,), (2,), "VALID")


def arrays(fields, batch, channels, features, dtype="float32"):
    """Images, kernel and features, whose sums of products are of about one."""
    rng = np.random.default_rng(0)
    shapes = (
        (batch, *fields.grid, channels),
        (*fields.kernel, channels, features),
        (batch, *fields.shape, features),
    )
    scales = (1, 1 / np.sqrt(fields.size * channels), 1)
    return tuple(
        jnp.asarray((s * rng.normal(size=shape)).astype(jnp.dtype(dtype)))
        for s, shape in zip(scales, shapes, strict=True)
    )


def by_lax(fields):
    return lambda images, kernel: conv_by_xla(images, kernel, fields, "highest", None)


def expected(fields, images, kernel, features):
    """Features, and the gradients of images and kernel for these features."""
    out, back = jax.vjp(by_lax(fields), images, kernel)
    return dict(zip(RESULTS, (out, *back(features)), strict=True))


def factors(result, images, kernel, features):
    """As the primitive takes them, with one axis of positions."""
    x = {"features": images, "images": features, "kernel": images}[result]
    y = {"features": kernel, "images": kernel, "kernel": features}[result]
    y = y.reshape(-1, *y.shape[-2:]) if y is kernel else y.reshape(len(y), -1, y.shape[-1])
    return x.reshape(len(x), -1, x.shape[-1]), y


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("fields", [PAPER, PADDED, NOT_ALL_READ])
def test_each_product_is_in_one_task_of_each_tile(fields, result):
    """And the positions and taps of a pair are those of a receptive field."""
    positions, taps, grid = (np.prod(x) for x in (fields.shape, fields.kernel, fields.grid))
    shapes = {
        "features": ((256, grid, 128), (taps, 128, 512)),
        "images": ((256, positions, 512), (taps, 128, 512)),
        "kernel": ((256, grid, 128), (256, positions, 512)),
    }
    plan = gathered.make_plan(fields, result, *shapes[result], "bfloat16")
    numbers = {"features": positions, "images": grid, "kernel": taps}[result]
    rows, width = (1, 512) if result == "kernel" else (2, 128 if result == "images" else 512)
    found = np.zeros((rows, width // plan.columns, len(plan.pairs)), int)
    seen = np.full(len(plan.pairs), -1)
    for _, row, column, number, first, count in plan.tasks:
        found[row, column, first : first + count] += 1
        seen[first : first + count] = number
    assert np.all(found == 1)
    assert set(plan.tasks[:, 3]) == set(range(numbers))
    names = {"features": "pxt", "images": "xpt", "kernel": "txp"}[result]
    triple = dict(zip(names, (seen, *plan.pairs.T), strict=True))
    position, tap, place = (
        np.stack(np.unravel_index(triple[n], shape))
        for n, shape in (("p", fields.shape), ("t", fields.kernel), ("x", fields.grid))
    )
    low = np.array(fields.pads)[:, :1]
    np.testing.assert_array_equal(place, np.array(fields.strides)[:, None] * position + tap - low)


def test_the_paper_s_tiles_fill_the_multiprocessors():
    """As measured on an H200: three parts of each position's taps, one of the others."""
    shapes = {
        "features": ((128, 400, 256), (81, 256, 256)),
        "images": ((128, 36, 256), (81, 256, 256)),
        "kernel": ((128, 400, 256), (128, 36, 256)),
    }
    plans = {r: gathered.make_plan(PAPER, r, *shapes[r], "bfloat16") for r in RESULTS}
    assert {r: plan.parts for r, plan in plans.items()} == {"features": 3, "images": 1, "kernel": 1}
    assert [len(plans[r].tasks) for r in RESULTS] == [108, 400, 324]
    longest_first = plans["images"].tasks[:, -1]
    assert np.all(np.diff(longest_first) <= 0)


@needs_kernel
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("result", RESULTS)
def test_the_simulated_kernel_computes_the_convolution(result, dtype):
    """Of a batch that is filled up to whole blocks, in several parts."""
    fields = ReceptiveFields.of((3,), (2,), (1,), ((0, 1),))
    given = arrays(fields, 100, 128, 64, dtype)
    actual = gathered._by_kernel(
        *factors(result, *given), fields=fields, result=result, interpret=True
    )
    wide = (x.astype(jnp.float32) for x in given)
    want = expected(fields, *wide)[result]
    assert_close(actual.reshape(want.shape), want, dtype=dtype, terms=256)


@pytest.fixture
def on_cpus(monkeypatch):
    """Lets the primitive's derivatives run here, by XLA's convolution."""
    monkeypatch.setattr(_hopper, "_why_not", lambda context: "does not run on CPUs")


@pytest.mark.parametrize("fields", [PADDED, NOT_ALL_READ])
def test_derivatives_of_all_orders_and_batches(fields, on_cpus):
    images, kernel, _ = arrays(fields, 3, 2, 4)

    @jax.jit
    def convolve(images, kernel):
        return gathered.conv_by_gathering(images, kernel, fields, conv_by_xla)

    plain = jax.jit(by_lax(fields))
    np.testing.assert_allclose(
        convolve(images, kernel), plain(images, kernel), rtol=1e-5, atol=1e-5
    )
    check_grads(convolve, (images, kernel), order=2, modes=("fwd", "rev"))
    many_images, many_kernels = jnp.stack([images, -images]), jnp.stack([kernel, 2 * kernel])
    for axes, arguments in (
        ((0, None), (many_images, kernel)),
        ((None, 0), (images, many_kernels)),
        ((0, 0), (many_images, many_kernels)),
    ):
        gradients = [
            jax.grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k))), (0, 1)) for f in (convolve, plain)
        ]
        ours, xlas = (jax.jit(jax.vmap(gradient, axes))(*arguments) for gradient in gradients)
        for a, b in zip(ours, xlas, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


CONVOLVE = functools.partial(
    conv_general_dilated,
    window_strides=(2, 2),
    padding="VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)
SHAPES = ((128, 20, 20, 256), (9, 9, 256, 256))


def lowered(function, *shapes, dtype="bfloat16", sharding=None, platform="cuda"):
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_the_default_for_large_kernels_on_hopper_gpus(dtype):
    text = lowered(CONVOLVE, *SHAPES, dtype=dtype)
    assert "mosaic_gpu" in text
    assert "convolution" not in text
    # The benchmark's estimate reads the operations: 81 taps of 36 fields each.
    assert f'capsjax_flops = "{2 * 128 * 36 * 81 * 256 * 256:.6g}"' in text
    assert "mosaic_gpu" not in lowered(CONVOLVE, (128, 20, 20, 256), (3, 3, 256, 256), dtype=dtype)


def test_xla_takes_over_where_it_divides_the_program_among_devices(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    text = lowered(CONVOLVE, *SHAPES, sharding=NamedSharding(mesh, PartitionSpec()))
    assert "mosaic_gpu" not in text
    named = functools.partial(CONVOLVE, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="under shard_map or pmap only"):
        lowered(named, *SHAPES, sharding=NamedSharding(mesh, PartitionSpec()))


def test_exported_programs_run_on_any_gpu(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SHAPES]
    exported = export.export(jax.jit(CONVOLVE), platforms=["cuda"])(*shapes)
    assert "mosaic_gpu" not in exported.mlir_module()


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiles_for_an_absent_h200(dtype, absent_h200):
    """With all gradients, of three kernels."""

    def gradients(images, kernel):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(CONVOLVE(*x))), (0, 1))(images, kernel)

    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=absent_h200) for shape in SHAPES]
    text = jax.jit(gradients).lower(*shapes).compile().as_text()
    assert all(f"capsjax_conv_{result}" in text for result in RESULTS)


def test_the_kernel_is_not_imported_for_other_platforms():
    program = (
        "import sys, jax, jax.numpy as jnp\n"
        "from capsjax import conv_general_dilated\n"
        "jax.eval_shape(lambda x, k: conv_general_dilated(x, k, (2, 2), 'VALID', dimension_numbers="
        "('NHWC', 'HWIO', 'NHWC')), jnp.zeros((128, 20, 20, 256)), jnp.zeros((9, 9, 256, 256)))\n"
        "assert 'capsjax.ops._gathered_kernel' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_says_what_it_does_not_support(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    for shapes, options, reason in (
        (((2, 20, 20, 100), (9, 9, 100, 64)), {}, "multiples of 128"),
        (((2, 20, 20, 128), (9, 9, 128, 32)), {}, "multiples of 64"),
        (((2, 20, 20, 128), (9, 9, 128, 64)), {"precision": "highest"}, "rounds float32"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(
                functools.partial(CONVOLVE, implementation="mosaic_gpu", **options),
                *map(jnp.zeros, shapes),
            )


def test_a_name_is_an_error_on_a_cpu(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' needs an NVIDIA GPU, .* cpu"):
        lowered(functools.partial(CONVOLVE, implementation="mosaic_gpu"), *SHAPES, platform="cpu")
