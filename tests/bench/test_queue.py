"""The queue of measurements on a GPU: what is measured, checked, left out and said."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from capsjax.bench import (
    Failure,
    Kernel,
    Profile,
    Row,
    Run,
    append_rows,
    make_workload,
    read_environment,
    read_rows,
)
from capsjax.bench.processes import checking, profile

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_gpu.py"
SMALL = ["--preset", "small", "--batch", "2", "--dtypes", "float32", "--items", "conv"]


@pytest.fixture(scope="module")
def queue():
    """The script."""
    spec = importlib.util.spec_from_file_location("measure_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(queue, in_this_process, tmp_path, monkeypatch, capsys):
    """Runs the queue on the CPU, on two implementations of one convolution."""
    monkeypatch.setattr(queue, "implementations", lambda *_: ["patches", "xla"])
    options = [*SMALL, "--output", str(tmp_path / "rows.jsonl"), "--run-seconds", "0.01"]

    def run(*more):
        code = queue.main([*options, "--platform", "cpu", *more])
        return code, capsys.readouterr().out

    return run


def test_goes_on_where_it_was(run, tmp_path):
    output = tmp_path / "rows.jsonl"
    code, said = run()
    assert code == 0
    assert said.startswith("0 of 1 groups are recorded")
    assert said.count("deviation ") == 2
    rows = read_rows(output)
    assert [row.parameters["implementation"] for row in rows] == ["patches", "xla"]
    assert all(0 < row.deviation.found < row.deviation.allowed for row in rows)
    assert all(row.run.median_seconds > 0 for row in rows)
    kept = output.read_bytes()
    code, said = run()
    assert (code, output.read_bytes()) == (0, kept)
    assert said.startswith("1 of 1 groups are recorded")
    # What another commit has measured has to be measured for this one.
    append_rows(output, [dataclasses.replace(rows[0], base_environment={"capsjax": "0.0.0"})])
    assert run()[1].startswith("0 of 1 groups are recorded")
    assert len(output.read_text().splitlines()) == 5


def test_begins_nothing_that_the_time_does_not_suffice_for(run, tmp_path):
    code, said = run("--seconds", "10")
    assert code == 1
    assert "no time for 1 groups: run again to continue" in said
    assert not (tmp_path / "rows.jsonl").exists()


def test_no_gpu_is_one_line(queue, in_this_process, tmp_path, capsys):
    assert queue.main(["--output", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "needs a GPU in this machine" in error


def test_unknown_items_are_named(queue, capsys):
    with pytest.raises(SystemExit):
        queue.parse(["--output", "rows.jsonl", "--items", "nothing"])
    assert "--items must be among routing, primary, steps, " in capsys.readouterr().err


def made(implementation, seconds=(), error=None):
    """A row of the train step, of this commit."""
    run = seconds and Run(
        median_seconds=sorted(seconds)[len(seconds) // 2],
        least_seconds=min(seconds),
        most_seconds=max(seconds),
        first_seconds=(1.0,),
        medians=(1.0,),
        calls=(seconds,),
    )
    return Row(
        cell=implementation,
        workload="train_step",
        parameters={"implementation": implementation},
        target="gpu",
        status="failed" if error else "ok",
        error=error,
        run=run or None,
        base_environment={"capsjax": read_environment().capsjax},
    )


def test_what_was_stopped_is_measured_again_and_what_fails_is_not(queue):
    commit = read_environment().capsjax
    assert queue.is_done(made("default", (1.0,)), commit)
    assert not queue.is_done(made("default"), commit)
    assert not queue.is_done(made("default", error=Failure("process", "timeout", "no")), commit)
    assert queue.is_done(made("default", error=Failure("compile", "E", "no")), commit)


def test_times_and_launches_are_per_step(queue):
    kernels = Profile(seconds=0.5, launches=40.0, kernels=(Kernel("gemm", 2e-4, 20.0),))
    row = dataclasses.replace(made("default", (0.1, 0.2, 0.3)), profile=kernels)
    said = queue.describe(dataclasses.replace(row, parameters={"steps": 10, "seeds": 2}))
    assert "20.000 ms (10.000-30.000) per step, 0.100 s per seed, 4 launches per step" in said
    assert "20.0 us in 2 launches: gemm" in said


def test_the_ratio_is_to_the_fastest_of_pytorch(queue):
    rows = [
        made("default", (1.0, 2.0, 9.0)),
        made("torch", (5.0, 5.0, 5.0)),
        made("torch.graph", (2.0, 4.0, 4.0)),
        made("torch.compile", error=Failure("compile", "TimeoutError", "no")),
    ]
    assert queue.ratio_to_best(rows) == "default takes 0.50 of the time of torch.graph"
    assert queue.ratio_to_best(rows[:1]).startswith("no ratio")


def test_kernels_are_those_of_the_streams_of_gpus():
    def line(name, *events):
        return SimpleNamespace(
            name=name, events=[SimpleNamespace(name=n, duration_ns=ns) for n, ns in events]
        )

    stream = line("Stream #7", ("gemm", 4000.0), ("add", 1000.0), ("gemm", 6000.0))
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=[stream, line("XLA Ops", ("add", 1000.0))]),
        SimpleNamespace(name="/host:CPU", lines=[line("Stream", ("add", 1000.0))]),
    ]
    found = profile._read([SimpleNamespace(planes=planes)], calls=2)
    assert found.seconds == pytest.approx(5.5e-6)
    assert found.launches == 1.5
    assert [(k.name, k.launches) for k in found.kernels] == [("gemm", 1.0), ("add", 0.5)]
    assert profile._read([SimpleNamespace(planes=planes[1:])], calls=2) is None


def test_wrong_results_deviate():
    parameters = {"layer": "conv", "preset": "small", "batch": 2}
    built = make_workload("convolution", parameters).build(jax.devices())

    def deviation(factor):
        def wrong(*arrays):
            output, gradients = built.function(*arrays)
            return output, jax.tree.map(lambda x: factor * x, gradients)

        return checking.measure_deviation("convolution", parameters, built, wrong)

    assert deviation(1.0).found < deviation(1.0).allowed
    assert deviation(1.1).found == pytest.approx(0.1, rel=1e-2)
    with pytest.raises(FloatingPointError, match="a result is not finite"):
        deviation(float("nan"))
