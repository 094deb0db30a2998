"""Real processes on this machine that train as one."""

import json
import re
import shutil
import signal
import socket

import jax
import numpy as np
import pytest
from jobs import EVERY, NETWORK, WAITING, Job, saved

from capsjax import cli
from capsjax.data import save_npz
from capsjax.errors import ConfigError
from capsjax.training import Checkpoints, ProcessOptions, TrainConfig, initialize, train
from capsjax.training import processes as many

LAST = 21


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    save_npz(digits, path)
    return path


@pytest.fixture(scope="module")
def options(data):
    return ["train", "--dataset", str(data), *NETWORK, *EVERY, "--no-tensorboard"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run of two processes with two devices each, which share no directory, and its job."""
    folder = tmp_path_factory.mktemp("whole")
    for number in range(2):
        (folder / f"host-{number}").mkdir()
    arguments = [*options, "--steps", LAST, "--run-dir", "run"]
    with Job(folder, arguments, directory=lambda n: folder / f"host-{n}") as job:
        assert job.wait() == [0, 0], job.logs()
        yield folder / "host-0" / "run", job


def state(run, step=None):
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    found = checkpoints._manager.restore(checkpoints.choose("last" if step is None else step))
    checkpoints.close()
    return found


def assert_same_bits(run, other):
    jax.tree.map(np.testing.assert_array_equal, state(run), state(other))


def assert_close(run, other):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    jax.tree.map(close, state(run), state(other))


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_does(whole, data, tmp_path):
    run, _ = whole
    options = TrainConfig(
        dataset="npz",
        data_dir=data,
        preset="baseline",
        override=("conv_features=4", "dense_features=8"),
        batch_size=16,
        log_every=4,
        checkpoint_every=7,
        validation=20,
        tensorboard=False,
        steps=LAST,
        devices=4,
        run_dir=tmp_path / "run",
    )
    result = train(options)
    assert_close(run, options.run_dir)
    ours, alone = metrics(run), metrics(options.run_dir)
    assert [(r["split"], r["step"]) for r in ours] == [(r["split"], r["step"]) for r in alone]
    losses = [[r["loss"] for r in records] for records in (ours, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    stored = json.loads((run / "result.json").read_text())
    assert (stored["test_wrong"], stored["test_count"]) == (result.test.wrong, 101)


def test_process_0_alone_writes_and_speaks(whole):
    run, job = whole
    host = run.parents[1] / "host-1"
    assert list(host.iterdir()) == []  # and the checkpoints need no shared file system
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.jsonl", "result.json"}
    assert job[0].out.startswith("test error: ")
    assert job[1].out == ""
    (message,) = job[1].messages
    assert re.fullmatch(r"process 1 of 2 on \S+: 2 of 4 cpu devices", message)
    assert "pmap on 4 cpu devices of 2 processes" in job[0].err


def test_two_processes_evaluate_each_image_once(whole, tmp_path):
    run, trained = whole
    table = tmp_path / "predictions.csv"
    arguments = ["evaluate", run, "--driver", "shard", "--batch-size", 40, "--predictions", table]
    with Job(tmp_path, arguments) as job:
        assert job.wait() == [0, 0], job.logs()
        assert trained[0].out.splitlines()[0].removeprefix("test ") in job[0].out
        assert "of 101 wrong" in job[0].out
        assert job[1].out == ""
    assert len(table.read_text().splitlines()) == 102


# In the gate, one process is stopped (tests/test_cli.py), two go on with what one has left, and the
# loss of one of two is noticed.
@pytest.mark.slow
@pytest.mark.parametrize("where", ["remote", "tmp_path"])
def test_a_stopped_job_goes_on_by_the_same_command_to_the_same_bits(
    whole, options, tmp_path, where, request
):
    run = request.getfixturevalue(where) / "run"
    arguments = [*options, "--steps", LAST, "--run-dir", run, "--auto-resume"]

    def stop(step, number):
        """Sends a signal to process 1 after a checkpoint, and returns the job that has ended."""
        go = tmp_path / f"go-{step}"
        waits = ("-c", WAITING, str(step), str(go))
        with Job(tmp_path / f"{step}", arguments, program=waits, heartbeat=10) as job:
            job.until(lambda: step in saved(run), "a checkpoint")
            job[1].send(number)
            go.touch()
            return job, job.wait()

    job, codes = stop(7, signal.SIGKILL)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    (line,) = job[0].errors
    assert "was lost" in line
    assert line.endswith("start all processes again, with --resume")
    assert saved(run) == [7]

    job, codes = stop(14, signal.SIGTERM)
    assert codes == [0, 0], job.logs()
    assert "from step 7" in job[0].err
    # A lock of the file system ends with its process.
    assert ("is taken over from process" in job[0].err) == (where == "remote")
    stopped = r"stopped by SIGTERM at step (14|16); everything is saved, resume with: capsjax"
    assert re.match(stopped, job[0].out)
    assert job[1].out == ""

    last = saved(run)[-1]
    assert last in (14, 16)  # the decision for the next call may have been made
    # As a user starts them, and to the bits of those that are forked.
    with Job(tmp_path / "last", arguments, forked=False) as job:
        assert job.wait() == [0, 0], job.logs()
        assert f"from step {last}" in job[0].err
        assert "is taken over" not in job[0].err
    assert_same_bits(run, whole[0])


@pytest.mark.parametrize(
    ("processes", "devices", "driver"),
    [
        (2, 1, "shard"),
        pytest.param(4, 1, "shard", marks=pytest.mark.slow),
        pytest.param(2, 1, "pmap", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_processes_and_devices(
    whole, options, tmp_path, processes, devices, driver
):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    for step in saved(run):
        if step > 14:
            shutil.rmtree(run / "checkpoints" / str(step))
    (run / "result.json").unlink()
    arguments = ["train", "--resume", "--run-dir", run, "--driver", driver]
    with Job(tmp_path, arguments, processes=processes, devices=devices) as job:
        assert job.wait() == [0] * processes, job.logs()
        assert "from step 14" in job[0].err
    assert_close(run, whole[0])


# A process whose clock and devices are slow.
SLOW = """
import sys, time
import jax
from capsjax.__main__ import main
from capsjax.training import loop

fetch = jax.device_get
def device_get(value):
    if "--process-id 1" in " ".join(sys.argv):
        time.sleep(0.3)
    return fetch(value)

loop.jax = type(sys)("jax")
loop.jax.__dict__.update(jax.__dict__, device_get=device_get)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_slow_process_changes_nothing(whole, options, tmp_path):
    run = tmp_path / "run"
    arguments = [*options, "--steps", LAST, "--run-dir", run]
    with Job(tmp_path, arguments, program=("-c", SLOW)) as job:
        assert job.wait() == [0, 0], job.logs()
    assert_same_bits(run, whole[0])


def test_each_process_streams_its_share_to_the_same_bits(whole, options, tmp_path):
    run = tmp_path / "run"
    arguments = [*options, "--steps", LAST, "--run-dir", run, "--input", "stream"]
    with Job(tmp_path, arguments) as job:
        assert job.wait() == [0, 0], job.logs()
        assert "input: streamed" in job[0].err
        assert "input:" not in job[1].err
    assert_same_bits(run, whole[0])


# One that is stuck is noticed only after the time of a heartbeat.
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_the_loss_of_process_0_is_noticed(options, tmp_path, how):
    run = tmp_path / "run"
    arguments = [*options, "--steps", 10**6, "--run-dir", run]
    with Job(tmp_path, arguments, heartbeat=10) as job:
        job.until(lambda: saved(run), "a checkpoint")
        job[0].send(how)
        assert job.wait(1) != [0]
        (line,) = job[1].errors
        # What it notices first: the end of the service that process 0 runs, or of a connection.
        assert re.fullmatch(
            "capsjax train: error: (process 0, which coordinates the others,|the connection to"
            " another process) was lost; start all processes again, with --resume",
            line,
        )


def other(number, name, value):
    """Arguments of process 1 alone."""
    return [name, value] if number == 1 else []


@pytest.mark.parametrize(
    ("own", "settings", "expected"),
    [
        (
            lambda n: ["--learning-rate", str(0.001 * (n + 1))],
            {},
            "--learning-rate is 0.002 in process 1 and 0.001 in process 0; all need the same",
        ),
        pytest.param(
            lambda n: ["--batch-size", "18"],
            {},
            "--batch-size must be divisible by the number of",
            marks=pytest.mark.slow,
        ),
        (lambda n: [], {"devices": (2, 3)}, "number of devices: process 0 has 2, process 1 has 3"),
        (lambda n: [], {"told": (2, 3)}, "--num-processes is 3 in process 1 and 2 in process 0"),
        pytest.param(
            lambda n: ["--learning-rate", "1e30"],
            {},
            "the loss is not finite at step 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_is_one_line_from_every_process(options, tmp_path, own, settings, expected):
    run = tmp_path / "run"
    arguments = [*options, "--steps", 9, "--run-dir", run]
    with Job(tmp_path, lambda n: [*arguments, *own(n)], **settings) as job:
        codes = job.wait()
        assert all(code in (1, 2) for code in codes), job.logs()
        for process in job.processes:
            (line,) = process.errors
            assert line.startswith("capsjax train: error: ")
            assert expected in line
    assert not run.exists()


def test_other_data_and_missing_data_are_named(options, data, digits, tmp_path):
    changed = dict(np.load(data))
    changed["train_images"] = 255 - changed["train_images"]
    np.savez(tmp_path / "other.npz", **changed)
    arguments = [*options, "--steps", 9, "--run-dir", tmp_path / "run"]

    def given(path):
        return lambda n: [*arguments, *other(n, "--data-dir", path)]

    with Job(tmp_path, given(tmp_path / "other.npz")) as job:
        assert job.wait() == [2, 2], job.logs()
        for process in job.processes:
            (line,) = process.errors
            assert re.search(r"data checksum is \d+ in process 1 and \d+ in process 0", line)
    with Job(tmp_path, given(tmp_path / "none.npz")) as job:
        assert job.wait() == [1, 2], job.logs()
        assert "process 1 of 2 ended: data set npz cannot be read" in job[0].errors[0]
        assert "none.npz" in job[1].errors[0]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0], "not all 2 processes joined within 2 s: start each --process-id from 0 once"),
        ([1], r"process 1 cannot reach process 0 at --coordinator 127.0.0.1:\d+ within 2 s: "),
    ],
)
def test_processes_that_do_not_meet_say_so(options, tmp_path, numbers, expected):
    arguments = [*options, "--steps", 9, "--run-dir", tmp_path / "run"]
    with Job(tmp_path, arguments, numbers=numbers, start=2) as job:
        (code,) = job.wait()
        assert code not in (0, None)
        (line,) = job[0].errors
        assert re.search(expected, line)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "host:1"}, "several processes need --num-processes and --process-id too"),
        ({"num_processes": 2, "process_id": 0}, "several processes need --coordinator too"),
        (
            {"coordinator": "host", "num_processes": 2, "process_id": 0},
            "--coordinator must be HOST:PORT, got host",
        ),
        (
            {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
            "--process-id must be below --num-processes 2, got 2",
        ),
        ({"num_processes": 0}, "--num-processes must be at least 1, got 0"),
        ({"heartbeat_timeout": 0}, "--heartbeat-timeout must be at least 1, got 0"),
    ],
)
def test_options_of_processes_are_checked(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ProcessOptions(**given)


def test_options_of_processes_come_from_the_environment(monkeypatch):
    values = {"COORDINATOR": "host:80", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
    for name, value in values.items():
        monkeypatch.setenv(f"CAPSJAX_{name}", value)
    options = ProcessOptions()
    assert (options.coordinator, options.num_processes, options.process_id) == ("host:80", 2, 1)
    monkeypatch.setenv("CAPSJAX_PROCESS_ID", "one")
    with pytest.raises(ConfigError, match="CAPSJAX_PROCESS_ID must be an integer, got 'one'"):
        ProcessOptions()


def test_an_id_that_is_no_number_is_one_line_on_resume(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(tmp_path), "--process-id", "one"])
    line = "capsjax train: error: --process-id must be an integer, got 'one'\n"
    assert capsys.readouterr().err == line


def test_a_used_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        options = ProcessOptions(coordinator=address, num_processes=2, process_id=0)
        with pytest.raises(ConfigError, match=f"{address} cannot be used: .*; each job needs"):
            initialize(options)


def test_a_cluster_that_cannot_be_asked_is_named(monkeypatch):
    class Broken:
        opt_in_only_method = False

        @classmethod
        def is_env_present(cls):
            raise RuntimeError("no metadata")

    monkeypatch.setattr("jax._src.clusters.ClusterEnv._cluster_types", [Broken])
    with pytest.raises(ConfigError, match="cannot be detected: no metadata; --num-processes 1"):
        initialize()


def test_alone_nothing_is_joined():
    assert not initialize()
    assert (many.number(), many.index(), many.is_first()) == (1, 0, True)
    assert many.first(lambda: "x", str) == "x"
    with pytest.raises(ZeroDivisionError):
        many.first(lambda: 1 // 0, int)


def test_auto_resume_begins_or_goes_on(digits, tiny, tmp_path):
    with pytest.raises(ConfigError, match="--auto-resume needs --run-dir"):
        TrainConfig(auto_resume=True)
    with pytest.raises(ConfigError, match="--auto-resume has no effect with --resume"):
        TrainConfig(auto_resume=True, resume=True, run_dir=tmp_path)
    config = TrainConfig(
        run_dir=tmp_path / "run",
        auto_resume=True,
        steps=2,
        batch_size=16,
        validation=0,
        driver="jit",
        tensorboard=False,
    )
    first = train(config, model=tiny, dataset=digits)
    again = train(config, model=tiny, dataset=digits)  # as a launcher may do
    assert (first.first_step, again.first_step, again.step) == (0, 2, 2)
    assert again.test == first.test
