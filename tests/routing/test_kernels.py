"""Kernels: what they say, computed by XLA; and that what compiles for their chips takes them."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, PartitionSpec

from capsjax import dense_capsules
from capsjax.nn import DenseCapsules
from capsjax.routing.fused.pallas_gpu import GpuKernels
from capsjax.routing.fused.pallas_tpu import TpuKernels

SIZES = (20, 4, 3, 5)
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
CALLS = {"pallas_tpu": "custom_call @tpu_custom_call", "pallas_gpu": "custom_call @mosaic_gpu"}
each_kernel = pytest.mark.parametrize("name", PLATFORMS)


@pytest.fixture
def interpreted(monkeypatch):
    """Makes kernels run on the CPU, in blocks so small that there are several."""
    for kernels, sizes in ((TpuKernels, {"block": 16}), (GpuKernels, {"block": 3, "blocks": 2})):

        def of(*arguments, real=kernels.of, sizes=sizes, **options):
            return dataclasses.replace(real(*arguments, **options), **sizes, interpret=True)

        monkeypatch.setattr(kernels, "of", of)


def arguments(batch, sizes=SIZES, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    poses = jax.random.normal(keys[0], (batch, *sizes[:2]))
    weights = jax.random.normal(keys[1], sizes) / np.sqrt(sizes[1])
    return poses.astype(dtype), weights.astype(dtype)


def loss(name, poses, weights, bias=None, **options):
    routed = dense_capsules(poses, weights, bias=bias, implementation=name, **options)
    v = routed.poses.astype(jnp.promote_types(routed.poses.dtype, jnp.float32))
    return jnp.vdot(v, jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape))


@each_kernel
@pytest.mark.usefixtures("interpreted")
@settings(max_examples=6)
@given(
    batch=st.sampled_from([1, 3, 130]),
    sizes=st.tuples(
        st.sampled_from([1, 16, 37]), st.integers(1, 9), st.integers(1, 5), st.integers(1, 6)
    ),
    num_iterations=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    leaky=st.booleans(),
    stop_gradient=st.booleans(),
    masked=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_reference(
    name, batch, sizes, num_iterations, dtype, leaky, stop_gradient, masked
):
    poses, weights = arguments(batch, sizes, dtype)
    bias = jnp.cos(jnp.arange(float(np.prod(sizes[2:])))).reshape(sizes[2:])
    options = {"num_iterations": num_iterations, "leaky": leaky, "stop_gradient": stop_gradient}
    if masked:
        options["where"] = jnp.arange(sizes[0]) % 3 > 0
    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, which, **options), (0, 1)))(
            *(x.astype(kind) for x in (poses, weights)), bias
        )
        for which, kind in ((name, dtype), ("reference", "float32"))
    ]
    got, expected = map(jax.tree.leaves, results)
    scale = max(1.0, *(float(jnp.abs(x).max()) for x in expected))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, dtype=dtype, terms=sizes[0] * sizes[1], scale=scale)


@each_kernel
@pytest.mark.usefixtures("interpreted")
def test_under_vmap_and_shard_map(name):
    poses, weights = arguments(8)
    expected = dense_capsules(poses, weights, implementation="reference").poses

    def route(poses):
        return dense_capsules(poses, weights, implementation=name).poses

    np.testing.assert_allclose(jax.vmap(route)(poses), expected, rtol=1e-5, atol=1e-5)
    mesh, batch = Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch")
    # Interpreted kernels do not say on which axes of a mesh their numbers differ.
    mapped = jax.shard_map(route, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)
    np.testing.assert_allclose(jax.jit(mapped)(poses), expected, rtol=1e-5, atol=1e-5)


def lowered(function, platform, batch=8, sizes=SIZES, dtype=jnp.float32):
    """StableHLO of a function of poses and weights."""
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((batch, *sizes[:2]), sizes)]
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def gradient(name):
    return jax.grad(functools.partial(loss, name), (0, 1))


@each_kernel
def test_what_is_named_is_what_runs(name):
    forward, both = (
        lowered(function, PLATFORMS[name]).count(CALLS[name])
        for function in (functools.partial(loss, name), gradient(name))
    )
    assert 0 < forward < both
    for other in ("blocked", "reference", None):
        text = lowered(gradient(other), PLATFORMS[name])
        assert not any(call in text for call in CALLS.values())


@each_kernel
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(1152, 8, 10, 16), (1, 1, 1, 1), (36_864, 8, 10, 16)], ids=str)
def test_sizes_are_lowered(name, sizes, dtype):
    assert CALLS[name] in lowered(gradient(name), PLATFORMS[name], 130, sizes, dtype)


@each_kernel
def test_a_mapped_kernel_is_lowered(name):
    mapped = jax.vmap(gradient(name), (0, None))
    assert CALLS[name] in lowered(mapped, PLATFORMS[name])


@each_kernel
def test_under_a_checked_shard_map(name):
    mesh, batch = Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch")

    def route(poses, weights):
        return dense_capsules(poses, weights, implementation=name).poses

    mapped = jax.shard_map(route, mesh=mesh, in_specs=(batch, None), out_specs=batch)
    forward, both = (
        lowered(function, PLATFORMS[name]).count(CALLS[name])
        for function in (mapped, jax.grad(lambda *x: mapped(*x).sum(), (0, 1)))
    )
    assert 0 < forward < both


@each_kernel
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_another_platform_is_named_when_the_program_is_lowered(name, platform):
    if platform == PLATFORMS[name]:
        platform = "rocm"
    message = f"'{name}' is for {PLATFORMS[name]} only, the program is compiled for {platform}"
    call = functools.partial(loss, name)
    for function in (call, gradient(name), jax.vmap(call, (0, None))):
        with pytest.raises(NotImplementedError, match=message):
            lowered(function, platform)


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "message"),
    [
        ("pallas_tpu", (1, 4000, 1, 1), "float32", "needs 16 children to fit into 12 MiB, got"),
        ("pallas_gpu", (1, 1, 300, 1), "float32", "needs the logits of a child to fit into 220"),
        ("pallas_gpu", SIZES, "float64", "computes in float32, got poses or weights of float64"),
        ("pallas_gpu", (1, 1, 1, 65), "float32", "needs parents of at most 64 dimensions, got"),
    ],
)
def test_what_kernels_cannot_do_is_named(name, sizes, dtype, message):
    with jax.enable_x64(dtype == "float64"):
        poses, weights = arguments(1, sizes, dtype)
        with pytest.raises(NotImplementedError, match=message):
            loss(name, poses, weights)


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr("capsjax.routing.fused.pallas_gpu._compute_capability", lambda: 8.0)
    with pytest.raises(NotImplementedError, match=r"compute capability 9.0 or more, got 8.0"):
        loss("pallas_gpu", *arguments(1))
    monkeypatch.setattr("capsjax.routing.fused.pallas_gpu._compute_capability", lambda: 12.0)
    with pytest.raises(NotImplementedError, match="logits of a child to fit into 96 KiB"):
        loss("pallas_gpu", *arguments(1, (1, 1, 128, 1)))


@pytest.mark.parametrize("children", [1, 263, 265, 1152, 36_864])
def test_programs_have_equal_shares(children):
    kernels = GpuKernels.of(
        jnp.zeros((1, children, 8)),
        jnp.zeros((children, 8, 10, 1)),
        leaky=False,
        stop_gradient=False,
        precision=None,
    )
    places = kernels.programs * kernels.blocks * kernels.block
    assert kernels.programs <= 264
    assert children <= places < 1.1 * children + 8


@each_kernel
def test_unknown_sizes_are_named(name):
    batch, children = export.symbolic_shape("batch, children")
    function = jax.jit(functools.partial(loss, name))
    shape = jax.ShapeDtypeStruct
    with pytest.raises(NotImplementedError, match="needs weights of known size, got"):
        export.export(function)(
            shape((2, children, 4), jnp.float32), shape((children, 4, 3, 5), jnp.float32)
        )
    with pytest.raises(NotImplementedError, match="needs poses of known size, got"):
        export.export(function)(shape((batch, 20, 4), jnp.float32), arguments(1)[1])


@each_kernel
@pytest.mark.usefixtures("interpreted")
def test_a_layer_takes_the_name(name):
    from flax import nnx

    layers = [
        DenseCapsules(20, 4, 3, 5, implementation=which, rngs=nnx.Rngs(0))
        for which in (name, "reference")
    ]
    kernels, reference = (layer(arguments(2)[0]).poses for layer in layers)
    np.testing.assert_allclose(kernels, reference, rtol=1e-5, atol=1e-5)


COMPILE = """
import functools
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from capsjax import dense_capsules
from capsjax.bench.targets import libtpu_lock, parse_target

def gradient(implementation, poses, weights):
    routed = lambda *x: dense_capsules(*x, implementation=implementation).poses.sum()
    return jax.grad(routed, (0, 1))(poses, weights)

paper, odd = (128, 1152, 8, 10, 16), (3, 37, 5, 3, 7)
with libtpu_lock(timeout=300):
    for target, name, dtype, sizes in (
        ("v5e-1", "pallas_tpu", jnp.bfloat16, paper),
        ("v5e-1", "pallas_tpu", jnp.float32, odd),
        ("v6e-1", "pallas_tpu", jnp.bfloat16, paper),
    ):
        place = SingleDeviceSharding(parse_target(target).devices()[0])
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in (sizes[:3], sizes[1:])
        ]
        function = jax.jit(functools.partial(gradient, name))
        text = function.lower(*shapes).compile().as_text()
        print("compiled", target, name, dtype.__name__, "backward_kernel" in text)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu"
)
def test_the_tpu_s_compiler_takes_them():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("compiled")]
    assert len(lines) == 3, done.stderr[-2000:]
    assert all(line.endswith("True") for line in lines)


RUN_ON_GPU = """
import jax, jax.numpy as jnp, numpy as np
from capsjax import dense_capsules

def outcome(name, poses, weights, bias, **options):
    def loss(poses, weights, bias):
        routed = dense_capsules(
            poses, weights, bias=bias, implementation=name, precision="highest", **options)
        v = routed.poses.astype(jnp.float32)
        return jnp.vdot(v, jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape)), v

    (_, v), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        poses, weights, bias)
    return [np.asarray(x, np.float64) for x in (v, *gradients)]

for batch, *sizes, dtype, options in (
    (128, 1152, 8, 10, 16, "float32", {}),
    (128, 1152, 8, 10, 16, "bfloat16", {}),
    (3, 37, 5, 3, 7, "float32", {"leaky": True, "num_iterations": 2}),
    (130, 600, 16, 10, 16, "float32", {"stop_gradient": True, "num_iterations": 4}),
    (1, 1, 1, 1, 1, "float32", {"num_iterations": 2}),
):
    keys = jax.random.split(jax.random.key(0), 3)
    poses = jax.random.normal(keys[0], (batch, *sizes[:2])).astype(dtype)
    weights = (jax.random.normal(keys[1], sizes) / np.sqrt(sizes[0] * sizes[1])).astype(dtype)
    bias = 0.1 * jax.random.normal(keys[2], sizes[2:])
    got = outcome("pallas_gpu", poses, weights, bias, **options)
    again = outcome("pallas_gpu", poses, weights, bias, **options)
    exact = (x.astype(jnp.float32) for x in (poses, weights))
    expected = outcome("reference", *exact, bias, **options)
    errors = [
        np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, expected, strict=True)]
    same = all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))
    print("ran", batch, *sizes, dtype, same, *(f"{e:.1e}" for e in errors), flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/dev/nvidia0"), reason="needs a GPU, Hopper or newer")
def test_a_gpu_computes_what_the_reference_does():
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ON_GPU],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    print(done.stdout)
    lines = [line.split()[6:] for line in done.stdout.splitlines() if line.startswith("ran")]
    assert len(lines) == 5, done.stderr[-2000:]
    for dtype, same, *errors in lines:
        assert same == "True"
        most = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
        assert all(float(error) < most for error in errors)
