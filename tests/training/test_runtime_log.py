"""What JAX's runtime logs when it ends a process, as one line."""

import pytest

from capsjax.training.runtime_log import Job, explain

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
    line = explain(log, Job("capsjax train", 0, 4, heartbeat_timeout=60, start_timeout=40))
    assert line.startswith(RUNTIME[log]) or RUNTIME[log] in line
    assert "\n" not in line
