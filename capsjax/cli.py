"""The command line: parse, call, print. An error is one line on standard error.

Options are dataclasses that are imported once it is known which command runs, so that
``capsjax --help`` does not wait for JAX.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import tyro

import capsjax.process as process  # `from capsjax import process` would import JAX
from capsjax.errors import CapsjaxError, CheckpointError, ConfigError, how_to_install
from capsjax.version import __version__

if TYPE_CHECKING:
    from capsjax.training import Evaluation, Result

_TYRO = (tyro.conf.PositionalRequiredArgs, tyro.conf.CascadeSubcommandArgs)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``capsjax``; the arguments are those of the process when None."""
    process.print_any_character()
    arguments = _complete(list(sys.argv[1:] if argv is None else argv))
    prog = " ".join(["capsjax", *(a for a in arguments[:1] if a in _COMMANDS)])
    try:
        try:
            _run(prog, arguments)
        finally:
            sys.stdout.flush()
    except CapsjaxError as error:
        _report(prog, str(error))
        if isinstance(error, CheckpointError):
            # Reads and writes that Orbax gave up on would end in tracebacks while Python shuts
            # down.
            _exit(error, error.exit_code, at_once=True)
        _exit(error, error.exit_code)
    except BrokenPipeError:
        # The reader of the output has left, as `head` does; what is still buffered goes nowhere.
        process.drop_output()
        sys.exit(1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _report(prog, f"{error.strerror or error}{where}")
        _exit(error, 1)
    except KeyboardInterrupt as interrupt:
        _report(prog, "interrupted")
        # XLA may still be compiling in another thread, which Python must not be taken from.
        code = 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
        _exit(interrupt, code, at_once=True)


def _exit(error: BaseException, code: int, *, at_once: bool = False) -> NoReturn:
    """Ends the process after an error that has been printed, and tells the other processes."""
    processes = sys.modules.get("capsjax.training.processes")
    if processes is not None and processes.number() > 1:
        processes.report_failure(error)
        at_once = True  # and not wait for the others
    if at_once:
        process.exit_at_once(code)
    sys.exit(code)


def _run(prog: str, arguments: Sequence[str]) -> None:
    if arguments == ["--version"]:
        print(f"capsjax {__version__}")
        return
    run = _parse(prog, arguments)
    process.quieten_libraries()
    with process.interruptible():
        run()


def _train(config: Any) -> None:
    """Train a capsule network on a set of images.

    The run directory receives the configuration, metrics as JSON lines and for TensorBoard,
    checkpoints, the test result, and a picture of test images over their reconstructions.
    """
    from capsjax.training import processes, train

    result = train(config)
    if not processes.is_first():
        return
    if result.stopped_by is not None:
        command = f"capsjax train --resume --run-dir {shlex.quote(str(result.run_dir))}"
        print(
            f"stopped by {result.stopped_by.name} at step {result.step:,}, everything saved;"
            f" go on with: {command}"
        )
        if processes.number() > 1:  # whose launcher would count them as failed
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
        print(f"balanced error, the mean over the classes: {test.balanced_error:.2%}")
        for name, wrong, count in zip(
            evaluated.class_names, test.class_wrong, test.class_count, strict=True
        ):
            share = f"{wrong / count:.2%}" if count else "none"
            print(f"  {name}: {share} ({wrong:,} of {count:,} wrong)")
    source = "network of the package" if step is None else f"checkpoint of step {step:,}"
    # That of an objective that was given in Python is not known here.
    print(source if math.isnan(test.loss) else f"loss {test.loss:.4f}; {source}")
    if config.predictions is not None:
        print(f"predictions: {config.predictions}")


def _reproduce(config: Any) -> None:
    """Train the rows of a published table with several seeds.

    Writes mean and standard deviation of their errors. Finished runs are not trained again; the
    same command goes on with what was cut short. Tables: mnist and multi_mnist (Sabour et al. 2017,
    table 1), affine, cifar10, svhn and smallnorb (the same paper's text), ablation (the authors'
    code against the formulas as printed), small (networks for two processor cores).
    """
    from capsjax.reproduce import reproduce
    from capsjax.training import processes

    for row in reproduce(config):
        if not processes.is_first():
            break
        print(f"{row.title}, {row.dataset}, {row.steps:,} steps: error {row.text} %")


def _join(run: Callable[[Any], None], prog: str, config: Any, options: Any) -> None:
    """Runs a command as one of several processes, or alone."""
    from capsjax.training import processes

    if not processes.initialize(options, command=prog):
        process.find_devices()
        run(config)
        return
    with processes.together():
        process.find_devices()
        print(processes.describe(), file=sys.stderr)
        run(config)
    processes.finish()


def _bench(config: Any) -> None:
    """Benchmark XLA compilation, or compare two benchmarks (compare OLD NEW)."""
    from capsjax.bench import CompareConfig, run_benchmark, run_comparison

    compares = isinstance(config, CompareConfig)
    if code := run_comparison(config) if compares else run_benchmark(config):
        sys.exit(code)


def _draw(config: Any) -> None:
    """Draw what a trained network computes: NAME RUN, or curves RUN RUN ... to compare runs."""
    from capsjax.viz.draw import draw

    process.find_devices()
    print(*draw(config), sep="\n")


def _explore(config: Any) -> None:
    """Explore a trained network in the browser, on this machine only; Ctrl-C stops it."""
    from capsjax.viz.explorer import explore

    process.find_devices()
    explore(config)


def _predict(config: Any) -> None:
    """Predict the classes of images, files or directories, with a trained network.

    Images are read and scaled as image_folder reads them. They should look like those of the
    training: MNIST's digits, for example, are white on black. Ends with 1 if an image could not be
    read; the others are predicted all the same.
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
    """Export a trained network to StableHLO, to be run by jax without capsjax, for any batch."""
    from capsjax.training import export

    process.find_devices()
    print(f"export: {export(config)}; {config.out / 'load.py'} runs it without capsjax")


def _imported(name: str, extra: str | None = None) -> Any:
    """Imports ``module:Class``, which may need packages that only an extra brings."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        raise ConfigError(f"needs the package {error.name}: {how_to_install(extra)}") from None


def _resumed_options(arguments: Sequence[str]) -> Any:
    """The options of the run that is to be resumed, of which the arguments change some."""
    if "--resume" not in arguments or "--help" in arguments:
        return None
    given = re.search(r"\0--run[-_]dir[=\0]([^\0]+)", "\0".join(arguments))
    if given is None:
        return None
    _imported("capsjax.training:initialize")(_process_options(arguments), command="capsjax train")
    directory = _imported("capsjax.training.run_directory:RunDirectory")
    return directory(Path(given[1]).expanduser()).read_config().train


def _process_options(arguments: Sequence[str]) -> Any:
    """How processes are joined, by arguments that are parsed with all others later."""
    kind = _imported("capsjax.training:ProcessOptions")
    given: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        option = f"--{field.name}".replace("_", "[-_]")
        if found := re.search(rf"\0{option}[=\0]([^\0]+)", "\0" + "\0".join(arguments)):
            text = found[1]
            given[field.name] = int(text) if field.name != "coordinator" else text
    return kind(**given)


def _bench_options() -> Any:
    """The options of a benchmark, or after ``compare`` those of a comparison."""
    run, compare = (_imported(f"capsjax.bench:{name}Config") for name in ("Bench", "Compare"))
    return (
        Annotated[run, tyro.conf.subcommand("run", prefix_name=False)]
        | Annotated[compare, tyro.conf.subcommand("compare", prefix_name=False)]
    )


class _Command(NamedTuple):
    """A subcommand.

    Attributes:
      run: called with the options.
      options: imports the type of the options.
      default: makes the options that the arguments change; None for those of the type.
      joins: whether several processes run it as one.
    """

    run: Callable[[Any], None]
    options: Callable[[], Any]
    default: Callable[[Sequence[str]], Any] | None = None
    joins: bool = False


def _command(run: Callable[[Any], None], options: str, extra: str | None = None) -> _Command:
    return _Command(run, functools.partial(_imported, options, extra))


_COMMANDS = {
    "train": _command(_train, "capsjax.training:TrainConfig")._replace(
        default=_resumed_options, joins=True
    ),
    "evaluate": _command(_evaluate, "capsjax.training:EvaluateConfig")._replace(joins=True),
    "predict": _command(_predict, "capsjax.training:PredictConfig"),
    "export": _command(_export, "capsjax.training:ExportConfig"),
    "reproduce": _command(_reproduce, "capsjax.reproduce:ReproduceConfig")._replace(joins=True),
    "bench": _Command(_bench, _bench_options, lambda _: _imported("capsjax.bench:BenchConfig")()),
    "draw": _command(_draw, "capsjax.viz.draw:DrawConfig", "viz"),
    "explore": _command(_explore, "capsjax.viz.explorer:ExploreConfig", "explore"),
}


def _complete(arguments: list[str]) -> list[str]:
    """Spells out what may be abbreviated."""
    arguments = [re.sub(r"^--model(?==|$)", "--preset", argument) for argument in arguments]
    # A file of arrays may be named as the data set that it holds.
    text = "".join(f"\0{argument}" for argument in arguments)
    file = r"\0--dataset[=\0]([^\0]+\.npz)(?=\0|$)"
    arguments = re.sub(file, r"\0--dataset\0npz\0--data-dir\0\1", text).split("\0")[1:]
    command = arguments[0] if arguments else ""
    if command in ("evaluate", "predict", "export", "explore"):
        given = (re.sub(r"^--run[-_]dir(=|$)", "", argument) for argument in arguments)
        return [argument for argument in given if argument]
    if command == "train" and "--resume" in arguments:
        after = arguments.index("--resume") + 1
        if _is_value(arguments[after : after + 1]):
            arguments.insert(after, "--run-dir")
    if command != "bench":
        return arguments
    first = 2 if arguments[1:2] == ["run"] else 1
    if arguments[first : first + 1] != ["compare"] and _is_value(arguments[first : first + 1]):
        arguments.insert(first, "--suite")
    # Flags of XLA begin with dashes, as options do: with a space before them they are values.
    after = False
    for n, argument in enumerate(arguments):
        is_flag = argument.startswith("--xla_")
        if after and is_flag:
            arguments[n] = f" {argument}"
        after = argument in ("--xla-flag", "--xla_flag") or (
            after and (is_flag or not argument.startswith("-"))
        )
    return arguments


def _is_value(arguments: Sequence[str]) -> bool:
    return bool(arguments) and not arguments[0].startswith("-")


def _parse(prog: str, arguments: Sequence[str]) -> Callable[[], None]:
    """Returns the chosen command with its options."""

    def choice(command: _Command) -> Callable[..., Any]:
        options = tyro.conf.arg(name="", constructor_factory=command.options)
        chosen = [command] == [_COMMANDS.get(a) for a in arguments[:1]]
        default = command.default(arguments) if chosen and command.default else None
        kinds: dict[str, Any] = {"config": Annotated[Any, options]}
        if command.joins:
            joined = functools.partial(_imported, "capsjax.training:ProcessOptions")
            kinds["processes"] = Annotated[Any, tyro.conf.arg(name="", constructor_factory=joined)]

        def choose(**given: Any) -> Callable[[], None]:
            if command.joins:
                return functools.partial(_join, command.run, prog, *given.values())
            return functools.partial(command.run, *given.values())

        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=kind,
                default=default if name == "config" and default else inspect.Parameter.empty,
            )
            for name, kind in kinds.items()
        ]
        choose.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        choose.__annotations__ = kinds
        choose.__doc__ = command.run.__doc__
        return choose

    # The hook is not a part of tyro's stable interface: without it tyro prints errors in its way.
    hook = getattr(getattr(tyro, "_errors", None), "on_parse_error", contextlib.nullcontext)
    with hook(functools.partial(_refuse, prog, arguments)), process.wide_enough():
        run: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
            {name: choice(command) for name, command in _COMMANDS.items()},
            prog="capsjax",
            description=f"Capsule networks for JAX, version {__version__} (--version).",
            args=arguments,
            config=_TYRO,
        )
    return run


_KINDS = {
    "INT": "an integer",
    "FLOAT": "a number",
    "PATH": "a path",
    "STR": "a text",
    "{[FLOAT [FLOAT ...]]}": "numbers",
}


def _refuse(prog: str, arguments: Sequence[str], event: Any) -> None:
    """Raises a ConfigError for an event of tyro: what it could not parse, in one line."""
    match type(event).__name__:
        case "InvalidChoice":
            # The order of an option's choices is that of a set if there may be none of them.
            choices = event.choices if "None" not in event.choices else sorted(event.choices)
            known = ", ".join(choice for choice in choices if choice != "None")
            message = f"{_name(event.argument)} must be one of {known}, got {event.value!r}"
        case "BadValue":
            message = f"{_name(event.argument)} needs a value: {_kind(event.argument)}"
            flags = {"--help", *_flags(arguments[0])}
            options = [a.partition("=")[0] for a in arguments if a.startswith("--")]
            unknown = [option for option in options if option not in flags]
            if unknown:  # which is what keeps a positional argument from its value
                message = _unknown(unknown[0], arguments)
        case "InstantiationFailure" if event.argument is None:
            message = event.message  # of the options' own checks
        case "InstantiationFailure":
            given = re.findall(r"'[^']*'", event.message.partition("\n")[0])
            got = f", got {given[-1]}" if given else f": {event.message}"
            message = f"{_name(event.argument)} must be {_kind(event.argument)}{got}"
        case "UnrecognizedArgs":
            message = _unknown(event.tokens[0], arguments)
        case "MissingArgs":
            names = ", ".join(_name(missing.arg) for missing in event.missing_arguments)
            message = f"needs {names}"
        case "MissingSubcommand":
            message = f"needs a command, one of {', '.join(_COMMANDS)}"
        case _:
            return
    raise ConfigError(f"{message} (see {prog} --help)")


def _unknown(token: str, arguments: Sequence[str]) -> str:
    if arguments[0] not in _COMMANDS:
        return f"command must be one of {', '.join(_COMMANDS)}, got {arguments[0]!r}"
    near = difflib.get_close_matches(token.partition("=")[0], _flags(arguments[0]), n=1)
    return f"unknown: {token}" + (f"; perhaps you meant {near[0]}" if near else "")


def _flags(command: str) -> list[str]:
    """The options of a command, as they are written."""
    types = typing.get_args(_COMMANDS[command].options()) or (_COMMANDS[command].options(),)
    if _COMMANDS[command].joins:
        types = (*types, _imported("capsjax.training:ProcessOptions"))
    kinds = [getattr(kind, "__origin__", kind) for kind in types]
    flags = ["--model"] if command == "train" else []
    for field in (field for kind in kinds for field in dataclasses.fields(kind)):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            continue  # by its position
        name = field.name.replace("_", "-")
        flags += [f"--{name}", f"--no-{name}"] if field.type is bool else [f"--{name}"]
    return flags


def _kind(argument: Any) -> str:
    metavar = argument.lowered.metavar.removeprefix("{None}|")
    kinds = (kind.replace("{None,", "{") for kind in metavar.split("|"))
    return " or ".join(_KINDS.get(kind, kind.strip("{}")) for kind in kinds)


def _name(argument: Any) -> str:
    """An argument as it is written on the command line."""
    flags = argument.lowered.name_or_flags
    return str(flags[0] if flags and flags[0].startswith("-") else argument.field.extern_name)


def _print_result(result: "Result") -> None:
    from capsjax.training.run_directory import RunDirectory

    assert result.test is not None  # a run that was not stopped has been tested
    _print_error("test error", result.test)
    steps = f"{result.step:,} steps"
    if result.first_step:
        steps = f"steps {result.first_step:,} to {result.step:,}"
    print(f"trained {steps} in {_duration(result.seconds)}; see {result.run_dir}")
    picture = RunDirectory(result.run_dir).picture
    if picture.exists():
        print(f"test images over their reconstructions: {picture}")


def _print_error(what: str, evaluation: "Evaluation") -> None:
    """Prints the error, and the metrics; of numbers to predict the metrics alone."""
    if evaluation.wrong is not None:
        counts = f"{evaluation.wrong:,} of {evaluation.count:,} wrong"
        print(f"{what}: {evaluation.error:.2%} ({counts})")
    for name, value in evaluation.metrics.items():
        print(f"{what.removesuffix(' error')} {name}: {value:.4g} ({evaluation.count:,} images)")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _report(prog: str, message: str) -> None:
    print(f"{prog}: error: {message}", file=sys.stderr)
