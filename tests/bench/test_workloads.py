"""What is compiled: every form of a workload computes the same."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsjax.bench import WorkloadError, make_workload, parse_target, read_program, workloads
from capsjax.bench.workloads import UserFunction, parse_shape

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


def test_every_implementation_and_direction_computes_the_same():
    outs = [
        values("routing", implementation=name, direction="gradient", **SMALL)
        for name in ("reference", "blocked")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *outs)


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
    with make_workload("hotos_gcc", sizes).compiled() as (function, seconds):
        np.testing.assert_allclose(function(*arrays), expected, rtol=1e-5)
        assert seconds > 0


def test_the_public_shape_of_the_hotos_primitive():
    shapes = [x.shape for x in make_workload("hotos", {}).build(jax.devices()).arguments]
    assert shapes == [(8, 32, 15, 15, 4, 4), (32, 32, 3, 3, 4, 4)]


def test_collectives_of_the_pmapped_step_are_the_parameters():
    devices = parse_target("cpu:8").devices()
    built = make_workload("pmap_train_step", {"preset": "small", "batch": 2}).build(devices)
    assert built.devices == 8
    text = built.function.lower(*built.arguments).compile().as_text()
    reduced = read_program(text).collectives["all-reduce"]
    parameters = sum(x.size * 4 for x in jax.tree.leaves(built.arguments[0].params))
    # And the loss and the error, float32 each.
    assert reduced.bytes == parameters + 8


def test_a_function_of_the_user_s_own(tmp_path, monkeypatch):
    (tmp_path / "mine_for_bench.py").write_text("def double(x, n):\n    return 2 * x + n\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    built = UserFunction(function="mine_for_bench:double", shapes="f32[3] i32[]").build(
        jax.devices()
    )
    np.testing.assert_array_equal(built.function(jnp.ones(3), 1), [3, 3, 3])
    with pytest.raises(WorkloadError, match="has no function 'triple'"):
        make_workload("mine_for_bench:triple", {"shapes": "f32[3]"}).build(jax.devices())


BAD = [
    ("rooting", {}, "workload must be one of squash, routing, .*, got 'rooting'"),
    ("squash", {"bach": 1}, "'squash' has one of batch, .*, no 'bach'"),
    ("squash", {"batch": "many"}, "batch must be a positive integer, got 'many'"),
    ("routing", {"algorithm": "rba"}, "algorithm must be one of dynamic, .*, got 'rba'"),
    ("routing", {"algorithm": "em", "implementation": "blocked"}, "implementation of 'em' must be"),
    ("routing", {"implementation": "blocked", "loop": "scan"}, "loop must be 'fori_loop' for"),
    ("routing", {"algorithm": "self", "iterations": 5}, "'self' has no iterations to choose"),
]


@pytest.mark.parametrize(("name", "parameters", "match"), BAD, ids=[m for *_, m in BAD])
def test_what_does_not_go_together_is_named(name, parameters, match):
    with pytest.raises(WorkloadError, match=match):
        make_workload(name, parameters)


@pytest.mark.parametrize("text", ["f32", "f32[a]", "q9[3]"])
def test_shapes_that_are_none_are_named(text):
    with pytest.raises(WorkloadError, match="shape"):
        parse_shape(text)


def test_all_workloads_are_listed():
    assert {"squash", "routing", "hotos", "hotos_gcc", "forward", "train_step"} <= set(workloads())
