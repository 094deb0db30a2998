"""Several real processes on this machine that run a command of capsjax as one."""

import contextlib
import functools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from forking import Forked

SECONDS = 240  # that a job may take on a busy machine

# A network that compiles quickly.
NETWORK = ("--preset", "baseline", "--override", "conv_features=4", "dense_features=8")
EVERY = ("--batch-size", "16", "--log-every", "4", "--checkpoint-every", "7", "--validation", "20")

# A run that waits at a step until a file is there.
WAITING = """
import pathlib, sys, time
from capsjax.__main__ import main
from capsjax.training import loop

def advance(run, progress, *rest):
    while progress.step == int(sys.argv[1]) and not pathlib.Path(sys.argv[2]).exists():
        time.sleep(0.05)
    started(run, progress, *rest)

started, loop._advance = loop._advance, advance
main(sys.argv[3:])
"""


def free_port():
    """A port that the system gives to no connection, as it might to one of another test."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def saved(run):
    """The steps of a run's checkpoints."""
    names = [path.parent.name for path in run.glob("checkpoints/*/commit_success.txt")]
    return sorted(int(name) for name in names if name.isdecimal())  # others are being written


_start = functools.partial(subprocess.Popen, stdin=subprocess.DEVNULL, start_new_session=True)


class Process:
    """One process of a job, whose standard streams are files."""

    def __init__(
        self, number, command, log, *, devices, environment=None, directory=None, forked=False
    ):
        self.number, self.log = number, Path(log)
        flags = re.sub(
            r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
        )
        flags += f" --xla_force_host_platform_device_count={devices}"
        start = Forked if forked else _start
        with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
            self._process = start(
                [*map(str, command)],
                cwd=directory,
                env={**os.environ, "XLA_FLAGS": flags, **(environment or {})},
                stdout=out,
                stderr=err,
            )

    @property
    def pid(self):
        return self._process.pid

    @property
    def code(self):
        return self._process.poll()

    @property
    def out(self):
        return Path(f"{self.log}.out").read_text(errors="replace")

    @property
    def err(self):
        return Path(f"{self.log}.err").read_text(errors="replace")

    @property
    def messages(self):
        """The lines of its standard error, without those of JAX's runtime."""
        return [line for line in self.err.splitlines() if not re.match(r"[IWEF]\d{4} ", line)]

    @property
    def errors(self):
        """The lines of its standard error that are errors; at least one if it was aborted."""
        # Another program writes that line, and may end a moment later.
        end = time.monotonic() + 10
        while True:
            found = [line for line in self.err.splitlines() if ": error: " in line]
            if found or self.code != -signal.SIGABRT or time.monotonic() > end:
                return found
            time.sleep(0.05)

    def send(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """Ends it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Job:
    """Processes that run a command as one; on leaving, none of them is left.

    Args:
      folder: for their logs.
      arguments: of the command, for all; or a function of the process's number.
      processes: number of them.
      devices: CPU devices of each, or of all a sequence.
      heartbeat: seconds.
      start: seconds.
      program: arguments of Python before the command's.
      environment: variables.
      numbers: which processes are started, and how often; each once if not given.
      told: the number of processes that each is told, if not the true one.
      directory: the working directory of a process, a function of its number.
      host: of process 0.
      prefix: words before the command of a process, a function of its number.
      forked: whether commands without a prefix are forked from a process that has imported capsjax.
    """

    def __init__(
        self,
        folder,
        arguments,
        *,
        processes=2,
        devices=2,
        heartbeat=20,
        start=60,
        program=("-m", "capsjax"),
        environment=None,
        numbers=None,
        told=None,
        directory=None,
        host="127.0.0.1",
        prefix=lambda number: (),
        forked=True,
    ):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.processes = []
        counts = [devices] * (processes + 1) if isinstance(devices, int) else devices
        for number in range(processes) if numbers is None else numbers:
            own = arguments(number) if callable(arguments) else arguments
            joined = [
                *("--coordinator", f"{host}:{self.port}"),
                *("--num-processes", processes if told is None else told[number]),
                *("--process-id", number, "--heartbeat-timeout", heartbeat),
                *("--start-timeout", start),
            ]
            log = Path(folder) / f"process-{len(self.processes)}"
            command = [*prefix(number), sys.executable, *program, *own, *joined]
            self.processes.append(
                Process(
                    number,
                    command,
                    log,
                    devices=counts[number],
                    environment=environment,
                    directory=None if directory is None else directory(number),
                    forked=forked and not prefix(number),
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for process in self.processes:
            process.kill()
        if kind is not None:
            print(self.logs())

    def __getitem__(self, number):
        return self.processes[number]

    def logs(self):
        return "\n".join(
            f"--- process {p.number}, code {p.code}\n{p.out}\n{p.err}" for p in self.processes
        )

    def until(self, condition, what, seconds=SECONDS):
        """Waits until something holds while all processes live."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not in {seconds} s\n{self.logs()}"
            dead = [p for p in self.processes if p.code is not None]
            assert not dead or condition(), f"{what}: a process ended\n{self.logs()}"
            time.sleep(0.2)  # the condition may ask object storage

    def wait(self, *numbers, seconds=SECONDS):
        """Waits for the end of these processes, or of all, and returns their exit codes."""
        end = time.monotonic() + seconds
        processes = [self.processes[n] for n in numbers] or self.processes
        while any(p.code is None for p in processes):
            assert time.monotonic() < end, f"a process has not ended in {seconds} s\n{self.logs()}"
            time.sleep(0.05)
        return [p.code for p in processes]


class Launched(Job):
    """Commands, of launchers or to be forked, each with its environment."""

    def __init__(self, folder, commands, environments, forked=False):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.processes = [
            Process(
                number,
                command,
                Path(folder) / f"{number}",
                devices=1,
                environment=variables,
                forked=forked,
            )
            for number, (command, variables) in enumerate(zip(commands, environments, strict=True))
        ]
