"""Parses the command line by tyro, with one-line errors.

Options are dataclasses, which are imported only for the chosen command, so that ``capsjax --help``
does not wait for JAX.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from docstring_parser import parse_from_object
from typing_extensions import Doc

import capsjax.process as process  # `from capsjax import process` would import JAX
from capsjax.errors import ConfigError, how_to_install
from capsjax.version import __version__

_TYRO = (tyro.conf.PositionalRequiredArgs, tyro.conf.CascadeSubcommandArgs)


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      run: called with the options, and with :class:`ProcessOptions` if `joins`.
      options: imports the type of the options.
      default: returns default options for these arguments; None for those of the type.
      joins: whether several processes can run it together.
    """

    run: Callable[..., None]
    options: Callable[[], Any]
    default: Callable[[Sequence[str]], Any] | None = None
    joins: bool = False


def imported(name: str, extra: str | None = None) -> Any:
    """Imports ``module:Class``, which may need the packages of an extra."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        raise ConfigError(f"needs the package {error.name}: {how_to_install(extra)}") from None


def complete(arguments: list[str]) -> list[str]:
    """Expands abbreviations."""
    arguments = [re.sub(r"^--model(?==|$)", "--preset", argument) for argument in arguments]
    # A file of arrays may be given as the data set.
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
    # XLA flags begin with dashes like options; a space before them makes them values.
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


def parse(
    prog: str, arguments: Sequence[str], commands: Mapping[str, Command]
) -> Callable[[], None]:
    """Returns the chosen command, bound to its options.

    Args:
      prog: name of the command, for errors.
      arguments: as :func:`complete` returns them.
      commands: all commands by name.

    Raises:
      ConfigError: an argument is invalid.
    """

    def choice(command: Command) -> Callable[..., Any]:
        make = functools.partial(_documented, command.options)
        options = tyro.conf.arg(name="", constructor_factory=make)
        chosen = [command] == [commands.get(a) for a in arguments[:1]]
        default = command.default(arguments) if chosen and command.default else None
        kinds: dict[str, Any] = {"config": Annotated[Any, options]}
        if command.joins:
            named = functools.partial(imported, "capsjax.training:ProcessOptions")
            joined = functools.partial(_documented, named)
            kinds["processes"] = Annotated[Any, tyro.conf.arg(name="", constructor_factory=joined)]

        def choose(**given: Any) -> Callable[[], None]:
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

    # The hook is not in tyro's stable interface. Without it tyro prints errors in its own form.
    hook = getattr(getattr(tyro, "_errors", None), "on_parse_error", contextlib.nullcontext)
    with (
        hook(functools.partial(_refuse, prog, arguments, commands)),
        process.wide_enough(),
        warnings.catch_warnings(),
    ):
        # A URL that an option of a resumed run has is no pathlib.Path.
        warnings.filterwarnings("ignore", ".*does not match any type in Union")
        run: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
            {name: choice(command) for name, command in commands.items()},
            prog="capsjax",
            description=f"Capsule networks for JAX, version {__version__} (--version).",
            args=arguments,
            config=_TYRO,
        )
    return run


def _documented(options: Callable[[], Any]) -> Any:
    """Imports the type of options, joins the lines of their docstrings, and names paths.

    tyro keeps the line breaks of docstrings whose lines are indented, and calls all paths PATH.
    """
    found = options()
    for kind in _classes(found):
        texts = {p.arg_name: p.description for p in parse_from_object(kind).params}
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            name, hint = field.name, hints[field.name]
            if text := texts.get(name):
                hint = Annotated[hint, Doc(" ".join(text.split()))]
            if hints[name] in (Path, tuple[Path, ...]) and _is_positional(field):
                metavar = name.removesuffix("_dir").upper()
                if hints[name] is not Path:
                    metavar = f"{metavar.removesuffix('S')} ..."
                hint = Annotated[hint, tyro.conf.arg(metavar=metavar)]
            kind.__annotations__[name] = hint
    return found


def _classes(options: Any) -> list[type]:
    """Returns the dataclasses of the type of options, which may be a union of subcommands."""
    kinds = typing.get_args(options) or (options,)
    return [getattr(kind, "__origin__", kind) for kind in kinds]


def _is_positional(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


_KINDS = {
    "INT": "an integer",
    "FLOAT": "a number",
    "PATH": "a path",
    "STR": "a string",
    "{[FLOAT [FLOAT ...]]}": "numbers",
}


def _refuse(
    prog: str, arguments: Sequence[str], commands: Mapping[str, Command], event: Any
) -> None:
    """Raises a ConfigError that describes a parse error of tyro in one line."""
    match type(event).__name__:
        case "InvalidChoice":
            # The choices are in the random order of a set if the option may be None.
            choices = event.choices if "None" not in event.choices else sorted(event.choices)
            known = ", ".join(choice for choice in choices if choice != "None")
            message = f"{_name(event.argument)} must be one of {known}, got {event.value!r}"
        case "BadValue":
            message = f"{_name(event.argument)} needs a value: {_kind(event.argument)}"
            flags = {"--help", *_flags(commands[arguments[0]])}
            options = [a.partition("=")[0] for a in arguments if a.startswith("--")]
            unknown = [option for option in options if option not in flags]
            if unknown:  # it took the value of the positional argument
                message = _unknown(unknown[0], arguments, commands)
        case "InstantiationFailure" if event.argument is None:
            message = event.message  # from the options' own checks
        case "InstantiationFailure":
            given = re.findall(r"'[^']*'", event.message.partition("\n")[0])
            got = f", got {given[-1]}" if given else f": {event.message}"
            message = f"{_name(event.argument)} must be {_kind(event.argument)}{got}"
        case "UnrecognizedArgs":
            message = _unknown(event.tokens[0], arguments, commands)
        case "MissingArgs":
            names = ", ".join(_name(missing.arg) for missing in event.missing_arguments)
            message = f"needs {names}"
        case "MissingSubcommand":
            message = f"needs a command, one of {', '.join(commands)}"
        case _:
            return
    raise ConfigError(f"{message} (see {prog} --help)")


def _unknown(token: str, arguments: Sequence[str], commands: Mapping[str, Command]) -> str:
    if arguments[0] not in commands:
        return f"command must be one of {', '.join(commands)}, got {arguments[0]!r}"
    near = difflib.get_close_matches(token.partition("=")[0], _flags(commands[arguments[0]]), n=1)
    return f"unknown argument: {token}" + (f"; did you mean {near[0]}?" if near else "")


def _flags(command: Command) -> list[str]:
    """Returns the options of a command as written on the command line."""
    kinds = _classes(command.options())
    if command.joins:
        kinds.append(imported("capsjax.training:ProcessOptions"))
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    flags = ["--model"] if any(field.name == "preset" for field in fields) else []
    for field in fields:
        if _is_positional(field):
            continue
        name = field.name.replace("_", "-")
        flags += [f"--{name}", f"--no-{name}"] if field.type is bool else [f"--{name}"]
    return flags


def _kind(argument: Any) -> str:
    metavar = argument.lowered.metavar.removeprefix("{None}|")
    kinds = (kind.replace("{None,", "{") for kind in metavar.split("|"))
    return " or ".join(_KINDS.get(kind, kind.strip("{}")) for kind in kinds)


def _name(argument: Any) -> str:
    """Returns an argument as written on the command line."""
    flags = argument.lowered.name_or_flags
    if flags and flags[0].startswith("-"):
        return str(flags[0])
    metavar = str(argument.lowered.metavar)
    return str(argument.field.extern_name).upper() if metavar.startswith("{") else metavar
