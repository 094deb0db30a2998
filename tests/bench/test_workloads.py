"""What is compiled: every form of a workload computes the same."""

import importlib.util
import shutil
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsjax import models, routing, training
from capsjax.bench import CAPSULE_SIZES, make_workload, parse_target, read_program, suite_cells
from capsjax.bench.cells import make_cells, sweep
from capsjax.bench.config import Suite
from capsjax.bench.processes import measure
from capsjax.bench.workloads import UserFunction, choices, convolutions, parse_shape
from capsjax.data import Batch, Sampler, Shifted
from capsjax.errors import ConfigError
from capsjax.ops import squash
from capsjax.routing.fused import Implementation

SMALL = {"batch": 2, "children": 6, "in_features": 3, "parents": 4, "features": 5}


def values(workload, **parameters):
    built = make_workload(workload, parameters).build(jax.devices())
    random = np.random.default_rng(0)
    arrays = [random.random(x.shape, np.float32).astype(x.dtype) for x in built.arguments]
    return built.function(*arrays)


@pytest.mark.parametrize("algorithm", ["dynamic", "em", "attention", "kmeans"])
def test_every_form_of_the_loop_computes_the_same(algorithm):
    forms = [
        values("routing", algorithm=algorithm, loop=loop, iterations=3, **SMALL)
        for loop in ("fori_loop", "scan", "unrolled")
    ]
    for other in forms[1:]:
        np.testing.assert_allclose(other, forms[0], rtol=1e-5, atol=1e-6)
    lowered = make_workload("routing", {"loop": "unrolled", **SMALL}).build(jax.devices())
    text = lowered.function.lower(*lowered.arguments).as_text()
    assert "stablehlo.while" not in text


def test_every_implementation_computes_the_same():
    outs = [
        values("routing", implementation=name, **SMALL)
        for name in ("reference", "blocked", "default")
    ]
    for other in outs[1:]:
        np.testing.assert_allclose(other, outs[0], rtol=1e-4, atol=1e-5)


def test_gradients_are_of_the_sum_of_the_result():
    sizes = {"batch": 2, "capsules": 3, "features": 4}
    result, (gradient,) = values("squash", direction="gradient", **sizes)
    x = np.random.default_rng(0).random((2, 3, 4), np.float32)
    np.testing.assert_allclose(result, squash(x), rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: squash(x).sum())(x), rtol=1e-5)


def hotos_in_numpy(poses, weights):
    n, _, size = poses.shape[:3]
    grid = (size - 3) // 2 + 1
    result = np.zeros((n, weights.shape[1], grid, grid, 4, 4))
    for x, y in np.ndindex(grid, grid):
        window = poses[:, :, 2 * x : 2 * x + 3, 2 * y : 2 * y + 3]
        result[:, :, x, y] = np.einsum("ncuvik,couvkj->noij", window, weights)
    return result


def test_the_hotos_primitive_in_every_formulation_and_in_c():
    sizes = {"batch": 2, "channels": 3, "out": 2, "size": 7}
    random = np.random.default_rng(0)
    built = make_workload("hotos", sizes).build(jax.devices())
    arrays = [random.random(x.shape, np.float32) for x in built.arguments]
    expected = hotos_in_numpy(*(a.astype(np.float64) for a in arrays))
    for formulation in ("einsum", "patches", "conv", "shifts"):
        function = make_workload("hotos", {"formulation": formulation, **sizes})
        out = function.build(jax.devices()).function(*arrays)
        np.testing.assert_allclose(out, expected, rtol=1e-5)
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    compiled = make_workload("hotos_gcc", sizes).compile()
    np.testing.assert_allclose(compiled(*arrays), expected, rtol=1e-5)


def test_the_public_shape_of_the_hotos_primitive():
    shapes = [x.shape for x in make_workload("hotos", {}).build(jax.devices()).arguments]
    assert shapes == [(8, 32, 15, 15, 4, 4), (32, 32, 3, 3, 4, 4)]


def test_collectives_of_the_pmapped_step_are_the_parameters():
    devices = parse_target("cpu:8").devices()
    built = make_workload("pmap_train_step", {"preset": "small", "batch": 1}).build(devices)
    assert built.devices == 8
    text = built.function.lower(*built.arguments).compile().as_text()
    reduced = read_program(text).collectives["all-reduce"]
    parameters = sum(x.size * 4 for x in jax.tree.leaves(built.arguments[1].params))
    # And the loss and the error, float32 each.
    assert reduced.bytes == parameters + 8


def test_steps_of_several_seeds_in_one_call():
    sizes = {"batch": 2, "examples": 4, "steps": 3, "seeds": 2}
    built = make_workload("train_steps", sizes).build(jax.devices())
    before, examples, order, _, steps = built.arguments
    assert (examples.images.shape, order.shape, steps.shape) == ((4, 28, 28, 1), (2, 4), ())
    state, sums = jax.eval_shape(built.function, *built.arguments)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, before)
    assert sums.loss.shape == (2,)


def test_a_function_of_the_user_s_own(tmp_path, monkeypatch):
    (tmp_path / "mine_for_bench.py").write_text("def double(x, n):\n    return 2 * x + n\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    built = UserFunction(function="mine_for_bench:double", shapes="f32[3] i32[]").build(
        jax.devices()
    )
    np.testing.assert_array_equal(built.function(jnp.ones(3), 1), [3, 3, 3])
    with pytest.raises(ConfigError, match="has no function 'triple'"):
        make_workload("mine_for_bench:triple", {"shapes": "f32[3]"}).build(jax.devices())


BAD = [
    ("rooting", {}, "workload must be one of squash, routing, .*, got 'rooting'"),
    ("squash", {"bach": 1}, "'squash' has no parameter 'bach', only batch, "),
    ("squash", {"batch": "many"}, "batch must be a positive integer, got 'many'"),
    ("routing", {"algorithm": "rba"}, "algorithm must be one of .*, uniform, .*, got 'rba'"),
    ("routing", {"algorithm": "em", "implementation": "blocked"}, "implementation of 'em' must be"),
    ("routing", {"implementation": "blocked", "loop": "scan"}, "loop must be 'fori_loop' for"),
    ("routing", {"algorithm": "self", "iterations": 5}, "'self' has no option iterations"),
]


@pytest.mark.parametrize(("name", "parameters", "match"), BAD, ids=[m for *_, m in BAD])
def test_what_does_not_go_together_is_named(name, parameters, match):
    with pytest.raises(ConfigError, match=match):
        make_workload(name, parameters)


@pytest.mark.parametrize("text", ["f32", "f32[a]", "q9[3]", "f64[3]", "i64[3]", "u64[]"])
def test_shapes_that_are_none_are_named(text):
    with pytest.raises(ConfigError, match="shape"):
        parse_shape(text)


def test_numbers_of_64_bits_have_to_be_enabled():
    with jax.enable_x64(True):
        assert parse_shape("f64[3]").dtype == jnp.float64
        assert parse_shape("i64[3]").dtype == jnp.int64


def test_a_cell_that_is_named_twice_is_one():
    entries = sweep("squash", {"batch": [4, 4, 5]})
    cells = make_cells(entries, ["cpu", "cpu"], ["", ""])
    assert [cell.key for cell in cells] == ["squash batch=4 @ cpu", "squash batch=5 @ cpu"]
    assert len(suite_cells("quick", ["cpu", "cpu"])) == len(suite_cells("quick", ["cpu"]))


def test_files_of_programs_have_names_that_any_file_system_takes():
    one, other = (
        make_cells([("math:exp", {"shapes": f"f32[{n}]" + 40 * " f32[64,64]"})], ["cpu"])[0]
        for n in (1, 2)
    )
    assert one.file_name[:100] != one.key[:100]
    assert max(len(cell.file_name) for cell in (one, other)) < 200
    assert one.file_name != other.file_name
    assert make_cells([("squash", {"batch": 4})], ["cpu"])[0].file_name == "squash_batch=4___cpu"


def test_suites_build_and_cover_every_algorithm(toy):
    cells = [cell for suite in get_args(Suite) for cell in suite_cells(suite, ["cpu"])]
    distinct = {(cell.workload, cell.parameters) for cell in cells}
    for name, parameters in distinct:
        make_workload(name, dict(parameters)).build(jax.devices())
    routed = {dict(parameters).get("algorithm", "dynamic") for _, parameters in distinct}
    assert routed == set(routing.algorithms())
    assert toy in routed
    assert toy in choices("routing", "algorithm")


@pytest.fixture
def toy():
    """The name of an algorithm that capsjax does not have."""
    name = "first_child"

    def function(votes, *, where=None):
        return routing.Routed(votes[..., 0, :, :], votes[..., 0, :, 0], None)

    routing.register(routing.Algorithm(name=name, function=function, paper=""))
    yield name
    routing.unregister(name)


def test_suites_name_the_layout_of_the_platform():
    def blocks(target):
        found = {
            dict(cell.parameters).get("implementation") for cell in suite_cells("quick", [target])
        }
        return found - {None}

    assert blocks("cpu") == {"blocked"}
    if "lanes" in get_args(Implementation):
        assert blocks("v5e-1") == {"lanes"}


@pytest.mark.parametrize("name", CAPSULE_SIZES)
def test_sizes_name_the_shapes_and_single_ones_replace_them(name):
    sizes = CAPSULE_SIZES[name]
    arguments = make_workload("routing", {"sizes": name}).build(jax.devices()).arguments
    assert [x.shape for x in arguments] == [x.shape for x in sizes.arguments()]
    poses, _ = make_workload("routing", {"sizes": name, "batch": 3}).build(jax.devices()).arguments
    assert poses.shape == (3, sizes.children, sizes.in_features)
    assert sizes.reduced().layer.in_capsules >= 6


def test_a_missing_pytorch_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    step = make_workload("train_step", {"implementation": "torch.compile"})
    with pytest.raises(NotImplementedError, match="needs PyTorch, which is not installed"):
        step.build(jax.devices())


@pytest.mark.parametrize("workload", ["train_step", "train_steps"])
@pytest.mark.parametrize("name", ["torch.compile-graph", "torch.graph"])
def test_a_cuda_graph_is_for_gpus(monkeypatch, workload, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    step = make_workload(workload, {"implementation": name})
    with pytest.raises(NotImplementedError, match="CUDA graphs need a gpu"):
        step.build(jax.devices())


@pytest.fixture(scope="module")
def first_steps():
    """Variables of the network, images, and the losses of three steps without shifts."""
    apply, variables = training.split_network(models.create("small", rngs=nnx.Rngs(0)))
    optimizer = training.paper_optimizer()
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    four = jnp.arange(4)
    sample = Sampler(Shifted(0), 10).train(
        Batch(images, four), jax.random.key(0), four, indices=four
    )
    step = jax.jit(training.make_train_step(apply, optimizer, training.paper_loss))
    state, losses = training.init_state(variables, optimizer), []
    for _ in range(3):
        state, metrics = step(state, sample)
        losses.append(float(metrics.loss))
    return variables.params, images, losses


def copy_weights(params, network):
    """Copies the network's weights to PyTorch, whose layers have another order of axes."""

    def copy(parameter, array, *axes):
        parameter.data.copy_(parameter.new_tensor(np.transpose(array, axes or None)))

    copy(network.conv.weight, params["conv"]["kernel"], 3, 2, 0, 1)
    copy(network.conv.bias, params["conv"]["bias"])
    copy(network.primary.weight, params["primary"]["conv"]["kernel"], 3, 2, 0, 1)
    copy(network.primary.bias, params["primary"]["bias"])
    copy(network.weights, params["classes"]["kernel"], 0, 2, 3, 1)
    for number, layer in params["decoder"]["layers"].items():
        copy(network.decoder[2 * number].weight, layer["kernel"], 1, 0)
        copy(network.decoder[2 * number].bias, layer["bias"])


COMPILED = [
    pytest.param(name, "float32", marks=pytest.mark.slow)
    for name in ("torch.compile", "torch.max-autotune", "torch.compile-graph", "torch.graph")
]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
@pytest.mark.filterwarnings("ignore")  # what PyTorch's compiler warns of is its own
@pytest.mark.parametrize(
    ("name", "dtype"), [("torch", "float32"), ("torch", "bfloat16"), *COMPILED]
)
def test_every_step_in_pytorch_is_the_step_in_jax(first_steps, name, dtype):
    from capsjax.bench.workloads import torch_step

    device = "cuda" if torch_step.torch.cuda.is_available() else "cpu"
    if name.endswith("graph") and device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    params, images, losses = first_steps
    network = torch_step.CapsNet(models.configure("small", dtype=dtype))
    copy_weights(params, network)
    step = torch_step.make_step(network, images, np.arange(4), device=device, implementation=name)
    found = [step() for _ in losses]
    tolerance = 0.02 if dtype == "bfloat16" else 1e-5 if device == "cpu" else 2e-3
    np.testing.assert_allclose(found[0], losses[0], rtol=tolerance)
    # Adam's first updates have the size of the learning rate even where gradients are rounding.
    np.testing.assert_allclose(found[1:], losses[1:], rtol=max(tolerance, 1e-3))


@pytest.mark.parametrize("workload", ["train_step", "train_steps"])
@pytest.mark.parametrize(
    ("preset", "match"),
    [
        ("official", "like preset 'paper', with primary_coupling=1.0, got 0.03125"),
        ("cifar10", "like preset 'paper', with padding='VALID', got 'SAME'"),
        ("baseline", "with presets of CapsNet"),
    ],
)
def test_pytorch_is_not_compared_with_another_network(workload, preset, match):
    step = make_workload(workload, {"implementation": "torch", "preset": preset})
    with pytest.raises(NotImplementedError, match=match):
        step.build(jax.devices())


def test_pytorch_trains_one_network_at_a_time():
    steps = make_workload("train_steps", {"implementation": "torch", "seeds": 2})
    with pytest.raises(NotImplementedError, match="networks do not train together"):
        steps.build(jax.devices())


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_many_steps_in_pytorch_are_steps_one_by_one(first_steps):
    from capsjax.bench.workloads import torch_step

    params, images, losses = first_steps
    network = torch_step.CapsNet(models.configure("small"))
    copy_weights(params, network)
    call = torch_step.make_step(
        network, images, np.arange(4), device="cpu", implementation="torch", steps=3
    )
    np.testing.assert_allclose(call(), losses[-1], rtol=1e-3)


def test_arguments_have_the_dtypes_of_the_workload():
    # NumPy's products of Python numbers and bfloat16 are float32 with ml_dtypes 0.6.
    for dtype in ("float32", "bfloat16"):
        built = make_workload("routing", {"dtype": dtype, **SMALL}).build(jax.devices())
        assert {x.dtype for x in measure._arguments(built)} == {jnp.dtype(dtype)}


def test_only_the_layer_that_is_measured_has_the_implementation(monkeypatch):
    original, found = convolutions.conv_general_dilated, []

    def convolve(images, kernel, *others, implementation, **more):
        found.append((kernel.shape[2], implementation))
        return original(images, kernel, *others, implementation="xla", **more)

    monkeypatch.setattr(convolutions, "conv_general_dilated", convolve)
    settings = {"layer": "primary", "implementation": "mosaic_gpu", "batch": 2}
    make_workload("convolution", settings).build(jax.devices())
    assert found == [(1, "xla"), (256, "mosaic_gpu")]
