"""Programs of GPUs: kernels of a stored text counted by hand; the compiler without a GPU."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from capsjax.bench import (
    GPUS,
    Row,
    append_rows,
    estimate_scaling,
    known_gpu,
    parse_target,
    read_environment,
    read_program,
    read_rows,
    write_report,
)
from capsjax.bench.programs.hlo import Module
from capsjax.bench.programs.kernels import Work, call_work
from capsjax.bench.results import estimates
from capsjax.bench.results.table import rows_table

# A convolution, three products in a loop, and a loop of unknown length: for an H200, jax 0.11.2.
# Fields that nothing reads are cut out.
TEXT = Path(__file__).with_name("gpu.hlo.txt").read_text()
H200 = GPUS["h200"]
DOCS = Path(__file__).parents[2] / "docs"


def test_launches_of_a_run_by_kind():
    program = read_program(TEXT, gpu=H200)
    # The loop of three runs an addition, a product and a copy each time, but not its condition; the
    # other one, once, an addition, a sine and its condition.
    assert program.kernels.launches == {"fusion": 7, "copy": 5, "gemm": 3, "cudnn": 1}
    assert program.kernels.graph_cuts == 1
    assert [loop.trip_count for loop in program.loops] == [3, None]
    assert read_program(TEXT).kernels is None


def test_seconds_are_the_compiler_s_and_least_for_libraries():
    seconds = read_program(TEXT, gpu=H200).kernels.seconds
    # All but the sine, to which the compiler gives 1.894 us, are as short as kernels get.
    assert seconds.total == pytest.approx(15 * 1.5e-6 + 1.894e-6)
    assert seconds.without_estimate == {}
    lines = {source.rpartition("/")[2]: 1e6 * time for source, time in seconds.by_source.items()}
    assert lines["network.py:10 (network)"] == pytest.approx(1.5)
    assert lines["network.py:12 (network.<locals>.<lambda>)"] == pytest.approx(4.5)
    # The sine's fusion has no line of its own.
    assert lines["network.py:13 (network.<locals>.<lambda>)"] == pytest.approx(1.894)


def test_tiles_are_estimated_by_the_model_that_knows_them():
    models = '{"exec_time_us":900,"name":""},{"exec_time_us":20,"name":"indexing-cost-model"}'
    text = TEXT.replace('{"exec_time_us":1.894,"compute_time_us":1.8885', models + ",{", 1)
    assert text != TEXT
    total = read_program(text, gpu=H200).kernels.seconds.total
    assert total == pytest.approx(15 * 1.5e-6 + 20e-6)


def test_a_kernel_that_nobody_estimates_is_named():
    text = TEXT.replace("__cudnn$convForward", "mosaic_gpu_v2")
    kernels = read_program(text, gpu=H200).kernels
    assert kernels.launches["custom call"] == 1
    assert kernels.graph_cuts == 0
    assert kernels.seconds.without_estimate == {"custom-call mosaic_gpu_v2": 1}
    assert kernels.seconds.has_kernels


def test_a_kernel_that_records_its_operations_is_estimated():
    text = TEXT.replace(
        '"__cudnn$convForward"', '"mosaic_gpu_v2", frontend_attributes={capsjax_flops="9.895e+10"}'
    )
    assert text != TEXT
    kernels = read_program(text, gpu=H200).kernels
    assert kernels.launches["custom call"] == 1
    assert not kernels.seconds.without_estimate
    others = read_program(text.replace("capsjax_flops", "other"), gpu=H200)
    assert kernels.seconds.total - others.kernels.seconds.total == pytest.approx(100e-6)
    assert read_program(text).cost.flops - others.cost.flops == 9.895e10


def test_what_stays_outside_of_fusions_is_named():
    text = TEXT.replace(" copy(%gemm_fusion_dot_general.1)", " fft(%gemm_fusion_dot_general.1)")
    kernels = read_program(text, gpu=H200).kernels
    assert (kernels.launches["copy"], kernels.launches["other"]) == (2, 3)
    assert kernels.seconds.without_estimate == {"fft": 3}


def test_a_text_without_estimates_has_no_total():
    # As the compiler writes it for a GPU that is there.
    text = TEXT.replace("exec_time_us", "gone")
    assert read_program(text, gpu=H200).kernels.seconds is None
    assert read_program(text, gpu=H200).kernels.launches["fusion"] == 7


def test_operations_of_libraries_are_counted():
    products = 3 * 2 * 1024 * 128 * 128
    convolution = 2 * (16 * 8 * 8 * 128) * (3 * 3 * 64)
    bytes_ = 2 * (16 * 10 * 10 * 64 + 3 * 3 * 64 * 128 + 16 * 8 * 8 * 128)
    without = read_program(TEXT.replace("__cudnn$convForward", "other")).cost
    cost = read_program(TEXT).cost
    assert cost.flops - without.flops == convolution
    assert cost.bytes - without.bytes == bytes_
    # Beside the products, additions of counters, and a conversion, a tangent or a sine of each.
    assert products + convolution <= cost.flops <= products + convolution + 2e6


CALLS = """HloModule calls

ENTRY %main (x: f32[8,20,20,4], y: f32[8,6,6,32]) -> f32[32,9,9,4] {{
  %x = f32[8,20,20,4]{{3,2,1,0}} parameter(0)
  %y = f32[8,6,6,32]{{3,2,1,0}} parameter(1)
  %k = f32[32,9,9,4]{{3,2,1,0}} parameter(2)
  %a = f32[5,64,16]{{2,1,0}} parameter(3)
  %b = bf16[5,64,24]{{2,1,0}} parameter(4)
  ROOT %call = {call}
}}
"""
CONVOLVED = 2 * (8 * 6 * 6 * 32) * (9 * 9 * 4)
MOVED = 4 * (8 * 20 * 20 * 4 + 8 * 6 * 6 * 32 + 32 * 9 * 9 * 4)
WINDOW = "window={size=9x9 stride=2x2}, dim_labels=b01f_o01i->b01f"
CONTRACTED = '{"lhs_batch_dimensions":["0"],"lhs_contracting_dimensions":["1"]}'


@pytest.mark.parametrize(
    ("call", "work"),
    [
        (
            f"(f32[8,6,6,32]{{}}, u8[99]) custom-call(%x, %k), {WINDOW},"
            ' custom_call_target="__cudnn$convForward"',
            Work(CONVOLVED, MOVED, "f32"),
        ),
        (
            f"(f32[32,9,9,4]{{}}, u8[99]) custom-call(%x, %y), {WINDOW},"
            ' custom_call_target="__cudnn$convBackwardFilter"',
            Work(CONVOLVED, MOVED, "f32"),
        ),
        (
            f"(f32[8,20,20,4]{{}}, u8[99]) custom-call(%y, %k), {WINDOW},"
            ' custom_call_target="__cudnn$convBackwardInput",'
            " operand_precision={highest,highest}",
            Work(CONVOLVED, MOVED, "f32", is_precise=True),
        ),
        (
            "(f32[5,16,24]{}, s8[33554432]) custom-call(%a, %b),"
            ' custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
            f'{{"dot_dimension_numbers":{CONTRACTED},"precision_config":'
            '{"operand_precision":["HIGHEST","DEFAULT"]}}}',
            Work(
                2 * 5 * 16 * 24 * 64,
                4 * 5 * 64 * 16 + 2 * 5 * 64 * 24 + 4 * 5 * 16 * 24,
                "f32",
                True,
            ),
        ),
        ('f32[2] custom-call(%a, %b), custom_call_target="__cudnn$fmhaSoftmax"', None),
        ('f32[2] custom-call(%a, %b), custom_call_target="mosaic_gpu_v2"', None),
        (
            '(f32[2], bf16[3,5]) custom-call(%b, %a), custom_call_target="mosaic_gpu_v2",'
            ' frontend_attributes={capsjax_flops="3.77487e+08"}, metadata={op_name="f"}',
            Work(3.77487e8, 2 * 5 * 64 * 24 + 4 * 5 * 64 * 16 + 4 * 2 + 2 * 3 * 5, "bf16"),
        ),
    ],
)
def test_work_of_calls(call, work):
    part = Module(CALLS.format(call=call)).entry
    assert call_work(part, part.root) == work


def test_the_least_time_is_that_of_operations_or_of_bytes():
    assert Work(989.5e12, 1.0, "bf16").seconds(H200) == 1
    assert Work(494.5e12, 1.0, "f32").seconds(H200) == 1
    assert Work(67e12, 1.0, "f32", is_precise=True).seconds(H200) == 1
    assert Work(1.0, 4.8e12, "bf16").seconds(H200) == 1
    assert Work(1.0, 1.0, "c64").seconds(H200) is None


def test_gpus_are_known_by_the_names_that_devices_have():
    assert known_gpu("NVIDIA H200") is H200
    assert known_gpu(H200.name) is H200
    assert known_gpu("NVIDIA GeForce RTX 4090") is None
    assert known_gpu("") is None


def test_a_row_shows_kernels_and_the_estimate(tmp_path):
    hlo = read_program(TEXT.replace("__cudnn$convForward", "mosaic_gpu_v2"), gpu=H200)
    row = Row(cell="f @ h200", workload="mine:f", parameters={}, target="h200", hlo=hlo)
    append_rows(tmp_path / "rows.jsonl", [row])
    assert read_rows(tmp_path / "rows.jsonl") == [row]
    screen = Console(width=160, record=True, file=io.StringIO())
    screen.print(rows_table([row]))
    shown = screen.export_text()
    assert "est. ms: an untuned estimate" in shown
    assert "0.023+" in shown
    write_report([row], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for text in (
        "<td>7 fusion, 5 copy, 3 gemm, 1 custom call</td>",
        "<td>3, ?</td>",
        "<h2>Time on GPUs, estimated</h2>",
        "<h2>Estimated time by source line: f @ h200</h2>",
        "not counted: custom-call mosaic_gpu_v2 (1 times).",
    ):
        assert text in page


def test_the_guide_has_the_recorded_figures():
    guide = (DOCS / "guides" / "benchmarking-xla.md").read_text()
    rows = {row.cell: row for row in read_rows(DOCS / "results" / "epyc-2-cores" / "gpus.jsonl")}
    lines = (DOCS / "results" / "h200" / "kernels.jsonl").read_text().splitlines()
    for measured in map(json.loads, lines):
        counts = rows[measured["cell"]].counts
        estimate, found = 1e3 * counts["estimate"], measured["microseconds"] / 1e3
        figures = (
            f"{counts['kernels']:g} | {measured['launches']:.0f} | {estimate:.3f} | {found:.3f}"
            f" | {estimate / found - 1:+.0%} |"
        )
        assert figures in guide
    lines = (DOCS / "results" / "epyc-2-cores" / "train_steps.jsonl").read_text().splitlines()
    # Later steps have other kernels than those that were measured.
    estimates_ms = {
        row["cell"]: f"{1e3 * row['hlo']['kernels']['seconds']['total'] / 17:.3f}"
        for row in map(json.loads, lines)
        if row["environment"]["capsjax"].endswith("+69ccbe7")
    }
    lines = (DOCS / "results" / "h200" / "gpu.jsonl").read_text().splitlines()
    profiles = [row for row in map(json.loads, lines) if row["time"] == "2026-11-27T17:20:17Z"]
    for dtype, row in zip(("bfloat16", "float32"), profiles, strict=True):
        estimate = estimates_ms[f"train_steps preset=paper dtype={dtype} @ h200"]
        found = 1e3 * row["profile"]["seconds"] / 32
        assert row["parameters"]["dtype"] == dtype
        assert f"{estimate} ms in {dtype}" in guide
        assert f"{found:.3f}" in guide
        assert f"{float(estimate) / found - 1:+.0%}" in guide
    for scaling in estimate_scaling(rows.values()):
        for step in scaling.steps:
            cells = (scaling.generation, scaling.kind, *estimates.cells(scaling, step))
            assert f"| {' | '.join(cells)} |" in guide


# A mapped step over the GPUs of two absent hosts, with a product, a convolution and a loop.
WITHOUT_A_GPU = """
import json, sys
import jax, jax.numpy as jnp
from capsjax.bench import known_gpu, parse_target, read_program
from capsjax.training import make_driver

def step(params):
    def loss(p):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["a"]), p["a"])
        x = x.reshape(16, 8, 8, -1)
        y = jax.lax.conv(x, p["k"], (1, 1), "VALID")
        return jnp.sum(y * y)
    return jax.lax.pmean(jax.grad(loss)(params), "batch")

devices = parse_target(sys.argv[1]).devices()
mapped = make_driver("pmap", devices=devices).compile(step)
shapes = {"a": (256, 256), "k": (16, 8, 3, 3)}
params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
text = mapped.func.lower(*mapped.args, params).compile().as_text()
program = read_program(text, gpu=known_gpu(devices[0].device_kind))
print(json.dumps({
    "processes": len({device.process_index for device in devices}),
    "launches": program.kernels.launches,
    "cuts": program.kernels.graph_cuts,
    "seconds": program.kernels.seconds.total,
    "missing": program.kernels.seconds.without_estimate,
    "trips": [loop.trip_count for loop in program.loops],
    "summed": program.collectives["all-reduce"].bytes,
}))
"""


@pytest.mark.skipif(read_environment().cuda_plugin is None, reason="needs jax's plugin for CUDA")
@pytest.mark.parametrize("name", ["a100:16", "b200:16"])
def test_the_gpu_s_compiler_without_a_gpu(name):
    target = parse_target(name)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_GPU, name],
        env={**os.environ, **target.environment, "XLA_FLAGS": " ".join(target.xla_flags)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["processes"] == 2
    assert {"fusion", "gemm", "cudnn", "collective"} <= found["launches"].keys()
    assert found["cuts"] >= 2  # the convolution and its gradients
    assert found["seconds"] > 0
    assert "all-reduce" in "".join(found["missing"])
    assert found["trips"] == [3, 3]
    assert found["summed"] == 4 * (256 * 256 + 16 * 8 * 3 * 3)
