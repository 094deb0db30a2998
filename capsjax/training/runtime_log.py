"""Filters the log of JAX's runtime, as a separate program that does not import capsjax.

When a process loses the others, the runtime logs a page of text and aborts, which nothing in the
process can catch. This program receives what C++ writes to the process's standard streams. It
reports in one line what happened, and passes everything else on.
"""

import json
import re
import signal
import sys
from typing import Any, NamedTuple

# A line may begin in the middle of another, because threads write reports of connections in pieces.
_FATAL = re.compile(
    rb"F\d{4} .*Terminating process because the JAX distributed service"
    rb"|terminate called after throwing an instance of 'gloo"
)
# Lines that announce the fatal one, and reports of connections that succeeded.
_NOISE = re.compile(
    rb"[EW]\d{4} .*(coordination_service|add_port)|\[Gloo\] Rank|peer ranks(\. | is : )"
)
_CONTINUED = re.compile(
    rb"\d+$|The tasks have crashed|=== Source Location|external/xla|RPC: /xla|$"
)


class Job(NamedTuple):
    """How a process was started.

    Attributes:
      prog: the command, for messages.
      process_id: index of this process.
      num_processes: number of processes; None if the cluster determines it.
      heartbeat_timeout: seconds of silence after which a process counts as lost.
      start_timeout: seconds that processes wait for each other at the start.
    """

    prog: str
    process_id: int | None
    num_processes: int | None
    heartbeat_timeout: int
    start_timeout: int


def explain(log: str, job: Job) -> str:
    r"""Explains in one line why the runtime ended the process.

    Args:
      log: what the runtime logged.
      job: how the process was started.

    Example:
      >>> from capsjax.training.runtime_log import Job, explain
      >>> job = Job("capsjax train", 0, 2, heartbeat_timeout=60, start_timeout=45)
      >>> explain("UNAVAILABLE: … tasks are unhealthy (stopped sending heartbeats):\n1", job)
      'process 1 was lost: no heartbeat for 60 s; start all processes again, with --resume'
    """
    again = "start all processes again, with --resume"
    number = "" if job.num_processes is None else f" {job.num_processes}"
    all_of_them = f"all{number} processes"
    if found := re.search(r"stopped sending heartbeats\):((?:\s+(?:/job:\S+:)?\d+\b)+)", log):
        lost = re.findall(r"(\d+)$", found[1], re.MULTILINE)
        which = f"process {lost[0]} was" if len(lost) == 1 else f"processes {', '.join(lost)} were"
        return f"{which} lost: no heartbeat for {job.heartbeat_timeout} s; {again}"
    if found := re.search(r"Unexpected task registered with task=(\d+)", log):
        return f"--process-id {found[1]} is too large for the --num-processes of process 0"
    twice = r"(\d+) unexpectedly tried to connect|more recent barrier call .* from the same task"
    if found := re.search(twice, log):
        which = str(job.process_id) if found[1] is None else found[1]
        return (
            f"two processes were started with --process-id {which}, or another job uses the same"
            " --coordinator port"
        )
    if "/RegisterTask" in log:
        late = f"not {all_of_them} joined within {job.start_timeout} s"
        if job.num_processes is None:  # the cluster determines it
            return f"{late}; --num-processes 1 trains in this process alone"
        return (
            f"{late}: start each --process-id from 0 once, with the same --coordinator and"
            " --num-processes"
        )
    if "/Heartbeat" in log or "Failed to send RPC to coordination service" in log:
        return f"process 0, which coordinates the others, was lost; {again}"
    if "'gloo" in log:
        return f"the connection to another process was lost; {again}"
    reason = re.search(r"absl::Status: (.*)", log)
    return f"JAX's runtime ended the processes: {reason[1] if reason else 'no reason logged'}"


def main() -> None:
    """Filters the log from standard input to standard error, up to its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the process
    job = Job(**json.loads(sys.argv[1]))
    kept: list[bytes] = []
    fatal = noise = False
    for line in sys.stdin.buffer:
        fatal = fatal or _FATAL.search(line) is not None
        noise = _NOISE.search(line) is not None or (noise and _CONTINUED.match(line) is not None)
        if fatal or noise:
            kept.append(line)
        else:
            _write(line)
    if fatal:
        text = b"".join(kept).decode(errors="replace")
        _write(f"{job.prog}: error: {explain(text, job)}\n".encode())


def _write(line: bytes) -> None:
    try:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
    except OSError:  # the reader may be gone
        pass


_running: list[Any] = []  # kept open until this process ends


def start(job: Job) -> None:
    """Starts this program, and redirects what C and C++ write to the standard streams to it."""
    import logging
    import os
    import subprocess

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    translator = subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, json.dumps(job._asdict())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # so that signals to the process group do not reach it
    )
    assert translator.stdin is not None  # it is a pipe
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        direct = os.dup(number)
        os.dup2(translator.stdin.fileno(), number)
        # Python itself keeps writing to the original stream, which may be a terminal.
        text = open(  # noqa: SIM115
            direct, "w", encoding=stream.encoding, errors=stream.errors, buffering=1
        )
        setattr(sys, name, text)
        for handler in logging.getLogger("capsjax").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(text)
    translator.stdin.close()
    _running.append(translator)


if __name__ == "__main__":
    main()
