"""The command line: parse, call, print. Errors are one line, with exit code 2."""

import contextlib
import importlib
import io
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from capsjax.bench import RowError, TargetError, read_rows
from capsjax.bench.compare import COUNTS, TIMES, compare_rows
from capsjax.bench.config import BenchConfig, BenchError, CompareConfig
from capsjax.bench.display import Display, comparison_table, console, is_telling, summary
from capsjax.bench.report import ReportError, write_report
from capsjax.bench.rows import Row
from capsjax.bench.running import run_cells
from capsjax.bench.workloads import WorkloadError
from capsjax.data import DataError
from capsjax.reproduce import ReproduceConfig, reproduce
from capsjax.training import (
    CheckpointError,
    ConfigError,
    DivergedError,
    EvaluateConfig,
    Evaluation,
    Result,
    TrainConfig,
    evaluate,
    train,
)
from capsjax.training.run_directory import RunDirectory
from capsjax.version import __version__

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``capsjax``; the arguments are those of the process when None."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"capsjax {__version__}")
    elif arguments[:1] == ["train"]:
        train_main("capsjax train", arguments[1:])
    elif arguments[:1] == ["evaluate"]:
        evaluate_main("capsjax evaluate", arguments[1:])
    elif arguments[:1] == ["reproduce"]:
        reproduce_main("capsjax reproduce", arguments[1:])
    elif arguments[:2] == ["bench", "compare"]:
        compare_main("capsjax bench compare", arguments[2:])
    elif arguments[:1] == ["bench"]:
        bench_main("capsjax bench", arguments[1:])
    elif arguments[:1] == ["draw"]:
        draw_main("capsjax draw", arguments[1:])
    elif arguments[:1] == ["explore"]:
        explore_main("capsjax explore", arguments[1:])
    else:
        # Help, or an error: no command was named.
        _parse(
            "capsjax",
            lambda: tyro.extras.subcommand_cli_from_dict(
                {
                    "train": TrainConfig,
                    "evaluate": EvaluateConfig,
                    "reproduce": ReproduceConfig,
                    "bench": BenchConfig,
                    "draw": _draw,
                    "explore": _explore,
                },
                prog="capsjax",
                description=f"Capsule networks for JAX, version {__version__}.",
                args=arguments,
            ),
        )


def train_main(prog: str = "train.py", argv: Sequence[str] | None = None) -> None:
    """Runs ``capsjax train`` or ``scripts/train.py``."""
    given = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--model(?==|$)", "--preset", argument) for argument in given]

    def parse(default: TrainConfig | None = None) -> TrainConfig:
        if default is None:
            return _parse(prog, lambda: tyro.cli(TrainConfig, prog=prog, args=argv))
        return _parse(prog, lambda: tyro.cli(TrainConfig, prog=prog, args=argv, default=default))

    config = parse()

    def command() -> None:
        if config.resume and config.run_dir is not None:
            # Parsed again over the run's own options, so that only what is given may differ.
            started = RunDirectory(config.run_dir).read_config().train
            _print_result(prog, train(parse(started)))
        else:
            _print_result(prog, train(config))

    _run(prog, command)


def evaluate_main(prog: str = "evaluate.py", argv: Sequence[str] | None = None) -> None:
    """Runs ``capsjax evaluate`` or ``scripts/evaluate.py``."""
    positional = (tyro.conf.PositionalRequiredArgs,)
    config = _parse(prog, lambda: tyro.cli(EvaluateConfig, prog=prog, args=argv, config=positional))

    def command() -> None:
        evaluated = evaluate(config)
        _print_error(f"{evaluated.dataset} test error", evaluated.test)
        print(f"loss {evaluated.test.loss:.4f}; checkpoint of step {evaluated.step:,}")

    _run(prog, command)


def reproduce_main(prog: str = "reproduce.py", argv: Sequence[str] | None = None) -> None:
    """Runs ``capsjax reproduce`` or ``scripts/reproduce.py``."""
    positional = (tyro.conf.PositionalRequiredArgs,)
    config = _parse(
        prog, lambda: tyro.cli(ReproduceConfig, prog=prog, args=argv, config=positional)
    )

    def command() -> None:
        for row in reproduce(config):
            print(f"{row.title}, {row.dataset}, {row.steps:,} steps: error {row.text} %")

    _run(prog, command)


def bench_main(prog: str = "benchmark_xla.py", argv: Sequence[str] | None = None) -> None:
    """Runs ``capsjax bench`` or ``scripts/benchmark_xla.py``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        compare_main(f"{prog} compare", arguments[1:])
        return
    # The suite without its option's name: capsjax bench routing.
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--suite")
    sys.path.insert(0, os.getcwd())  # where the user's own functions are
    config = _parse(
        prog, lambda: tyro.cli(BenchConfig, prog=prog, args=_flags_as_values(arguments))
    )

    def command() -> None:
        plan = config.plan()
        cells = config.left(plan)
        rows = read_rows(plan.output) if plan.output.exists() else []
        try:
            with Display(len(cells) * plan.repetitions, rows) as display:
                done = itertools.count(plan.repetitions, plan.repetitions)
                run_cells(
                    cells,
                    plan,
                    on_start=display.start,
                    on_row=lambda row: display.row(row, next(done)),
                )
        except KeyboardInterrupt:
            print(f"stopped; go on with the same options and: --resume --output {plan.output}")
            raise
        print(f"rows: {plan.output}")
        rows = read_rows(plan.output)
        if config.report and rows:
            _write_report(rows, plan.output)
        if failed := sum(row["status"] != "ok" for row in rows):
            print(f"{failed} of {len(rows)} cells failed")

    _run(prog, command)


def _flags_as_values(arguments: Sequence[str]) -> list[str]:
    """Flags of XLA begin with dashes, as options do: with a space before them they are values."""
    values, after = [], False
    for argument in arguments:
        is_flag = argument.startswith("--xla_")
        values.append(f" {argument}" if after and is_flag else argument)
        after = argument == "--xla-flag" or (after and (is_flag or not argument.startswith("-")))
    return values


def _write_report(rows: list[Row], output: Path) -> None:
    page = output.with_suffix(".html")
    try:
        write_report(rows, page, title=f"capsjax bench: {output.stem}")
    except ReportError as error:
        print(error)
    else:
        print(f"report: {page}")


def compare_main(prog: str, argv: Sequence[str]) -> None:
    """Runs ``capsjax bench compare OLD NEW``."""
    positional = (tyro.conf.PositionalRequiredArgs,)
    config = _parse(prog, lambda: tyro.cli(CompareConfig, prog=prog, args=argv, config=positional))

    def command() -> None:
        measures = config.measure or (*TIMES, *COUNTS)
        if unknown := set(measures) - {*TIMES, *COUNTS}:
            raise BenchError(
                f"--measure must be among {', '.join((*TIMES, *COUNTS))}, got {min(unknown)}"
            )
        comparison = compare_rows(read_rows(config.old), read_rows(config.new), measures=measures)
        if not comparison.ratios and not comparison.broken:
            raise BenchError(f"{config.old} and {config.new} have no cell in common")
        shown = [r for r in comparison.ratios if config.all or is_telling(r)]
        if shown:
            console().print(comparison_table(shown, config.threshold))
        for cell in comparison.broken:
            print(f"fails now: {cell}")
        print(summary(comparison, config.threshold))
        if comparison.broken or comparison.worse(config.threshold):
            sys.exit(1)

    _run(prog, command)


def draw_main(prog: str, argv: Sequence[str]) -> None:
    """Runs ``capsjax draw``."""
    viz = _extra(prog, "capsjax.viz.draw", "viz")
    positional = (tyro.conf.PositionalRequiredArgs,)
    config = _parse(prog, lambda: tyro.cli(viz.DrawConfig, prog=prog, args=argv, config=positional))
    _run(prog, lambda: print(*viz.draw(config), sep="\n"))


def explore_main(prog: str, argv: Sequence[str]) -> None:
    """Runs ``capsjax explore``."""
    viz = _extra(prog, "capsjax.viz.explorer", "explore")
    positional = (tyro.conf.PositionalRequiredArgs,)
    config = _parse(
        prog, lambda: tyro.cli(viz.ExploreConfig, prog=prog, args=argv, config=positional)
    )
    _run(prog, lambda: viz.explore(config))


def _draw() -> None:
    """Draw what a trained network computes: diagrams, maps, reconstructions, curves."""


def _explore() -> None:
    """Look at a trained network in a browser: draw digits, move dimensions, overlay two."""


def _extra(prog: str, module: str, extra: str) -> Any:
    """A module that stands on packages that only an extra brings."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        _fail(prog, f'needs the package {error.name}: pip install "capsjax[{extra}]"', 2)


def _print_result(prog: str, result: Result) -> None:
    if result.stopped_by is not None:
        print(
            f"stopped by {result.stopped_by.name} at step {result.step:,}, everything saved;"
            f" go on with: {prog} --resume --run-dir {result.run_dir}"
        )
        sys.exit(128 + result.stopped_by)
    assert result.test is not None  # a run that was not stopped has been tested
    _print_error("test error", result.test)
    steps = (
        f"steps {result.first_step:,} to {result.step:,}"
        if result.first_step
        else (f"{result.step:,} steps")
    )
    print(f"trained {steps} in {_duration(result.seconds)}; see {result.run_dir}")
    picture = RunDirectory(result.run_dir).picture
    if picture.exists():
        print(f"test images over their reconstructions: {picture}")


def _print_error(what: str, evaluation: Evaluation) -> None:
    print(f"{what}: {evaluation.error:.2%} ({evaluation.wrong:,} of {evaluation.count:,} wrong)")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _parse(prog: str, parse: Callable[[], T]) -> T:
    """Parses options; what tyro says of a wrong one in a box is said in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        _fail(prog, f"{_in_one_line(said.getvalue())} (see {prog} --help)", 2)
    except (ConfigError, BenchError) as error:
        _fail(prog, str(error), 2)


def _in_one_line(box: str) -> str:
    """The error, and the first suggestion, of a box that tyro draws."""
    parts = [""]
    for line in box.splitlines()[1:]:  # the first is the title
        # A rule or the foot; tyro draws in ASCII where the terminal knows no more.
        if re.fullmatch(r"╰.*|[─│\s-]*", line):
            parts.append("")
        else:
            parts[-1] = f"{parts[-1]} {line.strip('│| ')}".strip()
    parts = [part for part in parts if part]
    message = re.sub(r"^Error parsing \w+Config: ", "", parts[0]).rstrip(".")
    message = re.sub(
        r"^Error parsing (--\S+): no type matching .* could be instantiated from \[(.*)\]",
        r"\1 cannot be \2",
        message,
    )
    for part in parts[1:]:
        if suggestion := re.match(r"Perhaps you meant: (--\S+)", part):
            message += f"; perhaps you meant {suggestion[1]}"
        elif part.startswith("Available"):
            message += f"; {part[0].lower()}{part[1:]}"
    return message


def _run(prog: str, command: Callable[[], None]) -> None:
    _quieten_libraries()
    try:
        command()
    except (ConfigError, DataError, BenchError, TargetError, WorkloadError, RowError) as error:
        _fail(prog, str(error), 2)
    except CheckpointError as error:
        with contextlib.suppress(SystemExit):
            _fail(prog, str(error), 2)
        # Reads and writes that Orbax gave up on would end in tracebacks while Python shuts down.
        _exit_at_once(2)
    except DivergedError as error:
        _fail(prog, str(error), 1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _fail(prog, f"{error.strerror or error}{where}", 1)
    except KeyboardInterrupt:
        with contextlib.suppress(SystemExit):
            _fail(prog, "interrupted", 130)
        # XLA may still be compiling in another thread, which Python must not be taken from.
        _exit_at_once(130)


def _quieten_libraries() -> None:
    """What matters of other libraries' messages reaches the user as an error of ours."""
    ours = logging.getLogger("capsjax")
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())
    ours.setLevel(logging.INFO)
    ours.propagate = False
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    told = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        # At its first error Orbax closes the event loop on which other reads and writes go on:
        # each of them would tell of it, as would each coroutine that is dropped.
        code = getattr(unraisable.object, "cr_code", None)
        dropped = code is not None and "orbax" in code.co_filename
        if not dropped and str(unraisable.exc_value) != "Event loop is closed":
            told(unraisable)

    sys.unraisablehook = hook


def _exit_at_once(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(prog: str, message: str, code: int) -> NoReturn:
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(code)
