"""Compares the speed of training on a stream and on images that stay on the devices.

Trains in fresh processes in alternation, and prints the medians and their ratio. Further arguments
are options of ``capsjax train``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

INPUTS = ("resident", "stream")
STEPS = 50  # between two records


def speed(name: str, records: int, options: list[str]) -> float:
    """Returns the median examples per second of a fresh training run, without the first record."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        subprocess.run(
            [
                *(sys.executable, "-m", "capsjax", "train", "--input", name),
                *("--run-dir", run_dir, "--steps", str(records * STEPS)),
                *("--log-every", str(STEPS), "--checkpoint-every", str(records * STEPS)),
                *("--validation", "0", "--no-tensorboard", *options),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        speeds = [line["examples_per_second"] for line in lines if line["split"] == "train"]
    return statistics.median(speeds[1:])


def main() -> None:
    """Measures both and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of alternations (default: 5)")
    parser.add_argument(
        "--records", type=int, default=5, help=f"of {STEPS} steps each (default: 5)"
    )
    known, options = parser.parse_known_args()
    pairs = [[speed(name, known.records, options) for name in INPUTS] for _ in range(known.rounds)]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    for name, median, column in zip(INPUTS, medians, zip(*pairs, strict=True), strict=True):
        each = ", ".join(f"{value:,.0f}" for value in column)
        print(f"{name}: {median:,.0f} examples/s ({each})")
    ratios = [stream / resident for resident, stream in pairs]
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"load average of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
