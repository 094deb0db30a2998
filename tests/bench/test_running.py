"""Cells in processes: cold and warm stages, failures, alternation, what is kept, the page."""

import dataclasses
import importlib
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from capsjax import routing
from capsjax.bench import (
    Cost,
    Cycles,
    Estimate,
    Failure,
    Kernels,
    Plan,
    Program,
    Row,
    append_rows,
    read_rows,
    run_cells,
    suite_cells,
    write_report,
)
from capsjax.bench.cells import make_cells, sweep
from capsjax.bench.command import select_cells
from capsjax.bench.config import BenchConfig
from capsjax.bench.processes import measure, roofline, runner
from capsjax.bench.processes.roofline import Roofline
from capsjax.bench.workloads.workload import JaxFunction
from capsjax.cli import main
from capsjax.errors import ConfigError, DataError

CHROMIUM = Path("/usr/bin/chromium")
ROOFLINE = Roofline(1e10, 1e10)
real_call = runner._call


def without_roofline(function, *rest):
    """Saves a process."""
    return ROOFLINE if function is runner._measure_roofline else real_call(function, *rest)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """Writes a module that this process and those that it starts can import."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    return write


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of a cell in two processes of its own."""
    folder = tmp_path_factory.mktemp("bench")
    cells = make_cells(sweep("squash", {"batch": [2]}), ["cpu"])
    plan = Plan(
        output=folder / "rows.jsonl",
        repetitions=2,
        run_seconds=0.05,
        timeout=120,
        hlo=folder / "hlo",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_call", without_roofline)
        run_cells(cells, plan)
    return folder, cells, read_rows(plan.output)


def test_stages_add_up_and_cold_is_cold(measured):
    (row,) = measured[2]
    assert row.status == "ok"
    for number, wall in enumerate(row.wall_seconds):
        # The program is read in the first process only.
        stages = {name: v[number] for name, v in row.stages.items() if number < len(v)}
        assert sum(stages.values()) == pytest.approx(wall, abs=1e-6)
        assert min(stages.values()) >= 0
    assert {"trace", "lower", "compile", "load", "run"} <= set(row.stages)
    assert row.cache["hits_cold"] == 0
    assert row.cache["hits_warm"] == 1
    assert row.cache["entries"] >= 1
    assert len(row.stages["compile"]) == len(row.run.medians) == 2
    assert row.run.roofline.fraction > 0


def test_what_fails_is_a_row_with_its_reason(in_this_process, importable, tmp_path):
    importable("broken_for_bench", "def f(x):\n    raise ValueError('no such luck')\n")
    cells = make_cells([("broken_for_bench:f", {"shapes": "f32[3]"})], ["cpu"])
    run_cells(cells, Plan(output=tmp_path / "rows.jsonl"))
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert (row.status, row.repetitions) == ("failed", 0)
    assert dataclasses.astuple(row.error) == ("trace", "ValueError", "no such luck")


def test_a_failure_is_an_exit_code_and_is_tried_again(
    in_this_process, importable, tmp_path, capsys
):
    output, module = tmp_path / "rows.jsonl", "failing_for_bench"
    importable(module, "def f(x):\n    raise ValueError('no such luck')\n")
    options = ["--workload", f"{module}:f", "--shape", "f32[3]", "--output", str(output)]
    options += ["--no-report", "--repetitions", "1", "--run-seconds", "0"]
    with pytest.raises(SystemExit) as done:
        main(["bench", *options])
    assert done.value.code == 1
    sys.modules[module].f = lambda x: x + 1
    main(["bench", *options, "--resume"])
    (row,) = read_rows(output)
    assert row.status == "ok"
    capsys.readouterr()


def test_a_process_that_dies_has_its_reason():
    found = runner._call(signal.raise_signal, signal.SIGKILL, dict(os.environ), 60)
    assert (found.stage, found.type) == ("process", "died")
    assert "killed by SIGKILL" in found.message


def test_a_process_that_takes_too_long_is_killed():
    assert runner._call(time.sleep, 600, dict(os.environ), 0.1).type == "timeout"


def test_the_roofline_is_measured(monkeypatch):
    monkeypatch.setattr(roofline, "_SIDE", 64)
    monkeypatch.setattr(roofline, "_NUMBERS", 2**16)
    assert min(dataclasses.astuple(runner._measure_roofline("cpu"))) > 0


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_programs_of_another_compiler_have_rows_too(in_this_process, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_PAUSE", 0.0)
    sizes = {"batch": 1, "channels": 2, "out": 2, "size": 7}
    plan = Plan(output=tmp_path / "rows.jsonl", repetitions=1, run_seconds=0.01)
    run_cells(make_cells([("hotos_gcc", sizes)], ["cpu"]), plan)
    (row,) = read_rows(plan.output)
    assert row.command.startswith("gcc -O3 -fopenmp")
    # 2 operations for each of 4^3 products, 3 x 3 positions of kernel and grid, 2 x 2 types.
    assert row.hlo.cost.flops == 2 * 64 * 9 * 9 * 4
    assert row.run.roofline.fraction > 0
    assert set(row.stages) >= {"build", "compile", "run"}


def test_what_does_not_fit_into_memory_is_a_row_and_the_others_go_on(in_this_process, tmp_path):
    plan = Plan(output=tmp_path / "rows.jsonl", repetitions=1, run_seconds=0.05)
    run_cells(make_cells(sweep("squash", {"batch": [10**8, 2]}), ["cpu"]), plan)
    too_large, fits = read_rows(plan.output)
    assert too_large.error.type == "MemoryError"
    message = too_large.error.message
    assert re.match(r"out of memory: needs 7[0-9.]+ GB, [0-9.]+ GB are free", message)
    assert fits.status == "ok"


def test_the_texts_that_were_read_are_kept(measured):
    folder, cells, (row,) = measured
    name = cells[0].file_name
    assert (folder / "hlo" / f"{name}.hlo.txt").read_text().startswith("HloModule")
    assert "stablehlo" in (folder / "hlo" / f"{name}.stablehlo.mlir").read_text()
    assert row.hlo.instructions > 1


@pytest.fixture
def partial():
    """The name of an algorithm with an implementation that no platform has."""

    def function(votes, *, where=None):
        return routing.Routed(votes.sum(-3), votes[..., 0, :, 0], None)

    def fused(poses, weights, *, implementation):
        if implementation == "blocked":
            raise NotImplementedError("'blocked' is for toasters only")
        return function(jnp.einsum("bik,ikjd->bijd", poses, weights))

    record = routing.Algorithm(name="partial", function=function, paper="", fused=fused)
    routing.register(record)
    yield record.name
    routing.unregister(record.name)


def test_cells_that_differ_in_one_parameter_run_in_alternation(
    in_this_process, partial, tmp_path, capsys
):
    output = tmp_path / "rows.jsonl"
    settings = ["batch=2", "children=6", f"algorithm={partial}"]
    compared = ["direction=forward,gradient", "implementation=blocked,reference,default"]
    options = ["--alternate", "implementation", "--run-seconds", "0.01", "--output", str(output)]
    main(["bench", "--workload", "routing", "--set", *settings, *compared, *options, "--no-report"])
    rows = read_rows(output)
    for blocked, reference, default in (rows[:3], rows[3:]):
        assert blocked.error.message == "'blocked' is for toasters only"
        assert blocked.alternation.ratio is None
        # The base is the first that does not fail.
        assert {row.alternation.base for row in (reference, default)} == {reference.cell}
        assert (reference.alternation.ratio, reference.alternation.temporaries) == (1.0, 1.0)
        pairs = zip(default.run.calls[0], reference.run.calls[0], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        assert ratios[0] <= default.alternation.ratio <= ratios[-1]
        assert default.cache["hits_cold"] == 0  # though it is the same program
    out = capsys.readouterr().out
    assert "toasters" in out
    assert f"{1e3 * rows[1].run.median_seconds:.3f}" in out
    assert "MB ratio" in out


def test_all_values_are_compared_where_none_is_named():
    cells = select_cells(BenchConfig(workload="hotos", alternate="formulation"))
    formulations = ["einsum", "patches", "conv", "shifts"]
    assert [dict(cell.parameters)["formulation"] for cell in cells] == formulations
    with pytest.raises(ConfigError, match="'hotos' has no parameter 'colour', only formulation"):
        select_cells(BenchConfig(workload="hotos", alternate="colour"))
    with pytest.raises(ConfigError, match="--alternate: no two cells differ only in 'colour'"):
        select_cells(BenchConfig(suite="hotos", alternate="colour"))


def estimated(total, without=()):
    cycles = Cycles(total, {}, dict.fromkeys(without, 2.0))
    hlo = Program(cost=Cost(1.0), cycles=cycles)
    return Row(cell="a", workload="squash", parameters={}, target="v5e-1", hlo=hlo)


def test_ratios_are_of_cycles_where_nothing_ran():
    base = estimated(10.0, ["copy-start"])
    assert runner._beside(estimated(5.0), base).ratio == 0.5
    # Kernels have no estimate and must not count as nothing.
    assert runner._beside(estimated(5.0, ["custom-call tpu_custom_call"]), base).ratio is None


def test_ratios_are_of_seconds_on_absent_gpus():
    def on_a_gpu(total, without=()):
        kernels = Kernels({"fusion": 1.0}, 0.0, Estimate(total, {}, dict.fromkeys(without, 2.0)))
        hlo = Program(kernels=kernels)
        return Row(cell="a", workload="squash", parameters={}, target="h100", hlo=hlo)

    base = on_a_gpu(2e-3, ["all-reduce-start"])
    assert runner._beside(on_a_gpu(1e-3), base).ratio == 0.5
    assert runner._beside(on_a_gpu(1e-3, ["custom-call mosaic_gpu_v2"]), base).ratio is None


def test_a_donated_argument_is_replaced_by_the_result():
    function = jax.jit(lambda state, x: (state + x, state.sum()), donate_argnums=0)
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    make = lambda: (jnp.zeros(3), jnp.ones(3))  # noqa: E731
    built = JaxFunction(function, (shape, shape), make, donated=0)
    target = runner.parse_target("cpu")
    call = measure._caller(built, function, target, measure.Measurement())()
    assert [float(call()[1]) for _ in range(3)] == [0, 3, 6]


def test_a_cut_off_run_goes_on_with_what_it_has(measured, tmp_path):
    folder, cells, rows = measured
    whole = (folder / "rows.jsonl").read_text()
    plan = Plan(output=tmp_path / "cut.jsonl")
    plan.output.write_text(whole + whole[:40])
    more = [*cells, *make_cells(sweep("squash", {"batch": [3]}), ["cpu"])]
    assert runner.remaining(more, plan) == more[1:]
    # A group is measured as a whole.
    assert runner.remaining(more, dataclasses.replace(plan, alternate="batch")) == more
    there = {**rows[0].base_environment, "jax": "0.1"}
    append_rows(plan.output, [dataclasses.replace(rows[0], base_environment=there)])
    with pytest.raises(DataError, match=r"was measured with jax 0.1, but here it is"):
        runner.remaining(cells, plan)


BLOCKING = """
import os, pathlib, time

def f(x):
    pathlib.Path({marker!r}).write_text(str(os.getpid()))
    time.sleep(600)
"""


def test_stopped_half_way_nothing_is_left_behind(
    measured, importable, tmp_path, monkeypatch, capsys
):
    marker, output, folders = (tmp_path / name for name in ("marker", "rows.jsonl", "folders"))
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    importable("blocking_for_bench", BLOCKING.format(marker=str(marker)))
    output.write_text((measured[0] / "rows.jsonl").read_text())
    monkeypatch.setattr(runner, "_call", without_roofline)

    is_running = threading.Event()

    def stop():
        while is_running.is_set():
            if marker.exists() and marker.read_text():
                os.kill(os.getpid(), signal.SIGTERM)
                break
            time.sleep(0.05)

    def exit_at_once(code):
        raise SystemExit(code)

    monkeypatch.setattr("capsjax.process.exit_at_once", exit_at_once)
    is_running.set()
    threading.Thread(target=stop, daemon=True).start()
    workload = ["--workload", "blocking_for_bench:f", "--shape", "f32[3]"]
    try:
        with pytest.raises(SystemExit) as done:
            main(["bench", *workload, "--resume", "--output", str(output)])
    finally:
        is_running.clear()  # nothing would catch the signal
    assert done.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
    assert list(folders.iterdir()) == []
    told = capsys.readouterr()
    assert f"--resume --output {output}" in told.out
    assert told.err == "capsjax bench: error: interrupted\n"
    assert len(read_rows(output)) == 1


def test_suites_and_options_that_do_not_go_together():
    assert {cell.target for cell in suite_cells("quick", [])} == {"cpu", "cpu:8"}
    first = "pmap_train_step preset=paper dtype=bfloat16 batch=128 @ v5e-256"
    assert suite_cells("pod", [])[0].key == first
    flags = suite_cells("hotos", ["cpu"], ["", "--xla_cpu_enable_fast_math=true"])
    assert len({cell.key for cell in flags}) == len(flags)
    for options, message in (
        ({"set": ("a=1",)}, "--set needs --workload"),
        ({"resume": True}, "--resume needs --output"),
        ({"repetitions": 0}, "--repetitions must be at least 1, got 0"),
        ({"workload": "squash", "shape": ("f32[3]",)}, "--shape needs --workload module"),
        ({"run_seconds": math.nan}, "--run-seconds must be finite, at least 0, got nan"),
        ({"run_seconds": -1.0}, "--run-seconds must be finite, at least 0, got -1"),
        ({"timeout": math.inf}, "--timeout must be finite and positive, got inf"),
        ({"output": Path("zz.html")}, "--output is for rows, .* got zz.html"),
    ):
        with pytest.raises(ConfigError, match=message):
            BenchConfig(**options)
    with pytest.raises(ConfigError, match="--set must be like iterations=1,3, got 'batch'"):
        select_cells(BenchConfig(workload="squash", set=("batch",)))


def test_sets_of_flags_are_swept_though_they_begin_with_dashes(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    swept = []
    monkeypatch.setattr(
        "capsjax.bench.command.run_cells", lambda cells, plan, **_: swept.extend(cells)
    )
    plan = tmp_path / "rows.jsonl"
    plan.write_text("")
    options = ["--resume", "--output", str(plan), "--workload", "squash", "--no-report"]
    flags = ["", "--xla_a=1", "--xla_b=2 --xla_c=3"]
    main(["bench", "--xla-flag", *flags, *options])
    assert [cell.xla_flags for cell in swept] == [(), ("--xla_a=1",), ("--xla_b=2", "--xla_c=3")]
    swept.clear()
    main(["bench", *options, "--xla-flag=--xla_a=1"])
    assert [cell.xla_flags for cell in swept] == [("--xla_a=1",)]
    capsys.readouterr()


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there.jsonl"
    there.write_text("")
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "exits_for_bench.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for arguments, message in (
        (["--workload", "rooting"], "workload must be one of"),
        (["--target", "v9-8"], "generation v4"),
        (["--output", str(there)], "exists already"),
        (["--output", "none/rows.jsonl"], "no directory none"),
        (["--output", "page.html"], "--output is for rows, not for the HTML report"),
        (["--workload", "nowhere:f", "--shape", "f32[3]"], "No module named 'nowhere'"),
        (["nosuch"], "train, got 'nosuch'"),
        (["--output", "mine.jsonl"], "the report mine.html exists already"),
        (["--workload", "exits_for_bench:f"], "module 'exits_for_bench' calls sys.exit"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["bench", *arguments])
        assert done.value.code == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert message in error
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture
def page(measured, tmp_path):
    """A page of a run, of a sweep, of an absent TPU and of a failure."""
    rows = [*measured[2], estimated(2e6, ["copy-start"])]
    rows += [
        dataclasses.replace(
            rows[0],
            workload="routing",
            parameters={"iterations": iterations},
            cell=f"routing iterations={iterations} @ cpu",
            stages={"compile": (0.25 * number,)},
        )
        for number, iterations in enumerate((1, 3, 5), 1)
    ]
    rows.append(
        Row(
            cell="failed @ cpu",
            workload="squash",
            parameters={},
            target="cpu",
            status="failed",
            error=Failure("trace", "ValueError", "no such luck"),
        )
    )
    path = tmp_path / "page.html"
    write_report(rows, path, title="a title")
    return path


def test_the_page_shows_every_row(measured, page):
    text = page.read_text()
    for expected in (
        "<h1>a title</h1>",
        f"<td>{1e3 * measured[2][0].run.median_seconds:.3f}</td>",
        "<td>2.000+</td>",
        "trace: no such luck",
        "copy-start (2 times)",
    ):
        assert expected in text, expected


def test_the_page_draws_without_a_network(page):
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser, {CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        opened = browser.new_page(viewport={"width": 390, "height": 800})
        asked, errors = [], []
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(page.as_uri())
        opened.wait_for_selector("#figure-0 .plot-container", timeout=120_000)
        drawn = opened.evaluate(
            "() => document.getElementById('figure-0').data.map(t => [[...t.x], [...t.y]])"
        )
        width = opened.evaluate("() => document.documentElement.scrollWidth")
        browser.close()
    assert drawn == [[[1, 3, 5], [0.25, 0.5, 0.75]]]
    assert errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert width <= 390
