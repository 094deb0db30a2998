import functools
import importlib.util

import jax
import numpy as np
import pytest
from flax import nnx

from capsjax import models
from capsjax.bench import RoutingSizes, StepSizes, Times, benchmark_routing, benchmark_step
from capsjax.bench.measurement import Measurement, ratio, show
from capsjax.bench.program import Cycles

IMPLEMENTATIONS = ["reference", "blocked", "pallas_tpu", "pallas_gpu"]
KERNEL = {"custom-call tpu_custom_call": 2.0}


def test_a_row_for_every_implementation_and_direction():
    rows = benchmark_routing(RoutingSizes(batch=4, children=64, num_iterations=2), rounds=2)
    assert [(row.kind, row.name) for row in rows] == [
        (kind, name) for kind in ("forward", "gradient") for name in IMPLEMENTATIONS
    ]
    votes = 4 * 64 * 10 * 16
    reference, _, kernels, _ = rows[:4]
    assert reference.temporary_bytes >= 4 * votes
    assert reference.cost.flops >= 2 * 8 * votes
    assert reference.cycles is None
    assert "is for tpu only, the program is compiled for cpu" in kernels.reason
    for row in rows:
        if not row.name.startswith("pallas"):
            assert row.compile_seconds > 0
            assert len(row.times.seconds) == 2


def test_ratios_are_of_cycles_where_nothing_ran():
    slow, fast = (Measurement("step", "x", cycles=Cycles(n, {}, {})) for n in (10.0, 5.0))
    assert ratio(fast, slow) == 0.5
    timed = Measurement("step", "x", times=Times((3.0,)))
    assert ratio(timed, timed._replace(times=Times((6.0,)))) == 0.5
    assert ratio(timed, slow) is None


def test_kernels_without_an_estimate_are_never_counted_as_nothing(capsys):
    whole = Measurement("step", "reference", cycles=Cycles(4e6, {}, {}))
    part = Measurement("step", "pallas_tpu", cycles=Cycles(1e6, {}, KERNEL))
    assert ratio(part, whole) is None
    show([whole, part], "reference")
    out = capsys.readouterr().out
    assert "1.000+" in out
    assert "0.25" not in out
    assert "and the cycles of 2 kernels, of which the compiler has no estimate" in out


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_the_step_in_pytorch_is_the_same_network_and_learns():
    from capsjax.bench import torch_step

    config = models.configure("small")
    network = torch_step.CapsNet(config)
    number = sum(p.numel() for p in network.parameters())
    own = models.create("small", rngs=nnx.Rngs(0))
    assert number == sum(x.size for x in jax.tree.leaves(nnx.state(own)))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    starts = []
    for dtype in ("float32", "bfloat16"):
        config = models.configure("small", dtype=dtype)
        torch_step.torch.manual_seed(0)
        step = torch_step.make_step(config, images, np.arange(4), compiled=False, device="cpu")
        losses = [step() for _ in range(10)]
        assert losses[-1] < losses[0]
        starts.append(losses[0])
    assert starts[0] != starts[1]
    np.testing.assert_allclose(starts[1], starts[0], rtol=0.02)


def test_a_step_goes_on_from_the_state_that_the_last_one_left():
    rows = benchmark_step(StepSizes(preset="small", batch=1), rounds=1, torch=False)
    assert [row.name for row in rows] == ["default", *IMPLEMENTATIONS]
    assert all(row.times for row in rows[:3])
    assert rows[0].cost.flops > 1e6


def test_sizes_that_cannot_be_are_named():
    for make in (functools.partial(StepSizes, batch=0), functools.partial(RoutingSizes, batch=0)):
        with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
            make()
