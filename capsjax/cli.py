"""The command line: parses, calls, prints. Errors are one line on standard error."""

import dataclasses
import functools
import math
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

import capsjax.process as process  # `from capsjax import process` would import JAX
from capsjax.errors import CapsjaxError, CheckpointError, ConfigError
from capsjax.options import expanded, flag
from capsjax.parsing import Command, complete, imported, parse
from capsjax.version import __version__

if TYPE_CHECKING:
    from capsjax.training import Evaluation, Result

_BATCHED = ("capsjax train", "capsjax evaluate")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``capsjax``, by default with the arguments of the process."""
    process.print_any_character()
    arguments = complete(list(sys.argv[1:] if argv is None else argv))
    prog = " ".join(["capsjax", *(a for a in arguments[:1] if a in _COMMANDS)])
    try:
        try:
            _run(prog, arguments)
        finally:
            sys.stdout.flush()
    except CapsjaxError as error:
        _report(prog, str(error))
        if isinstance(error, CheckpointError):
            # Pending reads and writes of Orbax would print tracebacks while Python shuts down.
            _exit(error, error.exit_code, at_once=True)
        _exit(error, error.exit_code)
    except BrokenPipeError:
        # The reader of the output has closed it, as `head` does; buffered output is dropped.
        process.drop_output()
        sys.exit(1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _report(prog, f"{error.strerror or error}{where}")
        _exit(error, 1, at_once="://" in where)  # Orbax may still be waiting for the storage
    except RuntimeError as error:
        # XLA's error where the memory of the devices does not suffice.
        kind, _, reason = str(error).partition(": ")
        if kind != "RESOURCE_EXHAUSTED":
            raise
        reason = reason.partition("\n")[0].rstrip(".")
        advice = "; a smaller --batch-size takes less" if prog in _BATCHED else ""
        _report(prog, f"too little memory: {reason}{advice}")
        _exit(error, 1)
    except KeyboardInterrupt as interrupt:
        _report(prog, "interrupted")
        # XLA may still be compiling in another thread, which must not run while Python shuts down.
        code = 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
        _exit(interrupt, code, at_once=True)


def _exit(error: BaseException, code: int, *, at_once: bool = False) -> NoReturn:
    """Ends the process after an error that has been printed, and tells the other processes."""
    processes = sys.modules.get("capsjax.training.processes")
    if processes is not None and processes.number() > 1:
        processes.report_failure(error)
        at_once = True  # without waiting for the others
    if at_once:
        process.exit_at_once(code)
    sys.exit(code)


def _run(prog: str, arguments: Sequence[str]) -> None:
    if arguments == ["--version"]:
        print(f"capsjax {__version__}")
        return
    process.quieten_libraries()
    run = parse(prog, arguments, _COMMANDS)
    with process.interruptible():
        run()


def _train(config: Any) -> None:
    """Train a capsule network on a data set of images.

    The run directory holds the configuration, metrics as JSON lines and for TensorBoard,
    checkpoints, the test result, and a picture of test images above their reconstructions.
    """
    from capsjax.training import processes, train

    result = train(config)
    if not processes.is_first():
        return
    if result.stopped_by is not None:
        command = f"capsjax train --resume {shlex.quote(str(result.run_dir))}"
        print(
            f"stopped by {result.stopped_by.name} at step {result.step:,}; everything is saved,"
            f" resume with: {command}"
        )
        if processes.number() > 1:  # the launcher would count another code as a failure
            return
        sys.exit(128 + result.stopped_by)
    _print_result(result)


def _evaluate(config: Any) -> None:
    """Evaluate a run's checkpoint on the whole test set."""
    from capsjax.training import evaluate, processes

    evaluated = evaluate(config)
    if not processes.is_first():
        return
    test, step = evaluated.test, evaluated.step
    _print_error(f"{evaluated.dataset} test error", test)
    if test.wrong is not None:
        print(f"balanced error (mean over the classes): {test.balanced_error:.2%}")
        for name, wrong, count in zip(
            evaluated.class_names, test.class_wrong, test.class_count, strict=True
        ):
            share = f"{wrong / count:.2%}" if count else "none"
            print(f"  {name}: {share} ({wrong:,} of {count:,} wrong)")
    source = "packaged network" if step is None else f"checkpoint of step {step:,}"
    # The loss is unknown if the objective was given in Python.
    print(source if math.isnan(test.loss) else f"loss {test.loss:.4f}; {source}")
    if config.predictions is not None:
        print(f"predictions: {config.predictions}")


def _reproduce(config: Any) -> None:
    """Train the rows of a published table with several seeds.

    Writes the mean and standard deviation of their errors. Finished runs are not trained again, and
    the same command continues interrupted ones. Tables: mnist and multi_mnist (Sabour et al. 2017,
    table 1), affine, cifar10, svhn and smallnorb (the same paper's text), ablation (differences
    between the authors' code and the printed formulas), small (networks for two CPU cores).
    """
    from capsjax.reproduce import reproduce
    from capsjax.training import processes

    for row in reproduce(config):
        if not processes.is_first():
            break
        print(f"{row.title}, {row.dataset}, {row.steps:,} steps: error {row.text} %")


def _joined(run: Callable[[Any], None]) -> Callable[[Any, Any], None]:
    """Lets several processes run a command together, if there are several."""

    @functools.wraps(run)
    def join(config: Any, options: Any) -> None:
        from capsjax.training import joining, processes

        if not joining.initialize(options, command=f"capsjax {run.__name__[1:]}"):
            process.find_devices()
            run(config)
            return
        with processes.together():
            process.find_devices()
            print(joining.describe(), file=sys.stderr)
            run(config)
        process.ignore_signals()
        joining.finish()

    return join


def _bench(config: Any) -> None:
    """Benchmark XLA compilation, or compare two benchmarks (compare OLD NEW)."""
    from capsjax.bench import CompareConfig, run_benchmark, run_comparison

    compares = isinstance(config, CompareConfig)
    if code := run_comparison(config) if compares else run_benchmark(config):
        sys.exit(code)


def _draw(config: Any) -> None:
    """Draw figures of a trained network (NAME RUN), or compare runs (curves RUN RUN ...)."""
    from capsjax.viz.draw import draw

    process.find_devices()
    print(*draw(config), sep="\n")


def _explore(config: Any) -> None:
    """Explore a trained network in the browser, on this machine only; Ctrl-C stops it."""
    from capsjax.viz.explorer import explore

    process.find_devices()
    explore(config)


def _predict(config: Any) -> None:
    """Predict the classes of images, given as files or directories, with a trained network.

    Images are read and scaled as by the data set image_folder. They should look like the training
    images: MNIST's digits, for example, are white on black. Images that cannot be read are skipped
    with a warning, and the exit code is then 1.
    """
    from capsjax.training import predict

    process.find_devices()
    found = predict(config)
    print(*found.lines(), sep="\n")
    if config.output is not None:
        print(f"scores of all classes: {config.output}")
    if found.unreadable:
        sys.exit(1)


def _export(config: Any) -> None:
    """Export a trained network to StableHLO, which JAX runs without capsjax at any batch size."""
    from capsjax.training import export

    process.find_devices()
    print(f"export: {export(config)}; {config.out / 'load.py'} runs it without capsjax")


def _resumed_options(arguments: Sequence[str]) -> Any:
    """Returns the options of the run to resume, as defaults for the arguments."""
    if "--resume" not in arguments or "--help" in arguments:
        return None
    given = re.search(r"\0--run[-_]dir[=\0]([^\0]+)", "\0".join(arguments))
    if given is None:
        return None
    imported("capsjax.training:initialize")(_process_options(arguments), command="capsjax train")
    directory = imported("capsjax.training.run_directory:RunDirectory")
    return directory(expanded("--run-dir", given[1], remote=True)).read_config().train


def _process_options(arguments: Sequence[str]) -> Any:
    """Reads how processes are joined; these arguments are parsed again later with all others."""
    kind = imported("capsjax.training:ProcessOptions")
    given: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        option = f"--{field.name}".replace("_", "[-_]")
        if found := re.search(rf"\0{option}[=\0]([^\0]+)", "\0" + "\0".join(arguments)):
            text = given[field.name] = found[1]
            if field.name != "coordinator":
                try:
                    given[field.name] = int(text)
                except ValueError:
                    raise ConfigError(
                        f"{flag(field.name)} must be an integer, got {text!r}"
                    ) from None
    return kind(**given)


def _bench_options() -> Any:
    """Returns the options of a benchmark or, after ``compare``, of a comparison."""
    run, compare = (imported(f"capsjax.bench:{name}Config") for name in ("Bench", "Compare"))
    return (
        Annotated[run, tyro.conf.subcommand("run", prefix_name=False)]
        | Annotated[compare, tyro.conf.subcommand("compare", prefix_name=False)]
    )


def _command(run: Callable[..., None], options: str, extra: str | None = None) -> Command:
    return Command(run, functools.partial(imported, options, extra))


_COMMANDS = {
    "train": _command(_joined(_train), "capsjax.training:TrainConfig")._replace(
        default=_resumed_options, joins=True
    ),
    "evaluate": _command(_joined(_evaluate), "capsjax.training:EvaluateConfig")._replace(
        joins=True
    ),
    "predict": _command(_predict, "capsjax.training:PredictConfig"),
    "export": _command(_export, "capsjax.training:ExportConfig"),
    "reproduce": _command(_joined(_reproduce), "capsjax.reproduce:ReproduceConfig")._replace(
        joins=True
    ),
    "bench": Command(_bench, _bench_options, lambda _: imported("capsjax.bench:BenchConfig")()),
    "draw": _command(_draw, "capsjax.viz.draw:DrawConfig", "viz"),
    "explore": _command(_explore, "capsjax.viz.explorer:ExploreConfig", "explore"),
}


def _print_result(result: "Result") -> None:
    from capsjax.training.reporting import duration
    from capsjax.training.run_directory import RunDirectory

    assert result.test is not None  # a run that was not stopped has been tested
    _print_error("test error", result.test)
    steps = f"{result.step:,} steps"
    if result.first_step:
        steps = f"steps {result.first_step:,} to {result.step:,}"
    print(f"trained {steps} in {duration(result.seconds)}; see {result.run_dir}")
    picture = RunDirectory(result.run_dir).picture
    if picture.exists():
        print(f"test images above their reconstructions: {picture}")


def _print_error(what: str, evaluation: "Evaluation") -> None:
    """Prints the error and the metrics; for regression only the metrics."""
    if evaluation.wrong is not None:
        counts = f"{evaluation.wrong:,} of {evaluation.count:,} wrong"
        print(f"{what}: {evaluation.error:.2%} ({counts})")
    for name, value in evaluation.metrics.items():
        print(f"{what.removesuffix(' error')} {name}: {value:.4g} ({evaluation.count:,} images)")


def _report(prog: str, message: str) -> None:
    print(f"{prog}: error: {message}", file=sys.stderr)
