"""The commands as a user runs them: real processes, real signals, real bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from capsjax.cli import main

SCRIPTS = Path(__file__).parents[1] / "scripts"
# Short steps, many of them: 200 training images are left, 12 steps an epoch.
RUN = ["--batch-size", "16", "--validation", "3800", "--log-every", "2"]


def environment(devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "COLUMNS": "80"}


def script(name, *arguments, devices=1, before=()):
    command = [*before, sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command, env=environment(devices), capture_output=True, text=True, timeout=300
    )


def one_line(stderr, prog):
    """The error of a command: its last line, and no traceback before it."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if f"{prog}: error: " in line]
    assert lines == stderr.splitlines()[-1:]
    return lines[0]


def newest(run_dir):
    manager = ocp.CheckpointManager(
        run_dir / "checkpoints", item_handlers=ocp.StandardCheckpointHandler()
    )
    step = manager.latest_step()
    state = manager.restore(step)
    manager.close()
    return step, state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = script("train", *RUN, "--steps", 40, "--checkpoint-every", 10, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    return run, done


def test_a_run_ends_with_a_test_error_and_a_picture(uninterrupted):
    run, done = uninterrupted
    lines = done.stdout.splitlines()
    assert lines[0].startswith("test error: ")
    assert lines[0].endswith("of 1,000 wrong)")
    assert str(run / "reconstructions.png") in done.stdout
    with Image.open(run / "reconstructions.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    assert "validation error" in done.stderr


def test_evaluate_tells_the_same_error(uninterrupted):
    run, done = uninterrupted
    # Also where the batch cannot be split over the devices: it is rounded up.
    evaluated = script("evaluate", run, "--batch-size", 100, devices=8)
    assert evaluated.returncode == 0, evaluated.stderr
    told = evaluated.stdout.splitlines()[0].removeprefix("mnist_5k ")
    assert told == done.stdout.splitlines()[0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_resumes_to_the_same_bits(uninterrupted, tmp_path, how):
    whole, _ = uninterrupted
    run = tmp_path / "run"
    arguments = [*RUN, "--steps", "40", "--checkpoint-every", "10", "--run-dir", str(run)]
    # One step in a call of the devices, so that the signal finds the run in its middle.
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py"), *arguments, "--steps-per-dispatch", "1"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "checkpoints" / "10" / "commit_success.txt").exists():
                break
            time.sleep(0.01)
        process.send_signal(how)
        stdout, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert not (run / "result.json").exists(), "the run ended before the signal came"
    if how == signal.SIGKILL:
        assert process.returncode == -how
    else:
        assert process.returncode == 128 + how
        assert f"stopped by {how.name} at step" in stdout
        assert f"--resume --run-dir {run}" in stdout
    resumed = script("train", "--resume", "--run-dir", run)
    assert resumed.returncode == 0, resumed.stderr
    (step, expected), (resumed_step, state) = newest(whole), newest(run)
    assert step == resumed_step == 40
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_resuming_keeps_the_run_s_options_and_may_lengthen_it(uninterrupted, tmp_path):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], run)
    longer = script("train", "--resume", "--run-dir", run, "--steps", 44)
    assert longer.returncode == 0, longer.stderr
    assert "44 steps of 16, from step 40" in longer.stderr
    assert "trained steps 40 to 44 in" in longer.stdout
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "test"] == [44]
    finished = script("train", "--resume", "--run-dir", run)
    assert finished.returncode == 2
    assert "is finished at step 44; more --epochs or --steps" in one_line(
        finished.stderr, "train.py"
    )
    epochs = script("train", "--resume", "--run-dir", run, "--epochs", 30)
    assert "--epochs has no effect on the run" in one_line(epochs.stderr, "train.py")
    refused = script("train", "--resume", "--run-dir", run, "--seed", 1)
    assert refused.returncode == 2
    assert "--seed must stay 0 to resume the run" in one_line(refused.stderr, "train.py")
    other = script("train", "--resume", "--run-dir", run, "--preset", "paper")
    assert other.returncode == 2
    assert "--preset must stay small" in one_line(other.stderr, "train.py")


def test_a_truncated_checkpoint_is_one_line_and_loses_nothing(uninterrupted, tmp_path):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], run)
    largest = max(
        (run / "checkpoints" / "40").rglob("*"), key=lambda p: p.stat().st_size * p.is_file()
    )
    largest.write_bytes(largest.read_bytes()[:1000])
    for name, arguments in (
        ("evaluate", [run]),
        ("train", ["--resume", "--run-dir", run, "--steps", 50]),
    ):
        failed = script(name, *arguments)
        assert failed.returncode == 2
        line = one_line(failed.stderr, f"{name}.py")
        assert "checkpoints/40 is damaged or truncated" in line
        assert "move it away to use those of step 20, 30" in line
    shutil.move(run / "checkpoints" / "40", tmp_path / "away")
    assert script("evaluate", run).returncode == 0


def test_a_full_disk_is_one_line_and_keeps_what_was_complete(uninterrupted, tmp_path):
    """A limit on the size of a file stands in for a disk without space: both refuse the write."""
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], run)

    arguments = ["--resume", "--run-dir", run, "--steps", 60]
    failed = script("train", *arguments, before=["sh", "-c", 'ulimit -f 100; exec "$@"', "sh"])
    assert failed.returncode == 2
    line = one_line(failed.stderr, "train.py")
    assert "could not be written to" in line
    assert "complete up to step 40" in line
    again = script("train", "--resume", "--run-dir", run, "--steps", 44)
    assert again.returncode == 0, again.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_without_space(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        failed = script("train", *RUN, "--steps", 20, "--run-dir", disk / "run")
        assert failed.returncode in (1, 2)
        assert "No space left on device" in one_line(failed.stderr, "train.py")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_loss_that_is_not_finite_is_one_line(tmp_path):
    failed = script(
        "train", *RUN, "--steps", 20, "--learning-rate", "1e38", "--run-dir", tmp_path / "run"
    )
    assert failed.returncode == 1
    assert "the loss is not finite at step" in one_line(failed.stderr, "train.py")


def test_images_of_another_size_than_the_run_s_are_one_line(uninterrupted, tmp_path):
    for split in ("train", "test"):
        for name in "0123456789":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("L", (32, 32)).save(folder / "a.png")
    failed = script(
        "evaluate", uninterrupted[0], "--dataset", "image_folder", "--data-dir", tmp_path
    )
    assert failed.returncode == 2
    line = one_line(failed.stderr, "evaluate.py")
    assert "data set image_folder has images of 32x32x1, the network takes 28x28x1" in line


BAD = [
    (["train", "--preset", "smal"], "'smal'.*'--preset'.*paper.*small"),
    (["train", "--dataset", "mnits"], "'mnits'.*'--dataset'.*mnist_5k"),
    (["train", "--batch-siz", "3"], "--batch-siz.*perhaps you meant --batch-size"),
    (["train", "--batch-size", "x"], "--batch-size.*'x'"),
    (["train", "--steps", "x"], "--steps cannot be 'x'"),
    (["train", "--test-size", "5"], "--test-size is for data sets whose images are made"),
    (["train", "--no-reconstruction", "--preset", "baseline"], "baseline has no decoder anyway"),
    (["train", "--max-shift", "28"], "--max-shift must be below the images' 28 pixels, got 28"),
    (["train", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["train", "--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
    (["train", "--decay-rate", "2"], "--decay-rate must be above 0 and at most 1, got 2"),
    (["train", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    (["train", "--resume"], "--resume needs --run-dir"),
    (["train", "--resume", "--run-dir", "missing"], "run directory missing does not exist"),
    (["train", "--resume", "--run-dir", "."], "holds no run: config.json missing"),
    (
        ["train", "--batch-size", "100"],
        "--batch-size must be divisible by .* devices, 8, got 100",
    ),
    (["train", "--driver", "jit", "--devices", "2"], "--driver 'jit' runs on one device, got 2"),
    (
        ["train", "--preset", "baseline", "--loss", "paper"],
        "--loss for .* must be cross_entropy",
    ),
    (["train", "--model", "smal"], "'smal'.*small.*matrix_capsnet"),
    (["train", "--routing", "sinkhorn"], "'sinkhorn'.*'--routing'.*dynamic"),
    (
        ["train", "--model", "baseline", "--routing", "em"],
        "--routing is for capsule networks, not for baseline",
    ),
    (
        ["train", "--routing", "uniform", "--num-iterations", "2"],
        "--num-iterations is not for routing 'uniform', which makes one pass",
    ),
    (["train", "--num-iterations", "0"], "--num-iterations must be at least 1, got 0"),
    (["train", "--model=matrix_capsnet", "--routing", "heinsen"], "'heinsen' makes votes"),
    (["train", "--run-dir", "/proc/none"], "--run-dir /proc/none cannot be made"),
    (["train", "--dataset", "image_folder"], "needs --data-dir"),
    (["train", "--dataset", "image_folder", "--data-dir", "missing"], "missing.*does not exist"),
    (["evaluate", "missing"], "run directory missing does not exist"),
    (["evaluate"], "PATH"),
    (["evaluate", "missing", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["fit"], "fit; available subcommands: train, evaluate, reproduce, bench, draw, explore"),
    ([], "train, evaluate"),
]


@pytest.mark.parametrize(("arguments", "match"), BAD, ids=[" ".join(a) or "none" for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_two(arguments, match, capsys, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    prog = " ".join(["capsjax", *[a for a in arguments[:1] if a in ("train", "evaluate")]])
    assert re.search(match, one_line(told.err, prog))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_configuration_is_one_line(uninterrupted, tmp_path, capsys):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], run)
    (run / "config.json").write_text('{"train": {')
    with pytest.raises(SystemExit):
        main(["evaluate", str(run)])
    assert "config.json is damaged" in one_line(capsys.readouterr().err, "capsjax evaluate")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_tells_every_option(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    if arguments[0] == "train":
        import dataclasses

        from capsjax.training import TrainConfig

        for field in dataclasses.fields(TrainConfig):
            assert "--" + field.name.replace("_", "-") in told


def test_version(capsys):
    from capsjax import __version__

    main(["--version"])
    assert capsys.readouterr().out == f"capsjax {__version__}\n"
