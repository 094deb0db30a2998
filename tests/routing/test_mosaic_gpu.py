"""The kernel for Hopper GPUs: interpreted on CPUs, and compiled where the compiler is installed."""

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from dense import PAPER, arguments, assert_same, bias_of, loss, with_gradients
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from capsjax import dense_capsules
from capsjax.ops import _hopper
from capsjax.routing.fused import sweep_primitive
from capsjax.routing.fused.api import _prefer
from capsjax.routing.fused.hopper_sizes import TILE, Sizes
from capsjax.routing.fused.mosaic_gpu import MosaicGpu

NAME = "mosaic_gpu"
KERNEL = "hopper_kernel"
SIZES = (35, 3, 4, 5)
needs_kernel = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11 or later"
)


@pytest.fixture
def anywhere(monkeypatch):
    """Lets programs for CPUs have the implementation; sweeps then store the votes."""
    real = MosaicGpu.of
    monkeypatch.setattr(
        MosaicGpu, "of", lambda *x, **kwargs: real(*x, **{**kwargs, "required": False})
    )
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)


def sweeps(number, sizes, batch):
    """Arguments of a sweep: poses, weights, query, and gradient of the sums."""
    children, in_features, parents, features = sizes
    rng = np.random.default_rng(0)
    shapes = [
        (number, children, batch, in_features),
        (number, children, parents, features, in_features),
        *[(number, batch, parents, features)] * 2,
    ]
    return [jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for shape in shapes]


@needs_kernel
@pytest.mark.parametrize(
    ("number", "sizes", "batch", "leaky", "count"),
    [
        (2, (7, 3, 2, 5), TILE + 2, True, 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (1, (7, 3, 2, 5), TILE + 2, False, 3),
                (1, (13, 8, 3, 8), 3, False, 4),
                (1, (1, 1, 1, 1), 1, True, 4),
                (1, (6, 16, 10, 16), 64, False, 4),
            ]
        ),
    ],
)
def test_the_kernel_computes_what_the_plain_sweep_does(number, sizes, batch, leaky, count):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from capsjax.routing.fused.hopper_kernel import sweep

    operands = sweeps(number, sizes, batch)[:count]
    got = sweep(*operands, leaky=leaky, interpret=plgpu.InterpretGPUParams())
    expected = sweep_primitive.plain(*operands, leaky=leaky)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, terms=sizes[0] * sizes[1])


# Leading axes, sizes, iterations, dtype, and whether leaky, with stopped gradients, biased, masked.
CASES = [
    ((), (1, 1, 1, 1), 1, "float32", False, False, False, False),
    ((2,), SIZES, 3, "float32", False, False, True, True),
    ((2,), SIZES, 3, "float32", True, True, True, False),
    ((3, 1), (33, 9, 1, 2), 2, "bfloat16", True, False, False, True),
    ((2,), (16, 2, 12, 3), 4, "float16", False, False, True, False),
]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_reference(case):
    leading, sizes, num_iterations, dtype, leaky, stop_gradient, biased, masked = case
    poses, weights = arguments(*leading, shape=sizes, dtype=dtype)
    bias = bias_of(*sizes[2:]) if biased else None
    options = {"num_iterations": num_iterations, "leaky": leaky, "stop_gradient": stop_gradient}
    if masked:
        options["where"] = jnp.asarray(np.random.default_rng(4).random((*leading, sizes[0])) < 0.7)
    got = with_gradients(NAME, poses, weights, bias, **options)
    assert [x.dtype for x in got[1][:2]] == [jnp.dtype(dtype)] * 2
    wide = (x.astype(jnp.float32) for x in (poses, weights))
    expected = with_gradients("reference", *wide, bias, **options)
    assert_same(got, expected, dtype, terms=sizes[0] * sizes[1])


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_under_vmap(mapped):
    poses, weights = arguments(3, 2, shape=(6, 3, 4, 5))
    weights = jnp.stack([weights, 2 * weights, -weights])
    given = [x if axis == 0 else x[0] for x, axis in zip((poses, weights), mapped, strict=True)]
    gradients = jax.value_and_grad(functools.partial(loss, implementation=NAME), (0, 1))
    got = jax.jit(jax.vmap(gradients, mapped))(*given)
    for n in range(3):
        each = [x[n] if axis == 0 else x for x, axis in zip(given, mapped, strict=True)]
        (value, _), expected = with_gradients("reference", *each)
        assert_same(jax.tree.map(lambda x, n=n: x[n], got), (value, expected), "float32", terms=18)


@pytest.mark.usefixtures("anywhere")
def test_under_shard_map_and_remat():
    poses, weights = arguments(8, shape=(6, 3, 4, 5))
    batch, whole = PartitionSpec("batch"), PartitionSpec()

    def run(name, poses, weights):
        return dense_capsules(poses, weights, num_iterations=2, implementation=name).poses

    def gradients(function):
        total = jax.grad(lambda *x: jnp.cos(function(*x)).sum(), (0, 1))
        return jax.jit(total)(poses, weights)

    mesh = Mesh(np.array(jax.devices()), ("batch",))
    sharded = jax.shard_map(
        jax.remat(functools.partial(run, NAME)),
        mesh=mesh,
        in_specs=(batch, whole),
        out_specs=batch,
    )
    expected = gradients(functools.partial(run, "reference"))
    for a, b in zip(gradients(sharded), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("anywhere")
def test_second_derivatives():
    poses, weights = arguments(shape=(4, 2, 3, 2))

    def along(name):
        function = functools.partial(loss, num_iterations=2, implementation=name)
        return jax.jit(lambda *x: jax.jvp(jax.grad(function, (0, 1)), x, x)[1])(poses, weights)

    for a, b in zip(along(NAME), along("reference"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def program(
    platform, implementation=None, dtype="float32", batch=PAPER[0], layer=PAPER[1], **options
):
    shapes = [jax.ShapeDtypeStruct(x, dtype) for x in ((batch, *layer[:2]), tuple(layer))]
    function = jax.jit(
        lambda *x: dense_capsules(*x, implementation=implementation, **options).poses
    )
    return function.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@needs_kernel
def test_default_of_programs_for_nvidia_gpus():
    text = program("cuda")
    # Two iterations share one kernel.
    assert text.count("@mosaic_gpu") == 1
    # The benchmark's estimate reads the operations, those of all votes.
    assert f'capsjax_flops = "{2 * 128 * math.prod(PAPER[1]):.6g}"' in text
    assert "@mosaic_gpu" not in program("cuda", precision="highest")
    assert "@mosaic_gpu" not in program("cuda", batch=16)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_programs_for_other_platforms_do_not_import_the_kernel(platform, monkeypatch):
    monkeypatch.delitem(sys.modules, f"capsjax.routing.fused.{KERNEL}", raising=False)
    program(platform)
    assert f"capsjax.routing.fused.{KERNEL}" not in sys.modules


def test_exported_programs_run_on_any_gpu(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((128, *PAPER[1][:2]), PAPER[1])]
    exported = export.export(jax.jit(lambda *x: dense_capsules(*x).poses), platforms=["cuda"])
    assert "mosaic_gpu" not in exported(*shapes).mlir_module()


def test_a_name_is_an_error_where_the_kernel_does_not_run(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    poses, weights = arguments(2)
    named = jax.jit(functools.partial(dense_capsules, implementation=NAME))
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' needs an NVIDIA GPU, .* cpu"):
        named(poses, weights)
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' is for Hopper GPUs only"):
        export.export(named, platforms=["cuda"])(poses, weights)


def test_xla_partitions_the_votes_instead_of_the_kernel(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    shapes = [
        jax.ShapeDtypeStruct(x, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for x, axes in (((128, *PAPER[1][:2]), ("batch",)), (PAPER[1], ()))
    ]
    for name in (None, NAME):
        traced = jax.jit(lambda *x, name=name: dense_capsules(*x, implementation=name).poses).trace(
            *shapes
        )
        if name is None:
            assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cuda",)).as_text()
        else:
            with pytest.raises(NotImplementedError, match="under shard_map or pmap only"):
                traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("sizes", "options", "match"),
    [
        (SIZES, {"num_iterations": 9}, "at most 8 iterations, got num_iterations 9"),
        (
            SIZES,
            {"precision": "highest"},
            "rounds float32 factors to TF32, got precision 'highest'",
        ),
        ((6, 3, 12, 16), {}, r"J · \(D \+ 4\) of at most 224, .* got J = 12 and D = 16"),
        ((6, 64, 10, 16), {}, "poses of fewer dimensions, .* got K = 64"),
    ],
)
def test_what_is_not_supported(sizes, options, match, monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    with pytest.raises(NotImplementedError, match=f"'mosaic_gpu' .*{match}"):
        jax.eval_shape(
            lambda *x: dense_capsules(*x, implementation=NAME, **options),
            *arguments(2, shape=sizes),
        )


def test_16_bit_factors_are_exact_whatever_the_precision(monkeypatch):
    monkeypatch.setattr(_hopper, "why_not_here", lambda: None)
    named = functools.partial(dense_capsules, implementation=NAME, precision="highest")
    assert jax.eval_shape(named, *arguments(2, dtype="float16")).poses.dtype == jnp.float16


def test_programs_fill_the_multiprocessors_once():
    poses, weights = (1, 1152, 128, 8), (1, 1152, 10, 16, 8)
    for queries in (1, 2):
        sizes = Sizes.of(poses, weights, queries)
        assert (sizes.group, sizes.groups, sizes.children) == (18, 64, 1152)
    assert Sizes.of((1, 7, 3, 3), (1, 7, 2, 5, 3), 2) == Sizes(64, 8, 8, 6, 2)


@needs_kernel
@pytest.mark.slow
def test_compiles_for_an_absent_h200(absent_h200):
    shapes = [
        jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=absent_h200)
        for x in ((128, *PAPER[1][:2]), PAPER[1])
    ]
    gradients = jax.grad(loss, (0, 1))
    text = jax.jit(gradients).lower(*shapes).compile().as_text()
    assert "mosaic_gpu" in text


@needs_kernel
@pytest.mark.slow
def test_no_kernel_transposes_the_gradient_of_the_weights(absent_h200):
    """Within a loop, XLA keeps the weights, and so the moments, in the layout of the sweeps."""

    def train(poses, weights, moments):
        def step(_, carry):
            weights, moments = carry
            gradient = jax.grad(loss, 1)(poses, weights.astype(poses.dtype)).astype(weights.dtype)
            moments = moments + gradient * gradient
            return weights - gradient / jnp.sqrt(moments), moments

        return jax.lax.fori_loop(0, 3, step, (weights, moments))

    dtypes = {jnp.bfloat16: (128, *PAPER[1][:2]), jnp.float32: PAPER[1]}
    poses, weights = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=absent_h200) for dtype, shape in dtypes.items()
    )
    text = jax.jit(train).lower(poses, weights, weights).compile().as_text()
    body = text.split("ENTRY")[0]  # which converts the layouts of arguments and results
    assert "mosaic_gpu" in body
    assert not re.findall(r"transpose\S* = f32\[1152,10,16,8\]\S* fusion", body)


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        (16, ("reference",)),
        (128, ("mosaic_gpu", "reference")),
        (250, ("mosaic_gpu", "lanes", "reference")),
        (2000, ("lanes", "reference")),
    ],
)
def test_what_a_gpu_tries_in_which_order(batch, names):
    poses, weights = (jax.ShapeDtypeStruct(x, "float32") for x in ((batch, 1152, 8), PAPER[1]))
    assert _prefer("cuda", poses, weights) == names
