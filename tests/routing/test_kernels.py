"""Kernels for TPUs: what they say, computed by XLA; and that the TPU's compiler takes them."""

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
from capsjax.routing.fused.pallas_tpu import TpuKernels

SIZES = (20, 4, 3, 5)


@pytest.fixture
def interpreted(monkeypatch):
    """Makes kernels run on the CPU, in blocks of 16 children."""
    real = TpuKernels.of

    def of(*arguments, **options):
        return dataclasses.replace(real(*arguments, **options), block=16, interpret=True)

    monkeypatch.setattr(TpuKernels, "of", of)


def arguments(batch, sizes=SIZES, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    poses = jax.random.normal(keys[0], (batch, *sizes[:2]))
    weights = jax.random.normal(keys[1], sizes) / np.sqrt(sizes[1])
    return poses.astype(dtype), weights.astype(dtype)


def loss(poses, weights, bias=None, implementation="pallas_tpu", **options):
    routed = dense_capsules(poses, weights, bias=bias, implementation=implementation, **options)
    v = routed.poses.astype(jnp.promote_types(routed.poses.dtype, jnp.float32))
    return jnp.vdot(v, jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape))


@pytest.mark.usefixtures("interpreted")
@settings(max_examples=8)
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
    batch, sizes, num_iterations, dtype, leaky, stop_gradient, masked
):
    poses, weights = arguments(batch, sizes, dtype)
    bias = jnp.cos(jnp.arange(float(np.prod(sizes[2:])))).reshape(sizes[2:])
    options = {"num_iterations": num_iterations, "leaky": leaky, "stop_gradient": stop_gradient}
    if masked:
        options["where"] = jnp.arange(sizes[0]) % 3 > 0
    results = [
        jax.jit(
            jax.value_and_grad(functools.partial(loss, implementation=name, **options), (0, 1))
        )(*(x.astype(kind) for x in (poses, weights)), bias)
        for name, kind in (("pallas_tpu", dtype), ("reference", "float32"))
    ]
    got, expected = map(jax.tree.leaves, results)
    scale = max(1.0, *(float(jnp.abs(x).max()) for x in expected))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, dtype=dtype, terms=sizes[0] * sizes[1], scale=scale)


@pytest.mark.usefixtures("interpreted")
def test_under_vmap_and_shard_map():
    poses, weights = arguments(8)
    expected = dense_capsules(poses, weights, implementation="reference").poses

    def route(poses):
        return dense_capsules(poses, weights, implementation="pallas_tpu").poses

    np.testing.assert_allclose(jax.vmap(route)(poses), expected, rtol=1e-5, atol=1e-5)
    mesh, batch = Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch")
    # Interpreted kernels do not say on which axes of a mesh their numbers differ.
    mapped = jax.shard_map(route, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)
    np.testing.assert_allclose(jax.jit(mapped)(poses), expected, rtol=1e-5, atol=1e-5)


def lowered(function, platform="tpu"):
    shapes = [jax.ShapeDtypeStruct((8, *SIZES[:2]), jnp.float32)]
    return export.export(jax.jit(function), platforms=[platform])(*shapes).mlir_module()


def test_what_is_named_is_what_runs():
    weights = arguments(1)[1]
    text = lowered(jax.grad(lambda poses: loss(poses, weights)))
    assert "forward_kernel" in text
    assert "backward_kernel" in text
    for other in ("blocked", "reference", None):
        assert "kernel_name" not in lowered(
            jax.grad(lambda poses, name=other: loss(poses, weights, implementation=name))
        )


def test_under_a_checked_shard_map():
    weights = arguments(1)[1]
    mesh, batch = Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch")

    def route(poses):
        return dense_capsules(poses, weights, implementation="pallas_tpu").poses

    mapped = jax.shard_map(route, mesh=mesh, in_specs=batch, out_specs=batch)
    assert "backward_kernel" in lowered(jax.grad(lambda poses: mapped(poses).sum()))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_another_platform_is_named_when_the_program_is_lowered(platform):
    weights = arguments(1)[1]
    message = f"'pallas_tpu' needs a TPU, the program is compiled for {platform}"
    for function in (loss, jax.grad(loss), jax.vmap(loss, (0, None))):
        with pytest.raises(NotImplementedError, match=message):
            lowered(lambda poses, function=function: function(poses, weights), platform)


def test_what_kernels_cannot_do_is_named():
    with pytest.raises(NotImplementedError, match="needs 16 children to fit into 12 MiB, got"):
        loss(*arguments(1, (1, 4000, 1, 1)))
    batch, children = export.symbolic_shape("batch, children")
    weights = jax.ShapeDtypeStruct((children, 4, 3, 5), jnp.float32)
    with pytest.raises(NotImplementedError, match="needs weights of known size, got"):
        export.export(jax.jit(loss))(jax.ShapeDtypeStruct((2, children, 4), jnp.float32), weights)
    with pytest.raises(NotImplementedError, match="needs poses of known size, got"):
        export.export(jax.jit(loss))(
            jax.ShapeDtypeStruct((batch, 20, 4), jnp.float32), arguments(1)[1]
        )


def test_a_layer_takes_the_name(interpreted):
    del interpreted
    from flax import nnx

    layers = [
        DenseCapsules(20, 4, 3, 5, implementation=name, rngs=nnx.Rngs(0))
        for name in ("pallas_tpu", "reference")
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
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("compiled")]
    assert len(lines) == 3, done.stderr[-2000:]
    assert all(line.endswith("True") for line in lines)
