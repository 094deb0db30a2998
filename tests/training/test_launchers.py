"""The recipes of examples/pods, whose launchers are stood in for where they are missing."""

import itertools
import os
import shlex
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import yaml
from jobs import EVERY, NETWORK, WAITING, Launched, free_port, saved

from capsjax.data import save_npz

PODS = Path(__file__).parents[2] / "examples" / "pods"

# Starts two tasks as SLURM does on one node, and passes SIGTERM on to them.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
named = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}}
tasks = [
    subprocess.Popen(
        sys.argv[1:], env={{**os.environ, **named, "SLURM_PROCID": n, "SLURM_LOCALID": n}}
    )
    for n in "01"
]
signal.signal(signal.SIGTERM, lambda number, frame: [t.send_signal(number) for t in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""


class Commands:
    """A folder of commands: ``capsjax``, which waits at step 7 until allowed to go on."""

    def __init__(self, folder):
        self.folder, self.started = folder, folder / "started"
        self.started.mkdir()
        self.path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        waiting = shlex.join([sys.executable, "-c", WAITING, "7", str(folder / "go")])
        rank = "$SLURM_PROCID$OMPI_COMM_WORLD_RANK$CAPSJAX_PROCESS_ID"
        self.add("capsjax", f'#!/bin/sh\necho $$ > {self.started}/{rank}\nexec {waiting} "$@"\n')

    def add(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def go(self):
        (self.folder / "go").touch()

    def send(self, number, rank):
        os.kill(int((self.started / str(rank)).read_text()), number)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    return Commands(tmp_path / "bin")


@pytest.fixture(scope="module")
def options(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    save_npz(digits, path)
    return ["--dataset", str(path), *NETWORK, *EVERY, "--no-tensorboard", "--steps", "14"]


def is_free(port):
    with socket.socket() as listener:
        return listener.connect_ex(("127.0.0.1", port)) != 0


def slurm_job_with_a_free_port():
    """The number of a job, which JAX derives a port from."""
    numbers = itertools.count(os.getpid())
    return str(next(n for n in numbers if is_free(n % 2**12 + 2**16 - 2**12)))


@pytest.mark.slow
def test_slurm_queues_a_pre_empted_job_again_and_it_goes_on(commands, options, tmp_path):
    run, job_id = tmp_path / "run", slurm_job_with_a_free_port()
    commands.add("srun", SRUN)
    commands.add("scontrol", '#!/bin/sh\necho "$@" >> requeued\n')
    script = ["bash", PODS / "slurm.sh", *options]
    variables = {"PATH": commands.path, "RUN": str(run), "SLURM_JOB_ID": job_id}
    with Launched(tmp_path / "first", [script], [variables]) as job:
        job.until(lambda: saved(run) == [7], "a checkpoint")
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
        commands.go()
        assert job.wait() == [0], job.logs()
        assert job[0].out.startswith("stopped by SIGTERM at step ")
    assert (tmp_path / "requeued").read_text() == f"requeue {job_id}\n"
    variables["SLURM_RESTART_COUNT"] = "1"
    with Launched(tmp_path / "second", [script], [variables]) as job:
        assert job.wait() == [0], job.logs()
        assert "from step" in job[0].err
        assert job[0].out.startswith("test error: ")
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1


def test_slurm_queues_no_job_again_whose_options_are_invalid(commands, tmp_path):
    commands.add("srun", "#!/bin/sh\nexit 2\n")
    commands.add("scontrol", "#!/bin/sh\ntouch requeued\n")
    variables = {"PATH": commands.path, "RUN": str(tmp_path / "run"), "SLURM_JOB_ID": "1"}
    with Launched(tmp_path, [["bash", PODS / "slurm.sh"]], [variables]) as job:
        assert job.wait() == [2], job.logs()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI's mpirun")
def test_open_mpi_starts_processes_that_join_and_save_together(commands, options, tmp_path):
    run = tmp_path / "run"
    command = ["mpirun", "--oversubscribe", "-n", 2, "capsjax", "train", *options, "--run-dir", run]
    allowed = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    variables = {"PATH": commands.path, **dict.fromkeys(allowed, "1")}
    with Launched(tmp_path, [command], [variables]) as job:
        job.until(lambda: saved(run) == [7], "a checkpoint")
        commands.send(signal.SIGTERM, rank=1)
        commands.go()
        assert job.wait() == [0], job.logs()
        assert "process 1 of 2 on" in job[0].err
        assert "stopped by SIGTERM at step " in job[0].out


def spec(name):
    """The replicated job of a JobSet, and its pods' one container."""
    whole = yaml.safe_load((PODS / name).read_text("utf-8"))
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = whole["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return whole, replicated, job, container


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-tpu.yaml"])
def test_a_job_set_starts_all_pods_again_when_one_fails(name):
    whole, _, job, container = spec(name)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] > 1
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    policy = whole["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "capsjax", "operator": "In", "values": [2]}
    assert container["name"] == "capsjax"
    assert {each["name"] for each in container["volumeMounts"]} == {
        each["name"] for each in job["template"]["spec"]["volumes"]
    }
    assert "--auto-resume" in container["args"][0]


@pytest.mark.slow
def test_pods_save_together_and_go_on(commands, options, tmp_path):
    whole, replicated, job, container = spec("jobset.yaml")
    given = {each["name"]: each.get("value") for each in container["env"]}
    name = whole["metadata"]["name"]
    host, port = given["CAPSJAX_COORDINATOR"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert given["CAPSJAX_NUM_PROCESSES"] == str(job["completions"])
    assert port.isdecimal()
    run = tmp_path / "run"
    here = {"RUN": str(run), "PATH": commands.path}
    here["CAPSJAX_COORDINATOR"] = f"127.0.0.1:{free_port()}"
    pods = [{**given, **here, "CAPSJAX_PROCESS_ID": str(n)} for n in range(job["completions"])]
    (script,) = container["args"]
    script = script.replace("--dataset mnist --data-dir /runs/tfds", shlex.join(options))
    command = [*container["command"], script]
    with Launched(tmp_path / "first", [command] * 2, pods) as job:
        job.until(lambda: saved(run) == [7], "a checkpoint")
        job[1].send(signal.SIGTERM)
        commands.go()
        assert job.wait() == [1, 1], job.logs()  # so that the JobSet starts them again
        assert job[0].out.startswith("stopped by SIGTERM at step ")
    with Launched(tmp_path / "second", [command] * 2, pods) as job:
        assert job.wait() == [0, 0], job.logs()
        assert job[0].out.startswith("test error: ")
