"""The commands as a user runs them: real processes, real signals, real bad input."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import forking
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jobs import NETWORK, WAITING, Launched, saved
from PIL import Image

from capsjax import cli, training
from capsjax.cli import main
from capsjax.data import Split, load, save_npz
from capsjax.process import interruptible
from capsjax.viz import draw

SCRIPTS = Path(__file__).parents[1] / "scripts"


def environment():
    """That of the tests, which compiles quickly, but with one device."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "COLUMNS": "80"}


def script(name, *arguments, **variables):
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command, env={**environment(), **variables}, capture_output=True, text=True, timeout=300
    )


def call(capsys, *arguments):
    """Runs a command in this process, which is cheaper where no signal and no disk takes part."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())


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
def options(tmp_path_factory):
    """Options of runs with short steps and few images, 12 steps an epoch, and small layers."""
    digits = load("mnist_5k")
    train, test = (
        Split(*(x[::n] for x in split)) for split, n in ((digits.train, 13), (digits.test, 20))
    )
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    save_npz(dataclasses.replace(digits, name="mnist", train=train, test=test), path)
    data = ["--dataset", "mnist", "--data-dir", str(path)]
    layers = ["--override", "conv_features=8", "primary_types=1", "decoder_features=32"]
    return [*data, "--batch-size", "16", "--validation", "108", "--log-every", "2", *layers]


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = script("train", *options, "--steps", 40, "--checkpoint-every", 10, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    return run, done


def test_a_run_ends_with_a_test_error_and_a_picture(uninterrupted):
    run, done = uninterrupted
    lines = done.stdout.splitlines()
    assert lines[0].startswith("test error: ")
    assert lines[0].endswith("of 50 wrong)")
    assert str(run / "reconstructions.png") in done.stdout
    with Image.open(run / "reconstructions.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    assert "validation error" in done.stderr


def test_evaluate_tells_the_same_error(uninterrupted, capsys):
    run, done = uninterrupted
    # Also where the batch cannot be split over the devices: it is rounded up.
    evaluated = call(capsys, "evaluate", run, "--batch-size", 100)
    assert evaluated.returncode == 0, evaluated.stderr
    told = evaluated.stdout.splitlines()[0].removeprefix("mnist ")
    assert told == done.stdout.splitlines()[0]


def forked(folder, *arguments):
    """A process of Python that need not import capsjax first; it ends with the context."""
    return Launched(folder, [[sys.executable, *arguments]], [{}], forked=True)


def stop(run, step, how, *arguments):
    """Trains up to a step with a checkpoint, stops there, and returns what the run printed."""
    logs, go = run.with_name(f"logs-{step}"), run.with_name(f"go-{step}")
    command = ["train", *arguments, "--run-dir", run]
    with forked(logs, "-c", WAITING, step, go, *command) as job:
        job.until(lambda: step in saved(run), "a checkpoint")
        job[0].send(how)
        go.touch()
        assert job.wait() == [-how if how == signal.SIGKILL else 128 + how], job.logs()
    assert not (run / "result.json").exists()
    return job[0].out


def test_a_run_that_was_stopped_resumes_to_the_same_bits(options, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    quick = [*options[: options.index("--override")], *NETWORK]
    quick += ["--steps", "40", "--checkpoint-every", "10"]
    with forked(tmp_path, "-m", "capsjax", "train", *quick, "--run-dir", whole) as job:
        assert job.wait() == [0], job.logs()
    told = stop(run, 20, signal.SIGTERM, *quick)
    assert "stopped by SIGTERM at step" in told
    assert f"--resume {run}\n" in told
    stop(run, 30, signal.SIGKILL, "--resume")
    with forked(tmp_path, "-m", "capsjax", "train", "--resume", "--run-dir", run) as job:
        assert job.wait() == [0], job.logs()
    (step, expected), (resumed_step, state) = newest(whole), newest(run)
    assert step == resumed_step == 40
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_resuming_keeps_the_run_s_options_and_may_lengthen_it(uninterrupted, tmp_path, capsys):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], run)
    longer = call(capsys, "train", "--resume", "--run-dir", run, "--steps", 44)
    assert longer.returncode == 0, longer.stderr
    assert "44 steps of 16, from step 40" in longer.stderr
    assert "trained steps 40 to 44 in" in longer.stdout
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "test"] == [44]
    finished = call(capsys, "train", "--resume", "--run-dir", run)
    assert finished.returncode == 2
    assert "is finished at step 44; raise --epochs, --steps or --patience" in one_line(
        finished.stderr, "capsjax train"
    )
    epochs = call(capsys, "train", "--resume", "--run-dir", run, "--epochs", 30)
    assert "--epochs has no effect on the run" in one_line(epochs.stderr, "capsjax train")
    goal = call(capsys, "train", "--resume", f"--run-dir={run}", "--until-error", "x")
    assert "--until-error must be a number, got 'x'" in one_line(goal.stderr, "capsjax train")
    refused = call(capsys, "train", "--resume", "--run-dir", run, "--seed", 1)
    assert refused.returncode == 2
    assert "--seed must stay 0 to resume the run" in one_line(refused.stderr, "capsjax train")
    other = call(capsys, "train", "--resume", "--run-dir", run, "--preset", "paper")
    assert other.returncode == 2
    assert "--preset must stay small" in one_line(other.stderr, "capsjax train")


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
        with forked(tmp_path, "-m", "capsjax", name, *arguments) as failed:
            assert failed.wait() == [2]
        line = one_line(failed[0].err, f"capsjax {name}")
        assert "checkpoints/40 is damaged or truncated" in line
        assert "move it away to use those of step 20, 30" in line
    shutil.move(run / "checkpoints" / "40", tmp_path / "away")
    # With XLA's own flags, as a user has them.
    arguments = ("-m", "capsjax", "evaluate", run)
    assert forking.run(*arguments, folder=tmp_path, env={"XLA_FLAGS": ""}).returncode == 0


def test_a_full_disk_is_one_line_and_keeps_what_was_complete(uninterrupted, tmp_path, capsys):
    """A limit on the size of a file stands in for a disk without space: both refuse the write."""
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], run)

    # Other tests must not read what it would write into the cache of compiled programs.
    limited = (
        "import resource, sys, jax; from capsjax.__main__ import main;"
        " jax.config.update('jax_enable_compilation_cache', False);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); main(sys.argv[1:])"
    )
    arguments = ["train", "--resume", "--run-dir", run, "--steps", 60]
    failed = forking.run("-c", limited, *arguments, folder=tmp_path)
    assert failed.returncode == 1
    line = one_line(failed.stderr, "capsjax train")
    assert "could not be written to" in line
    assert "complete up to step 40" in line
    again = call(capsys, "train", "--resume", "--run-dir", run, "--steps", 44)
    assert again.returncode == 0, again.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_without_space(options, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        command = ["train", *options, "--steps", 1, "--run-dir", disk / "run"]
        with forked(tmp_path, "-m", "capsjax", *command) as failed:
            assert failed.wait()[0] in (1, 2)
        assert "No space left on device" in one_line(failed[0].err, "capsjax train")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_loss_that_is_not_finite_is_one_line(options, tmp_path, capsys):
    failed = call(
        capsys,
        "train",
        *options,
        "--steps",
        20,
        "--learning-rate",
        "1e38",
        "--run-dir",
        tmp_path / "run",
    )
    assert failed.returncode == 1
    assert "the loss is not finite at step" in one_line(failed.stderr, "capsjax train")


@pytest.mark.parametrize(("command", "advice"), [("train", True), ("draw", False)])
def test_too_little_memory_is_one_line(command, advice, monkeypatch, capsys):
    def allocate(*_):
        return jnp.zeros((10**5, 10**5, 10**4)).block_until_ready()

    monkeypatch.setattr(training, "train", allocate)
    monkeypatch.setattr(draw, "draw", allocate)
    failed = call(capsys, command, *(["confusion", "mnist_small"] if command == "draw" else []))
    assert failed.returncode == 1
    line = one_line(failed.stderr, f"capsjax {command}")
    assert "too little memory: Out of memory allocating 400000000000000 bytes" in line
    assert ("a smaller --batch-size takes less" in line) == advice


def test_another_error_of_the_runtime_is_not_hidden(monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(training, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


def test_images_of_another_size_than_the_run_s_are_one_line(uninterrupted, tmp_path, capsys):
    for split in ("train", "test"):
        for name in "0123456789":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("L", (32, 32)).save(folder / "a.png")
    failed = call(
        capsys, "evaluate", uninterrupted[0], "--dataset", "image_folder", "--data-dir", tmp_path
    )
    assert failed.returncode == 2
    line = one_line(failed.stderr, "capsjax evaluate")
    assert "data set image_folder has images of 32x32x1, but the network takes 28x28x1" in line


BAD = [
    (["train", "--preset", "smal"], "--preset must be one of .*small.*, got 'smal'"),
    (["train", "--dataset", "mnits"], "--dataset must be one of mnist_5k.*, got 'mnits'"),
    (["train", "--batch-siz", "3"], "unknown argument: --batch-siz; did you mean --batch-size?"),
    (["train", "--batch-size", "x"], "--batch-size must be an integer, got 'x'"),
    (["train", "--learning-rate", "fast"], "--learning-rate must be a number, got 'fast'"),
    (["train", "--steps", "x"], "--steps must be an integer, got 'x'"),
    (["train", "--steps"], "--steps needs a value: an integer"),
    (["train", "5"], "unknown argument: 5"),
    (["train", "--no-reconstructoin"], "did you mean --no-reconstruction?"),
    (["evaluate", "--run-dri", "x"], "unknown argument: --run-dri"),
    (["train", "--test-size", "5"], "--test-size is for data sets whose images are generated"),
    (["train", "--no-reconstruction", "--preset", "baseline"], "has no effect on baseline"),
    (["train", "--max-shift", "28"], "--max-shift must be below the images' 28 pixels, got 28"),
    (["train", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["train", "--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
    (["train", "--fill", "grey"], "--fill must be a number or edge, got 'grey'"),
    (["train", "--fill", "255"], "--fill must be edge or from 0 to 1, got 255"),
    (["train", "--image-size", "0"], "--image-size must be at least 1, got 0"),
    (["train", "--channels", "3"], "--channels are for image_folder and tfds:, not for"),
    (["train", "--dataset", "own.npz"], "data set npz cannot be read from own.npz: .*No such file"),
    (["evaluate", "missing", "--image-size", "0"], "--image-size must be at least 1, got 0"),
    (["train", "--decay-rate", "2"], "--decay-rate must be above 0 and at most 1, got 2"),
    (["train", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    (["train", "--resume"], "--resume needs --run-dir"),
    (["train", "--data-dir", "s.npz"], "--data-dir has no effect on data set mnist_5k"),
    (["train", "--run-dir", "gs://bucket"], "--run-dir must name a folder .*, got gs://bucket"),
    (["train", "--data-dir", "gs://a/b"], "--data-dir must be a path .*, got gs://a/b"),
    (["train", "--decay-steps", "9999999999"], "--decay-steps must be below 2147483648"),
    (["train", "--num-iterations", "9999999999"], "--num-iterations must be at most 1000"),
    (["reproduce", "small", "--seeds", "9999999999"], "--seeds must be at most 10000"),
    (["reproduce", "small", "--list", "--steps", "5"], "--steps has no effect with --list"),
    (["bench", "quick", "--workload", "squash"], "--suite quick has no effect with --workload"),
    (["draw", "confusion", "run", "--index", "3"], "--index has no effect on confusion"),
    (["draw", "curves", "run", "--checkpoint", "best"], "--checkpoint has no effect on curves"),
    (["draw", "lengths", "run", "--out", "none/a.png"], "--out: no directory none"),
    (["explore", "run", "--examples", "1"], "--examples has no effect without --export"),
    (["explore", "run", "--port", "1", "--export", "a.html"], "--port has no effect with --export"),
    (["evaluate", "missing", "--predictions", "none/a.csv"], "--predictions: no directory none"),
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
    (["train", "--model", "smal"], "small.*matrix_capsnet.*, got 'smal'"),
    (["train", "--routing", "sinkhorn"], "--routing must be one of .*dynamic.*'sinkhorn'"),
    (
        ["train", "--model", "baseline", "--routing", "em"],
        "--routing is for capsule networks, not for baseline",
    ),
    (
        ["train", "--routing", "uniform", "--num-iterations", "2"],
        "--num-iterations has no effect on routing 'uniform', which makes a single pass",
    ),
    (["train", "--freeze"], "--freeze needs at least one value"),
    (["train", "--schedule", "linear"], "--schedule must be one of exponential, cosine, constant"),
    (["train", "--class-weights", "equal"], "--class-weights must be balanced or numbers, got 'eq"),
    (["train", "--class-weights", "1", "2"], "--class-weights must be 10 numbers, one for each cl"),
    (["train", "--init-from", "missing"], "missing is neither a run directory nor a network in"),
    (["train", "--override", "conv_features=x"], "--override conv_features=x: Expected `int`"),
    (["train", "--num-iterations", "0"], "--num-iterations must be at least 1, got 0"),
    (["train", "--model=matrix_capsnet", "--routing", "heinsen"], "'heinsen' makes its own votes"),
    (["train", "--run-dir", "/proc/none"], "--run-dir /proc/none cannot be made"),
    (["train", "--dataset", "image_folder"], "needs --data-dir"),
    (["train", "--dataset", "image_folder", "--data-dir", "missing"], "missing.*does not exist"),
    (["evaluate", "missing"], "missing is neither a run directory nor a network in"),
    (["evaluate", "--run-dir", "missing"], "missing is neither a run directory"),
    (["evaluate", "--run-dir=missing"], "missing is neither a run directory"),
    (["evaluate", "mnist_small", "--checkpoint", "9"], "has no checkpoints, got checkpoint 9"),
    (["train", "--resume", "missing"], "run directory missing does not exist"),
    (["predict", "missing", "."], r"no images \(bmp, .*\) in \."),
    (["predict", "mnist_small", "a.png"], "no image or directory a.png"),
    (["predict", "mnist_small"], "needs images: files or directories"),
    (["predict", "run", "a.png", "--output", "none/a.csv"], "--output: no directory none"),
    (["predict", "run", "a.png", "--threshold", "nan"], "--threshold must be a number, got nan"),
    (["predict", "run", "a.png", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["export", "missing", "out"], "missing is neither a run directory nor a network in"),
    (["export", "--run-dir", "missing", "out"], "missing is neither a run directory"),
    (["export", "mnist_small"], "needs OUT "),
    (["export", "mnist_small", "out", "--checkpoint", "9"], "has no checkpoints, got"),
    (["export", "mnist_small", "out", "--platforms", "gpu"], "must be one of .*, got 'gpu'"),
    (["export", "mnist_small", "out", "--platforms"], "--platforms needs at least one of cpu, "),
    (
        ["export", "run", "out", "--pixels", "int8"],
        "--pixels must be one of uint8, .*'int8'",
    ),
    (["export", "mnist_small", "out", "--image-size", "9"], "--image-size has no effect on a net"),
    (["evaluate"], "needs RUN "),
    (["evaluate", "a", "b"], "unknown argument: b"),
    (["bench", "compare", "a"], "needs NEW "),
    (["bench", "train", "--set", "x=1"], "--set needs --workload"),
    (["bench", "--workload", "squash", "--set", "batch=,"], "--set must be like iterations=1,3"),
    (["bench", "--workload", "squash", "--alternate", "batch"], "needs its values: --set batch="),
    (["bench", "--workload", "math:exp", "--shape", "f32[3,"], "shape must be like f32.*'f32.3,'"),
    (
        ["bench", "--workload", "math:exp", "--shape", "i64[3]"],
        "would be int32: set JAX_ENABLE_X64",
    ),
    (["bench", "quick", "--hlo", sys.executable], "--hlo must be a directory, got the file"),
    (["draw", "portrait", "run"], "NAME must be one of diagram, .*, got 'portrait'"),
    (["explore", "run", "--port", "http"], "--port must be an integer, got 'http'"),
    (["evaluate", "missing", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["fit"], "command must be one of train, evaluate, predict, export, reproduce, .*, got 'fit'"),
    (["--verbose"], "command must be one of train, .*, got '--verbose'"),
    (
        [],
        "needs a command, one of train, evaluate, predict, export, .*, bench, draw, explore",
    ),
]


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    main(["reproduce", "mnist", "--list"])
    assert rb"paper 0.25 \xb1 0.005" in written.getvalue()


@pytest.mark.parametrize(("arguments", "match"), BAD, ids=[" ".join(a) or "none" for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_two(arguments, match, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    prog = " ".join(["capsjax", *[a for a in arguments[:1] if a not in ("fit", "--verbose")]])
    assert re.search(match, one_line(told.err, prog))
    assert list(tmp_path.iterdir()) == []


# Runs commands one after the other, each followed by its exit code.
IN_TURN = """
import json, sys
from capsjax.__main__ import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stopped:
        print(stopped.code)
"""


@pytest.mark.parametrize(
    "bad", [pytest.param(BAD, marks=pytest.mark.slow), BAD[::8]], ids=["all", "some"]
)
def test_on_a_terminal_an_error_is_the_same_line(tmp_path, bad):
    terminal, there = pty.openpty()
    commands = json.dumps([arguments for arguments, _ in bad])
    with open(os.ttyname(there), "wb", buffering=0) as tty:
        process = forking.Forked(
            [sys.executable, "-c", IN_TURN, commands],
            cwd=tmp_path,
            env={**os.environ, "TERM": "xterm-256color"},
            stdout=tty,
            stderr=tty,
        )
    os.close(there)
    written = b""
    with contextlib.suppress(OSError):  # how a terminal ends whose other side is closed
        while read := os.read(terminal, 4096):
            written += read
    os.close(terminal)
    assert process.wait() == 0
    # What a command prints, up to its exit code.
    printed = re.split(r"^2\r\n", written.decode(), flags=re.MULTILINE)
    assert printed.pop() == ""
    for text, (_, match) in zip(printed, bad, strict=True):
        *memory, line = text.splitlines()
        assert re.fullmatch(rf"capsjax( \w+)?: error: .*{match}.*", line)
        assert [x for x in memory if " parameters; training takes about " not in x] == []


def test_devices_that_are_missing_are_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    environ = {**os.environ, "JAX_PLATFORMS": "tpu", "TPU_SKIP_MDS_QUERY": "1"}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr("capsjax.process._has_tpu", lambda: False)
    for error, reason in (
        (AssertionError(), "no such device is visible"),
        (RuntimeError("Unable to initialize backend\nmore"), "Unable to initialize backend"),
    ):
        monkeypatch.setattr(jax, "devices", Mock(side_effect=error))
        for arguments in (
            ["train"],
            ["evaluate", "run"],
            ["predict", "run", "image"],
            ["export", "run", "out"],
            ["reproduce", "small"],
            ["draw", "lengths", "run"],
            ["explore", "run"],
        ):
            failed = call(capsys, *arguments)
            assert failed.returncode == 2
            line = one_line(failed.stderr, f"capsjax {arguments[0]}")
            assert line.endswith(f"JAX finds no device, JAX_PLATFORMS is tpu: {reason}")
    # Without these libtpu prints errors where there is no TPU.
    assert {"TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"} <= environ.keys()


def test_signals_end_a_command_in_one_line(capsys, monkeypatch):
    def exit_at_once(code):
        raise SystemExit(code)

    monkeypatch.setattr("capsjax.process.exit_at_once", exit_at_once)
    monkeypatch.setattr(cli, "_run", lambda *_: signal.raise_signal(signal.SIGINT))
    stopped = call(capsys, "evaluate", "run")
    assert (stopped.returncode, stopped.stderr) == (130, "capsjax evaluate: error: interrupted\n")
    with interruptible(), pytest.raises(KeyboardInterrupt) as interrupt:
        signal.raise_signal(signal.SIGTERM)
    assert interrupt.value.args == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_before_a_command_runs_ctrl_c_ends_the_process_quietly():
    code = """
import builtins, signal, sys
from capsjax.__main__ import main

class Interrupts:
    def find_spec(self, name, *_):
        if name == "capsjax.cli":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
main([])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_closed_streams_are_the_null_device(tmp_path):
    code = """
import os, sys
from capsjax.__main__ import main
start = main
def main(argv):
    print("lost", file=sys.stderr)
    print("lost")
    null = os.stat(os.devnull).st_rdev
    open(sys.argv[1], "w").write(str([os.fstat(n).st_rdev == null for n in range(3)]))
sys.modules["capsjax.cli"] = sys.modules["__main__"]
start([])
"""
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    subprocess.run([*command, tmp_path / "found"], check=True)
    assert (tmp_path / "found").read_text() == "[True, True, True]"


def test_a_closed_pipe_ends_the_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "capsjax", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_help_on_a_terminal_narrower_than_its_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "3")
    assert call(capsys, "--help").returncode == 0
    assert os.environ["COLUMNS"] == "3"


def test_a_damaged_configuration_is_one_line(uninterrupted, tmp_path, capsys):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], run)
    (run / "config.json").write_text('{"train": {')
    with pytest.raises(SystemExit):
        main(["evaluate", str(run)])
    assert "config.json is damaged" in one_line(capsys.readouterr().err, "capsjax evaluate")


COMMANDS = ["train", "evaluate", "predict", "export", "reproduce", "bench", "draw", "explore"]


@pytest.mark.parametrize("arguments", [[], *[[c] for c in COMMANDS], ["bench", "compare"]])
def test_help_lists_every_option(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    if not arguments:
        assert all(command in printed for command in [*COMMANDS, "compare", "--version"])
    if arguments == ["train"]:
        from capsjax.training import TrainConfig

        for field in dataclasses.fields(TrainConfig):
            assert "--" + field.name.replace("_", "-") in printed


def test_help_keeps_no_line_breaks_of_docstrings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "FIELD=VALUE, such as conv_features=32 decoder_features=128,256. (default" in printed


@pytest.mark.parametrize(
    ("command", "usage"),
    [("predict", "RUN IMAGE ..."), ("export", "RUN OUT"), ("draw", "curves} RUN ...")],
)
def test_help_names_the_paths(command, usage, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"{usage}\n" in capsys.readouterr().out


def test_without_the_hook_of_tyro_its_own_message_is_printed(capsys, monkeypatch):
    import tyro

    monkeypatch.delattr(tyro._errors, "on_parse_error")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--epochs", "abc"])
    assert stopped.value.code == 2
    assert "abc" in capsys.readouterr().err


def test_help_imports_no_jax():
    code = """
import sys
from capsjax.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(sorted({"jax", "flax", "numpy", "orbax"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"


def test_version(capsys):
    from capsjax import __version__

    main(["--version"])
    assert capsys.readouterr().out == f"capsjax {__version__}\n"


def test_a_signal_after_the_work_changes_nothing():
    """As while a process waits for the others, and ends."""
    program = (
        "import signal\n"
        "import capsjax.process as process\n"  # `from capsjax` would import JAX
        "with process.interruptible():\n"
        "    process.ignore_signals()\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.raise_signal(number)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
