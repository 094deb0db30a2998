"""Measures this project's claims about GPUs, the most important first, within a time limit.

Rows are written as by ``capsjax bench``, so that ``capsjax bench compare`` reads them. Run again
with the same file, the script continues: it skips what is recorded for this commit. Nothing else
may use the GPU meanwhile, because XLA, cuDNN and PyTorch choose algorithms by timing them.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capsjax.bench import Cell, Plan, Row, Times, read_environment, read_rows, run_cells
from capsjax.bench.cells import groups, make_cells, sweep
from capsjax.bench.processes.runner import check_targets
from capsjax.bench.workloads import choices
from capsjax.errors import ConfigError

EPOCH = 60_000  # images
SHOWN = 6  # kernels
PEER_SECONDS = 120.0  # for PyTorch to compile one step
TORCH = [name for name in choices("train_step", "implementation") if name.startswith("torch")]


class Item(NamedTuple):
    """Cells of one workload.

    Attributes:
      name: name of the item.
      workload: name of the workload.
      settings: values of the workload's parameters, to sweep.
      alternate: parameter whose values are measured in alternation, in one process.
      seconds: time limit of one process.
      check: whether to compare results with float64.
      profile: whether to trace kernels.
    """

    name: str
    workload: str
    settings: Mapping[str, Sequence[Any]]
    alternate: str = "implementation"
    seconds: float = 150.0
    check: bool = False
    profile: bool = True


def make_items(options: argparse.Namespace) -> list[Item]:
    """Returns all items, the most important first.

    Parts that are checked against float64 come before the steps that consist of them.
    """
    network = {"preset": [options.preset], "batch": [options.batch]}
    dtypes = {"dtype": options.dtypes}
    capsules = {"sizes": [options.preset], "batch": [options.batch], "direction": ["gradient"]}
    routing = {**capsules, **dtypes, "implementation": implementations("routing", options)}
    names = implementations("convolution", options)
    convolution = {**network, **dtypes, "implementation": names}
    peer = {**network, **dtypes, "implementation": ["default", *options.peers]}
    peer_seconds = 4 * options.peer_seconds
    epoch = {"examples": [EPOCH], "steps": [EPOCH // options.batch], "seeds": [1, 3]}
    return [
        Item("routing", "routing", routing, check=True),
        Item("primary", "convolution", {"layer": ["primary"], **convolution}, check=True),
        Item("steps", "train_steps", {**network, "steps": [32], **dtypes}, "dtype"),
        Item("step", "train_step", {**network, "implementation": ["default"], **dtypes}, "dtype"),
        Item("peer", "train_steps", {"steps": [32], **peer}, seconds=peer_seconds, profile=False),
        Item("call", "train_step", peer, seconds=peer_seconds, profile=False),
        Item("epoch", "train_steps", {**network, **epoch, **dtypes}, "dtype", profile=False),
        Item("conv", "convolution", {"layer": ["conv"], **convolution}, check=True),
    ]


def implementations(workload: str, options: argparse.Namespace) -> list[str]:
    """Returns implementations without the default and without the layout for other platforms."""
    other = "blocked" if options.platform == "gpu" else "lanes"
    return [name for name in choices(workload, "implementation") if name not in ("default", other)]


def is_done(row: Row, commit: str) -> bool:
    """Whether a row is a result of this commit, or a failure that would recur."""
    if row.base_environment.get("capsjax") != commit:
        return False
    if row.error is not None:
        return row.error.stage != "process"
    return row.run is not None


def describe(row: Row) -> str:
    """Describes a row in one line, followed by its most expensive kernels."""
    if row.error is not None:
        return f"{row.cell}: {row.error.stage}: {row.error.message}"
    said, steps = [], row.parameters.get("steps", 1)
    if row.run is not None:
        times = (row.run.median_seconds, row.run.least_seconds, row.run.most_seconds)
        median, least, most = (1e3 * seconds / steps for seconds in times)
        said.append(f"{median:.3f} ms ({least:.3f}-{most:.3f})" + " per step" * (steps > 1))
        if "seeds" in row.parameters:
            said.append(f"{row.run.median_seconds / row.parameters['seeds']:.3f} s per seed")
    if row.memory is not None and row.memory.temporaries is not None:
        said.append(f"{row.memory.temporaries / 1e6:.0f} MB")
    if "compile" in row.stages:
        said.append(f"compiled in {row.stages['compile'][0]:.1f} s")
    if row.profile is not None:
        said.append(f"{row.profile.launches / steps:.0f} launches" + " per step" * (steps > 1))
    if row.deviation is not None:
        said.append(f"deviation {row.deviation.found:.1e}, allowed {row.deviation.allowed:.1e}")
    lines = [f"{row.cell}: {', '.join(said)}"]
    for kernel in row.profile.kernels[:SHOWN] if row.profile else ():
        microseconds, count = 1e6 * kernel.seconds / steps, kernel.launches / steps
        lines.append(f"  {microseconds:.1f} us in {count:g} launches: {kernel.name[:70]}")
    return "\n".join(lines)


def ratio_to_best(rows: Sequence[Row]) -> str:
    """Compares steps with the fastest ones of PyTorch."""
    runs = {row.parameters["implementation"]: row.run for row in rows if row.run is not None}
    torch = [name for name in runs if name.startswith("torch")]
    if not torch or "default" not in runs:
        return "no ratio: PyTorch or capsjax was not timed"
    best = min(torch, key=lambda name: runs[name].median_seconds)
    ratio = Times(runs["default"].calls[0]).ratio(Times(runs[best].calls[0]))
    return f"default takes {ratio:.2f} of the time of {best}"


def measure(
    item: Item, group: Sequence[Cell], options: argparse.Namespace, left: float
) -> Sequence[Row]:
    """Measures cells in one process and prints their rows."""
    rows: list[Row] = []
    plan = Plan(
        output=options.output,
        repetitions=1,
        timeout=min(options.bound or item.seconds, left),
        run_seconds=options.run_seconds,
        alternate=item.alternate,
        roofline=False,
        profile=item.profile,
        check=item.check,
        peer_seconds=min(options.peer_seconds, left / 2),
    )
    run_cells(group, plan, on_row=rows.append)
    for row in rows:
        print(describe(row), flush=True)
    if item.name in ("peer", "call"):
        print(ratio_to_best(rows), flush=True)
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="file of rows, JSON lines")
    parser.add_argument("--seconds", type=float, default=800, help="time for all (default: 800)")
    parser.add_argument("--items", nargs="+", help="names of items, in order (default: all)")
    parser.add_argument("--again", action="store_true", help="measure recorded groups again")
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--preset", choices=["paper", "small"], default="paper")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--peers", nargs="+", choices=TORCH, default=TORCH, metavar="NAME")
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=PEER_SECONDS,
        help=f"time for PyTorch to compile one step (default: {PEER_SECONDS:g})",
    )
    parser.add_argument("--bound", type=float, help="time limit of each process, for all items")
    parser.add_argument(
        "--run-seconds", type=float, default=2.0, help="run time of each program (default: 2)"
    )
    options = parser.parse_args(arguments)
    known = [item.name for item in make_items(options)]
    if unknown := set(options.items or ()).difference(known):
        parser.error(f"--items must be among {', '.join(known)}, got {min(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures missing groups; exit code 2 without a GPU, 1 if something failed or time ran out."""
    begun, options = time.monotonic(), parse(arguments)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # where float64 is computed
    items = {item.name: item for item in make_items(options)}
    work = [
        (item, group)
        for item in (items[name] for name in options.items or items)
        for group in groups(
            make_cells(sweep(item.workload, item.settings), [options.platform]), item.alternate
        )
    ]
    commit, done = read_environment().capsjax, set()
    if options.output.exists() and not options.again:
        done = {row.cell for row in read_rows(options.output) if is_done(row, commit)}
    todo = [(item, group) for item, group in work if not done.issuperset(c.key for c in group)]
    print(f"{len(work) - len(todo)} of {len(work)} groups are recorded for {commit}", flush=True)
    if not todo:
        return 0
    try:
        check_targets([todo[0][1][0]])
    except ConfigError as error:
        print(f"{error}; --platform cpu tests the queue without a GPU", file=sys.stderr)
        return 2
    failed, skipped = False, 0
    for item, group in todo:
        left = options.seconds - (time.monotonic() - begun)
        # A process that is stopped yields no result.
        if left < (options.bound or item.seconds) / 2:
            skipped += 1
            continue
        for row in measure(item, group, options, left):
            deviates = row.deviation and not row.deviation.found <= row.deviation.allowed
            failed |= bool(deviates or (row.error and not row.error.is_unsupported))
    if skipped:
        print(f"no time for {skipped} groups: run again to continue")
    return int(failed or skipped > 0)


if __name__ == "__main__":
    sys.exit(main())
