"""Cells in fresh processes: what is cold and warm, what fails, what is kept, the page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capsjax.bench import Plan, read_rows, run_cells, suite_cells, write_report
from capsjax.bench.cells import make_cells, sweep
from capsjax.bench.config import BenchConfig, BenchError
from capsjax.bench.rows import RowError
from capsjax.bench.running import remaining
from capsjax.cli import main

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of a cell that works and of one whose function raises, two processes each."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "broken_for_bench.py").write_text("def f(x):\n    raise ValueError('no such luck')\n")
    cells = make_cells(sweep("squash", {"batch": [2]}), ["cpu"], ())
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(folder))
    try:
        cells += make_cells([("broken_for_bench:f", {"shapes": "f32[3]"})], ["cpu"], ())
        plan = Plan(
            output=folder / "rows.jsonl",
            repetitions=2,
            run_seconds=0.05,
            timeout=120,
            hlo=folder / "hlo",
        )
        run_cells(cells, plan)
    finally:
        sys.path.remove(str(folder))
    return folder, cells, read_rows(plan.output)


def test_stages_add_up_and_cold_is_cold(measured):
    _, _, (row, _) = measured
    assert row["status"] == "ok"
    for number, wall in enumerate(row["wall_seconds"]):
        # The program is read in the first process only.
        stages = {name: v[number] for name, v in row["stages"].items() if number < len(v)}
        assert sum(stages.values()) == pytest.approx(wall, abs=1e-3)
        assert min(stages.values()) >= 0
    assert {"trace", "lower", "compile", "load", "run"} <= set(row["stages"])
    assert row["cache"]["hits_cold"] == 0
    assert row["cache"]["hits_warm"] == 1
    assert row["cache"]["entries"] >= 1
    assert len(row["stages"]["compile"]) == len(row["run"]["medians"]) == 2
    assert row["run"]["roofline"]["fraction"] > 0


def test_what_fails_is_a_row_with_its_reason(measured):
    *_, row = measured[2]
    assert row["status"] == "failed"
    assert row["error"] == {"stage": "trace", "type": "ValueError", "message": "no such luck"}


def test_what_does_not_fit_into_memory_is_a_row_and_the_others_go_on(tmp_path):
    plan = Plan(output=tmp_path / "rows.jsonl", repetitions=1, run_seconds=0.05, timeout=120)
    run_cells(make_cells(sweep("squash", {"batch": [10**8, 2]}), ["cpu"], ()), plan)
    too_large, fits = read_rows(plan.output)
    assert too_large["error"]["type"] == "MemoryError"
    message = too_large["error"]["message"]
    assert re.match(r"out of memory: needs 7[0-9.]+ GB, [0-9.]+ GB are free", message)
    assert fits["status"] == "ok"


def test_the_texts_that_were_judged_are_kept(measured):
    folder, cells, (row, _) = measured
    name = cells[0].file_name
    assert (folder / "hlo" / f"{name}.hlo.txt").read_text().startswith("HloModule")
    assert "stablehlo" in (folder / "hlo" / f"{name}.stablehlo.mlir").read_text()
    assert row["hlo"]["instructions"] > 1


def test_a_cut_off_run_goes_on_with_what_it_has(measured, tmp_path):
    folder, cells, _ = measured
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text(lines[0] + lines[1][:40])
    assert remaining(cells, cut) == cells[1:]
    other = json.loads(lines[0])
    other["base_environment"]["jax"] = "0.1"
    cut.write_text(json.dumps(other) + "\n")
    with pytest.raises(RowError, match=r"was measured with jax 0.1, here it is"):
        remaining(cells, cut)


def test_killed_half_way_nothing_is_left_running(tmp_path):
    output = tmp_path / "rows.jsonl"
    code = "from capsjax.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "bench",
        "--workload",
        "squash",
        "--set",
        "batch=2,3",
        "--repetitions",
        "1",
        "--run-seconds",
        "0",
        "--output",
        str(output),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    ) as process:
        limit = time.monotonic() + 120
        while not output.exists() and time.monotonic() < limit:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert f"--resume --output {output}" in said
    assert len(read_rows(output)) == 1


def test_suites_and_options_that_do_not_go_together():
    assert {cell.target for cell in suite_cells("quick", [])} == {"cpu", "cpu:8"}
    assert suite_cells("pod", [])[0].key == "pmap_train_step preset=paper @ v5e-256"
    flags = suite_cells("hotos", ["cpu"], ["", "--xla_cpu_enable_fast_math=true"])
    assert len({cell.key for cell in flags}) == len(flags)
    for options, said in (
        ({"set": ("a=1",)}, "--set goes with --workload"),
        ({"resume": True}, "--resume needs --output"),
        ({"repetitions": 0}, "--repetitions must be at least 1, got 0"),
        ({"workload": "squash", "shape": ("f32[3]",)}, "--shape goes with --workload module"),
    ):
        with pytest.raises(BenchError, match=said):
            BenchConfig(**options)
    with pytest.raises(BenchError, match="--set must be like iterations=1,3, got 'batch'"):
        BenchConfig(workload="squash", set=("batch",)).cells()


def test_sets_of_flags_are_swept_though_they_begin_with_dashes(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    swept = []
    monkeypatch.setattr("capsjax.cli.run_cells", lambda cells, plan, **_: swept.extend(cells))
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
    for arguments, said in (
        (["--workload", "rooting"], "workload must be one of"),
        (["--target", "v9-8"], "among v4"),
        (["--output", str(there)], "is there already"),
        (["--output", "none/rows.jsonl"], "no directory none"),
        (["--workload", "nowhere:f", "--shape", "f32[3]"], "No module named 'nowhere'"),
        (["nosuch"], "invalid choice 'nosuch'"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["bench", *arguments])
        assert done.value.code not in (0, None)
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert said in error
    assert list(tmp_path.iterdir()) == [there]


def test_the_page_shows_the_numbers_without_a_network(measured, tmp_path):
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser, {CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api")
    rows = measured[2]
    swept = []
    for number, iterations in enumerate((1, 3, 5), 1):
        row = json.loads(json.dumps(rows[0]))
        row |= {
            "workload": "routing",
            "parameters": {"iterations": iterations},
            "cell": f"routing iterations={iterations} @ cpu",
        }
        row["stages"]["compile"] = [0.25 * number]
        swept.append(row)
    page = tmp_path / "page.html"
    write_report([*rows, *swept], page, title="a title")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        opened = browser.new_page(viewport={"width": 390, "height": 800})
        asked, errors = [], []
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(page.as_uri())
        opened.wait_for_selector("#figure-0 .plot-container", timeout=20_000)
        drawn = opened.evaluate(
            "() => document.getElementById('figure-0').data.map(t => [[...t.x], [...t.y]])"
        )
        table = opened.inner_text("#cells")
        width = opened.evaluate("() => document.documentElement.scrollWidth")
        browser.close()
    assert drawn == [[[1, 3, 5], [0.25, 0.5, 0.75]]]
    assert "no such luck" in table
    assert f"{1e3 * rows[0]['run']['median_seconds']:.3f}" in table
    assert errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert width <= 390
