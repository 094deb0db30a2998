"""Kills, stops, signals and disconnects processes that train together, and checks the run.

    python scripts/pods_evidence.py OUT.jsonl [SCENARIO ...]

The processes are real ones on this machine. Random numbers come from a fixed seed. Each line of OUT
is one trial; the exit code is not 0 if a trial failed. The scenarios disk and network need root.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsjax.data import Dataset, Split, load, save_npz
from capsjax.training import Checkpoints
from capsjax.version import __version__

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from jobs import EVERY, NETWORK, Job, saved

HEARTBEAT, START = 20, 40
PATIENCE = HEARTBEAT + 20  # seconds within which the others must end
STEPS = 140
SHAPES = {"2x2": (2, 2), "4x1": (4, 1)}


@dataclasses.dataclass
class Bench:
    """State shared by trials: a folder, the data, random numbers, and whole runs of each shape."""

    folder: Path
    out: Path
    random: random.Random
    whole: dict[str, tuple[Path, float, float]] = dataclasses.field(default_factory=dict)
    failures: int = 0
    trial: int = 0

    def arguments(self, run: Path, steps: int = STEPS) -> list[str]:
        """Returns the command that trains a small network."""
        data = str(self.folder / "digits.npz")
        command = ["train", "--dataset", data, *NETWORK, *EVERY, "--no-tensorboard"]
        return [*command, "--steps", str(steps), "--run-dir", str(run), "--auto-resume"]

    def job(self, name: str, run: Path, shape: str, steps: int = STEPS, **settings: Any) -> Job:
        """Starts processes that train together."""
        processes, devices = SHAPES[shape]
        counts = {"processes": processes, "devices": devices, "heartbeat": HEARTBEAT}
        counts["forked"] = False  # commands as a user gives them
        arguments = self.arguments(run, steps)
        return Job(self.folder / name, arguments, start=START, **{**counts, **settings})

    def uninterrupted(self, shape: str) -> tuple[Path, float, float]:
        """Returns an undisturbed run, its seconds, and those until all processes had joined."""
        if shape not in self.whole:
            run, start = self.folder / f"whole-{shape}", time.monotonic()
            with self.job(f"whole-{shape}-log", run, shape) as job:
                wait_until_joined(job)
                joined = time.monotonic() - start
                check(set(job.wait()) == {0}, "an uninterrupted job failed")
            self.whole[shape] = run, time.monotonic() - start, joined
        return self.whole[shape]

    @contextlib.contextmanager
    def recorded(self, scenario: str, shape: str) -> Iterator[dict[str, Any]]:
        """Records a trial, even if it fails."""
        self.trial += 1
        record: dict[str, Any] = {"scenario": scenario, "shape": shape, "passed": True}
        try:
            yield record
        except AssertionError as error:
            record |= {"passed": False, "reason": str(error)[:2000]}
            self.failures += 1
        record |= machine()
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record)[:300], flush=True)

    def check_resumed(self, record: dict[str, Any], run: Path, shape: str) -> None:
        """Starts the same command again, and compares its final state bit for bit."""
        record["saved"] = max(saved(run), default=0)
        with self.job(f"{self.trial}-again", run, shape) as job:
            check(set(job.wait()) == {0}, f"the job did not go on: {job.logs()}")
        whole, *_ = self.uninterrupted(shape)
        jax.tree.map(np.testing.assert_array_equal, state(run), state(whole))
        record["identical"] = True


def check(condition: bool, what: str) -> None:
    """Raises an AssertionError, even if Python omits assertions."""
    if not condition:
        raise AssertionError(what)


def machine() -> dict[str, str]:
    """Returns where and when a trial ran."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    return {
        "machine": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "capsjax": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def state(run: Path) -> Any:
    """Returns the last checkpoint of a run."""
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    found = checkpoints._manager.restore(checkpoints.choose("last"))
    checkpoints.close()
    return found


def wait_for(job: Job, seconds: float) -> None:
    """Waits for some seconds, or until all processes have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(p.code is None for p in job.processes):
        time.sleep(0.05)


def wait_until_joined(job: Job) -> None:
    """Waits until each process has reported its index."""
    job.until(lambda: all("process " in p.err for p in job.processes), "joining")


def check_lines(job: Job, record: dict[str, Any], numbers: list[int]) -> None:
    """Checks that each of these processes has reported one error."""
    record["lines"] = sorted({line for number in numbers for line in job[number].errors})
    counts = [len(job[number].errors) for number in numbers]
    check(set(counts) <= {1}, f"not one line each: {job.logs()}")


def kill(bench: Bench, shape: str) -> None:
    """SIGKILL to a random process at a random time; the others end, and the job can be resumed."""
    _, seconds, _ = bench.uninterrupted(shape)
    run = bench.folder / f"run-{bench.trial}"
    with bench.recorded("SIGKILL", shape) as record:
        with bench.job(f"{bench.trial}", run, shape) as job:
            number = bench.random.randrange(len(job.processes))
            at = bench.random.uniform(0, 0.9 * seconds)
            wait_for(job, at)
            others = [n for n in range(len(job.processes)) if n != number]
            record |= {"process": number, "at": round(at, 1)}
            ended = [p.code is not None for p in job.processes]
            if not all(ended):
                job[number].send(signal.SIGKILL)
            start = time.monotonic()
            codes = job.wait(seconds=START + PATIENCE)
            record |= {"codes": codes, "ended_after": round(time.monotonic() - start, 1)}
            if not any(ended):
                if saved(run):
                    check(record["ended_after"] <= PATIENCE, "the others took too long")
                over = (run / "result.json").exists()
                check(over or all(codes[n] != 0 for n in others), f"it went on: {job.logs()}")
                check_lines(job, record, [n for n in others if codes[n]])
        bench.check_resumed(record, run, shape)


def stop(bench: Bench, shape: str) -> None:
    """SIGSTOP to a random process; the others notice, and so does it when it continues."""
    run = bench.folder / f"run-{bench.trial}"
    with (
        bench.recorded("SIGSTOP", shape) as record,
        bench.job(f"{bench.trial}", run, shape, steps=10**6) as job,
    ):
        job.until(lambda: saved(run), "a checkpoint")
        number = bench.random.randrange(len(job.processes))
        wait_for(job, bench.random.uniform(0, 5))
        job[number].send(signal.SIGSTOP)
        start = time.monotonic()
        others = [n for n in range(len(job.processes)) if n != number]
        while any(job[n].code is None for n in others):
            check(time.monotonic() < start + PATIENCE, f"not noticed: {job.logs()}")
            time.sleep(0.05)
        record |= {"process": number, "noticed_after": round(time.monotonic() - start, 1)}
        check_lines(job, record, others)
        job[number].send(signal.SIGCONT)
        record["codes"] = job.wait(seconds=PATIENCE)
        check(0 not in record["codes"], f"a process ended well: {job.logs()}")


def ask(bench: Bench, shape: str) -> None:
    """SIGTERM to a random process at a random time after joining; all save the same step."""
    _, seconds, joined = bench.uninterrupted(shape)
    run = bench.folder / f"run-{bench.trial}"
    uncached = {"environment": {"JAX_ENABLE_COMPILATION_CACHE": "false"}}
    with bench.recorded("SIGTERM", shape) as record:
        with bench.job(f"{bench.trial}", run, shape, **uncached) as job:
            wait_until_joined(job)
            number = bench.random.randrange(len(job.processes))
            at = bench.random.uniform(0, 0.9 * (seconds - joined))
            wait_for(job, at)
            start = time.monotonic()
            if job[number].code is None:
                job[number].send(signal.SIGTERM)
            last = [line for line in job[0].err.splitlines() if line][-1]
            record |= {"process": number, "at": round(at, 1), "while": last[:60]}
            record["codes"] = job.wait()
            record["ended_after"] = round(time.monotonic() - start, 1)
            check(set(record["codes"]) == {0}, f"codes {record['codes']}: {job.logs()}")
            found = re.match(r"(stopped by SIGTERM|interrupted).* step ([\d,]+)", job[0].out)
            if found is not None:
                record["step"] = int(found[2].replace(",", ""))
                check(record["step"] in (*saved(run), 0), f"not saved: {job.logs()}")
            else:
                check(job[0].out.startswith("test error"), job.logs())
            check(not any(p.out for p in job.processes[1:]), "another process spoke")
        bench.check_resumed(record, run, shape)


def disk(bench: Bench, shape: str) -> None:
    """The disk of process 0 is full: each prints one line, and the last checkpoint is whole."""
    folder = bench.folder / f"disk-{bench.trial}"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    with bench.recorded("full disk", shape) as record:
        subprocess.run(command, check=True)
        try:
            with bench.job(f"{bench.trial}", folder / "run", shape) as job:
                job.until(lambda: saved(folder / "run"), "a checkpoint")
                with contextlib.suppress(OSError), (folder / "filler").open("wb") as file:
                    while True:
                        file.write(bytes(2**12))
                record["codes"] = job.wait()
                check(not set(record["codes"]) & {0}, f"all is well: {job.logs()}")
                check_lines(job, record, list(range(len(job.processes))))
            (folder / "filler").unlink()
            record["whole"] = int(state(folder / "run")["step"]) if saved(folder / "run") else 0
        finally:
            subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    names = ("capsjax-0", "capsjax-1")
    etc = [Path("/etc/netns") / name for name in names]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for number, (name, folder) in enumerate(zip(names, etc, strict=True)):
            ip("netns", "add", name)
            folder.mkdir(parents=True)
            # CPU collectives listen at the address of this machine's host name.
            hosts = f"127.0.0.1 localhost\n10.77.0.{number + 1} {platform.node()}\n"
            (folder / "hosts").write_text(hosts)
        ip(
            "link",
            "add",
            "cj0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "cj1",
            "netns",
            names[1],
        )
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cj{number}")
            ip("-n", name, "link", "set", f"cj{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name, folder in zip(names, etc, strict=True):
            subprocess.run(["ip", "netns", "delete", name], check=False)
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()


def network(bench: Bench, shape: str, seconds: float | None) -> None:
    """The link between two hosts is cut, for some seconds or for good."""
    bench.uninterrupted(shape)
    run = bench.folder / f"run-{bench.trial}"
    what = "link cut" if seconds is None else f"link cut for {seconds} s"
    with bench.recorded(what, shape) as record, two_hosts() as names:
        prefix = [["ip", "netns", "exec", name] for name in names]
        settings = {"prefix": lambda n: prefix[n], "host": "10.77.0.1"}
        with bench.job(f"{bench.trial}", run, shape, **settings) as job:
            job.until(lambda: saved(run), "a checkpoint")
            cable = ["ip", "-n", names[0], "link", "set", "cj0"]
            subprocess.run([*cable, "down"], check=True)
            start = time.monotonic()
            if seconds is not None:
                wait_for(job, seconds)
                subprocess.run([*cable, "up"], check=True)
                codes = job.wait()
            else:
                codes = job.wait(seconds=PATIENCE)
            record |= {"codes": codes, "ended_after": round(time.monotonic() - start, 1)}
            if set(codes) != {0}:
                check_lines(job, record, [0, 1])
        bench.check_resumed(record, run, shape)


def equality(bench: Bench, shape: str) -> None:
    """Measures how much the parameters of several processes differ from those of one."""
    with bench.recorded("equality", shape) as record:
        run = bench.folder / f"run-{bench.trial}"
        again, alone = run.with_name(f"{run.name}-again"), run.with_name(f"{run.name}-alone")
        whole, *_ = bench.uninterrupted(shape)
        with bench.job(f"{bench.trial}", again, shape) as job:
            check(set(job.wait()) == {0}, job.logs())
        processes, devices = SHAPES[shape]
        one = {"processes": 1, "devices": processes * devices}
        with bench.job(f"{bench.trial}-alone", alone, shape, **one) as job:
            check(set(job.wait()) == {0}, job.logs())
        jax.tree.map(np.testing.assert_array_equal, state(whole), state(again))
        found, expected = (state(path)["params"] for path in (whole, alone))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        scaled = [float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs]
        record |= {"identical": True, "steps": STEPS, "largest_relative_difference": max(scaled)}


SCENARIOS = {
    "equality": [(equality, shape) for shape in SHAPES],
    "kill": [(kill, shape) for shape in SHAPES for _ in range(10)],
    "stop": [(stop, shape) for shape in ("2x2", "4x1", "2x2", "4x1", "2x2")],
    "ask": [(ask, shape) for shape in SHAPES for _ in range(5)],
    "disk": [(disk, "2x2")],
    "network": [(network, "2x2", 5), (network, "2x2", None)],
}


def main() -> None:
    """Runs the scenarios, and prints how many trials failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="file to append records to")
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    full = load("mnist_5k")
    sizes = ((full.train, 180), (full.test, 101))
    train, test = (Split(split.images[:n], split.labels[:n]) for split, n in sizes)
    with tempfile.TemporaryDirectory(prefix="pods-evidence-") as folder:
        # As in the tests, compilation is cheap: speed does not matter here.
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/cache"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        bench = Bench(Path(folder), options.out.resolve(), random.Random(options.seed))
        small = Dataset("mnist_5k", train, test, full.class_names)
        save_npz(small, bench.folder / "digits.npz")
        for name in options.scenarios or SCENARIOS:
            for trial, *values in SCENARIOS[name]:
                trial(bench, *values)
    print(f"{bench.trial} trials, {bench.failures} failed")
    sys.exit(bool(bench.failures))


if __name__ == "__main__":
    main()
