"""Scaling over pods: a model of the all-reduce, by hand, and what the command shows of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capsjax.bench import (
    GPUS,
    Collective,
    Cycles,
    Estimate,
    Kernels,
    Program,
    Row,
    append_rows,
    parse_target,
    read_rows,
    suite_cells,
)
from capsjax.bench.results import estimates
from capsjax.bench.scaling import (
    CHIPS,
    all_reduce_seconds,
    batches,
    estimate_scaling,
    gpu_all_reduce_seconds,
)
from capsjax.cli import main

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("generation", "shape", "size", "microseconds"),
    [
        # Lines: 2 x 4 chips have one link an axis, 2 x 7 / 8 of 36 MB by 90 GB/s, 2 (1 + 3) hops.
        ("v5e", (2, 4), 36e6, 700 + 8),
        ("v5e", (8, 8), 64 / 63 * 45e6, 1000 + 28),
        # Rings: two links an axis, and half of the way.
        ("v5e", (16, 16), 256 / 255 * 90e6, 1000 + 32),
        ("v6e", (16, 16), 256 / 255 * 90e6, 500 + 32),
        # One axis is a ring, the other a line.
        ("v5e", (8, 16), 128 / 127 * 67.5e6, 1000 + 14 + 16),
        ("v5p", (4, 4, 4), 64 / 63 * 270e6, 1000 + 12),
        # Without a whole cube there are no rings.
        ("v5p", (2, 2, 4), 16 / 15 * 135e6, 1000 + 10),
        ("v5p", (2, 2, 1), 4 / 3 * 90e6, 1000 + 4),
        ("v5p", (1, 1, 1), 90e6, 0),
    ],
)
def test_the_time_of_an_all_reduce(generation, shape, size, microseconds):
    assert all_reduce_seconds(CHIPS[generation], shape, size) == pytest.approx(microseconds / 1e6)


def compiled(target, batch, cycles, size=36e6, **fields):
    """The row of a program with so many cycles, and bytes to sum."""
    hlo = Program(cycles=Cycles(cycles), collectives={"all-reduce": Collective(1, size)})
    fields = {"workload": "pmap_train_step", "hlo": hlo, **fields}
    parameters = {"preset": "paper", "batch": batch}
    return Row(cell=f"{batch} @ {target}", parameters=parameters, target=target, **fields)


# On one chip of v5e 8 ms for 1024 examples, 1 ms for 128; on 8 chips the sum takes 708 us.
POD = [compiled("v5e-8", 128, 1.5e6), compiled("v5e-8", "1024", 12e6)]


def test_weak_and_strong_scaling_by_hand():
    weak, strong = estimate_scaling(POD)
    assert (weak.kind, strong.kind) == ("weak", "strong")
    assert [(step.chips, step.batch) for step in weak.steps] == [(1, 128), (8, 128)]
    assert [(step.chips, step.batch) for step in strong.steps] == [(1, 1024), (8, 128)]
    one, eight = weak.steps
    assert one.seconds == pytest.approx(1e-3)
    assert eight.seconds == pytest.approx(1.708e-3)
    assert eight.examples_per_second == pytest.approx(1024 / 1.708e-3)
    for scaling in (weak, strong):
        assert scaling.efficiency(scaling.steps[0]) == 1
        assert scaling.efficiency(scaling.steps[1]) == pytest.approx(1 / 1.708)
        assert scaling.limit is None


def test_it_says_where_adding_chips_stops_paying_and_why():
    (_, strong) = estimate_scaling([compiled("v5e-8", 128, 3e6), POD[1]])
    assert strong.limit == strong.steps[1]
    # 2.708 ms instead of 1: 1 of computing and 0.708 of summing.
    assert list(strong.causes(strong.limit).values()) == pytest.approx([0.708e-3, 1e-3])
    text = estimates.verdict(strong)
    assert text.startswith("Adding chips stops paying at 8, the first below 50%.")
    assert "1.71 of 2.71 ms are lost, 59% of it to work that" in text
    (weak, _) = estimate_scaling([compiled("v5e-8", 128, 3e5), POD[1]])
    assert "stops paying at 8" in estimates.verdict(weak)
    assert "100% of it to the all-reduce" in estimates.verdict(weak)
    assert "Adding chips pays up to 8, " in estimates.verdict(estimate_scaling(POD)[0])


def test_a_program_for_the_slice_itself_is_preferred():
    (weak, _) = estimate_scaling([*POD, compiled("v5e-1", 128, 3e6, size=0)])
    assert [step.cycles for step in weak.steps] == [3e6, 1.5e6]


def on_gpus(target, batch, seconds):
    """The row of a program that takes so long on each GPU, and sums 36 MB."""
    kernels = Kernels({"fusion": 9.0}, seconds=Estimate(seconds))
    hlo = Program(kernels=kernels, collectives={"all-reduce": Collective(2, 36e6)})
    return compiled(target, batch, 0, hlo=hlo)


@pytest.mark.parametrize(
    ("name", "shape", "microseconds"),
    [
        ("h100", (1, 1), 0),
        # 7 / 8 of 72 MB at 450 GB/s, and 14 hops.
        ("h100", (1, 8), 140 + 14),
        # An eighth of it once more, at 50 GB/s.
        ("h100", (2, 8), 140 + 14 + 90 + 2),
        ("a100", (4, 1), 6 * 36e6 / 4 / 2.5e4 + 6),
    ],
)
def test_the_time_of_an_all_reduce_over_gpus(name, shape, microseconds):
    found = gpu_all_reduce_seconds(GPUS[name], shape, 36e6)
    assert found == pytest.approx(microseconds / 1e6)


def test_scaling_over_hosts_of_gpus():
    rows = [on_gpus("h100:16", batch, 1e-6 * batch) for batch in (64, 128, 1024)]
    assert batches(parse_target("h100:16")) == [128, 1024, 64]
    weak, strong = estimate_scaling(rows)
    assert [(step.chips, step.batch) for step in weak.steps] == [(1, 128), (8, 128), (16, 128)]
    assert [(step.chips, step.batch) for step in strong.steps] == [(1, 1024), (8, 128), (16, 64)]
    assert [1e6 * step.seconds for step in strong.steps] == pytest.approx([1024, 282, 310])
    assert strong.limit == strong.steps[1]
    assert "Mcycles" not in estimates.headings(strong)
    cells = estimates.cells(strong, strong.steps[1])
    assert cells == ("8", "128", "1,024", "0.128", "0.154", "3,631,206", "45%")
    assert len(cells) == len(estimates.headings(strong))
    text = estimates.assumptions([strong])
    assert "h100 450 and 50 GB/s in each direction" in text
    assert "cycles" not in text


def test_other_rows_have_no_estimate():
    others = [
        compiled("v5e-8", 128, 1e6, workload="train_step"),
        compiled("cpu:8", 128, 1e6),
        compiled("tpu7x-8", 128, 1e6),  # whose clock is not known here
        compiled("v6e-8", 128, 1e6, hlo=None),
        compiled("v6e-1", 128, 1e6),  # a single size
    ]
    assert estimate_scaling(others) == []


def test_batches_of_the_slices_of_a_pod():
    assert batches(parse_target("v6e-256")) == [128, 1024, 16, 4]
    assert batches(parse_target("v5p-128")) == [128, 1024, 16]
    assert batches(parse_target("v5p-384")) == [128, 1024, 16]  # 192 chips cannot share 1024
    assert batches(parse_target("cpu:8")) == [128]
    cells = suite_cells("pod", [])
    assert [cell.target for cell in cells] == 4 * ["v5e-256"] + 4 * ["v6e-256"] + 3 * ["v5p-128"]


def test_the_suite_prints_records_and_reports(tmp_path, monkeypatch, capsys):
    def record(cells, plan, **_):
        rows = {f"{each.parameters['batch']}": each for each in POD}
        batch = [str(dict(cell.parameters)["batch"]) for cell in cells]
        append_rows(plan.output, [rows[each] for each in batch])

    monkeypatch.setattr("capsjax.bench.command.check_targets", lambda cells: None)
    monkeypatch.setattr("capsjax.bench.command.run_cells", record)
    output = tmp_path / "pod.jsonl"
    main(["bench", "pod", "--target", "v5e-8", "--output", str(output)])
    out = capsys.readouterr().out
    page = output.with_suffix(".html").read_text()
    for expected in ("Weak scaling on v5e", "Strong scaling on v5e", "Adding chips pays up to 8"):
        assert expected in out
        assert expected in page
    assert "599,532" in out  # 1,024 examples in 1.708 ms
    assert "<td>599,532</td>" in page
    assert "These are estimates: nothing was run." in out
    assert "These are estimates: nothing was run." in page


def test_the_guide_has_the_recorded_figures():
    guide = (DOCS / "guides" / "benchmarking-xla.md").read_text()
    rows = read_rows(DOCS / "results" / "epyc-2-cores" / "pod.jsonl")
    for scaling in estimate_scaling(rows):
        for step in scaling.steps:
            cells = (scaling.generation, scaling.kind, *estimates.cells(scaling, step))
            assert f"| {' | '.join(cells)} |" in guide
    for row in rows:
        assert row.hlo.collectives["all-reduce"].executions == 1
        memory = (row.memory.arguments, row.memory.temporaries, row.hlo.cycles.total)
        cells = (f"{int(row.parameters['batch']):,}", *(f"{size / 1e6:.3f}" for size in memory))
        assert f"| {row.target} | {row.processes} | {' | '.join(cells)} |" in guide


# A mapped step over eight absent chips: the gradients of two arrays, averaged.
FOR_A_POD = """
import jax, jax.numpy as jnp
from capsjax.bench import parse_target, read_program, take_libtpu
from capsjax.training import make_driver

def step(params):
    gradients = jax.grad(lambda p: jnp.sum(jnp.tanh(p["a"] @ p["b"])))(params)
    return jax.lax.pmean(gradients, "batch")

take_libtpu()
devices = parse_target("v5e-8").devices()
mapped = make_driver("pmap", devices=devices).compile(step)
params = {name: jax.ShapeDtypeStruct((128, 128), jnp.float32) for name in "ab"}
text = mapped.func.lower(*mapped.args, params).compile().as_text()
program = read_program(text)
print(len({device.process_index for device in devices}))
print({name: (each.executions, each.bytes) for name, each in program.collectives.items()})
print(program.cycles.without_estimate.get("all-reduce"), "num_partitions=8" in text)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_tpu_s_compiler_sums_once_over_the_chips_of_all_processes():
    done = subprocess.run(
        [sys.executable, "-c", FOR_A_POD],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    expected = ["2", f"{{'all-reduce': (1, {2 * 128 * 128 * 4})}}", "1 True"]
    assert done.stdout.split("\n")[:3] == expected, done.stderr
