"""What JAX's runtime logs when it ends a process, as one line."""

import json
import subprocess
import sys

import forking
import pytest

from capsjax.training import runtime_log
from capsjax.training.runtime_log import Job, explain

JOB = Job("capsjax train", 0, 4, heartbeat_timeout=60, start_timeout=40)

RUNTIME = {
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n3\nThe": (
        "processes 1, 3 were lost: no heartbeat for 60 s"
    ),
    "absl::Status: INVALID_ARGUMENT: Unexpected task registered with task=2": (
        "--process-id 2 is too large"
    ),
    "ABORTED: 1 unexpectedly tried to connect with a different incarnation": (
        "two processes were started with --process-id 1"
    ),
    "more recent barrier call for [Init] from the same task. RPC: /x/RegisterTask": (
        "two processes were started with --process-id 0"
    ),
    "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination/RegisterTask": (
        "not all 4 processes joined within 40 s"
    ),
    "Failed to send RPC to coordination service. Either the leader": "process 0, which",
    "DEADLINE_EXCEEDED\nRPC: /xla.coordination.CoordinationService/Heartbeat": "process 0, which",
    "terminate called after throwing an instance of 'gloo::IoException'": "connection to another",
    "absl::Status: INTERNAL: something new": "ended the processes: INTERNAL: something new",
}


@pytest.mark.parametrize("log", RUNTIME)
def test_the_runtime_s_log_becomes_one_line(log):
    line = explain(log, JOB)
    assert line.startswith(RUNTIME[log]) or RUNTIME[log] in line
    assert "\n" not in line


def filtered(log):
    command = [sys.executable, "-S", "-E", runtime_log.__file__, json.dumps(JOB._asdict())]
    process = subprocess.run(command, input=log.encode(), capture_output=True, timeout=120)
    assert process.stdout == b""
    return process.stderr.decode()


WRITTEN_BY_ONE = (
    "[Gloo] Rank 0 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3\n"
)
# As its pieces come from two threads that write at once.
WRITTEN_BY_TWO = (
    "[Gloo] Rank [Gloo] Rank 10 is connected to  is connected to 33 peer ranks. Expected number of"
    " connected peer ranks is : 3\n"
    " peer ranks. Expected number of connected peer ranks is : 3\n"
    "[Gloo] Rank 3 is connected to 3 peer ranks. Expected number of connected peer ranks is : 2\n"
    "3\n"
    "\n"
)


@pytest.mark.parametrize("log", [WRITTEN_BY_ONE, WRITTEN_BY_TWO])
def test_reports_of_connections_are_dropped_and_other_lines_pass(log):
    other = "I1128 something else\n3\n\nValueError: cannot reach 2 of 4 peer ranks\n"
    assert filtered(log + other + log) == other


@pytest.mark.parametrize("before", ["", WRITTEN_BY_TWO, "[Gloo] Rank 0 is connected to "])
@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "terminate called after throwing an instance of 'gloo::IoException'\n",
            "the connection to another process was lost",
        ),
        (
            "F1128 10:00:00.000000 1 client.h:80] Terminating process because the JAX distributed"
            " service detected fatal errors. absl::Status: DEADLINE_EXCEEDED\n"
            "RPC: /xla.coordination.CoordinationService/Heartbeat\n",
            "process 0, which coordinates the others, was lost",
        ),
    ],
)
def test_the_log_of_an_abort_is_replaced(before, log, reason):
    line = filtered("kept\n" + before + log)
    assert line.startswith(f"kept\ncapsjax train: error: {reason}")
    assert line.count("\n") == 2


# The runtime has written half a line, and has ended the process, when capsjax logs.
LOGGING = """
import logging, os, sys
from capsjax.process import quieten_libraries
from capsjax.training import runtime_log

quieten_libraries()
runtime_log.start(runtime_log.Job("capsjax train", 0, 4, 60, 40))
log = logging.getLogger("capsjax.data")
os.write(2, b"[Gloo] Rank 0 is connected to ")
log.warning("one")
os.write(2, b"3 peer ranks.\\nterminate called after throwing an instance of 'gloo\\n")
log.warning("two")
"""


def test_messages_of_capsjax_pass_whatever_the_runtime_writes(tmp_path):
    done = forking.run("-c", LOGGING, folder=tmp_path)
    lines = done.stderr.splitlines()
    assert [line for line in lines if "error" not in line] == ["one", "two"]
