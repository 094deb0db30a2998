"""Checks of options, shared by all commands."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from capsjax.errors import ConfigError
from capsjax.training.files import as_path


def check_types(config: Any) -> None:
    """Raises a ConfigError for values of a wrong type; converts lists to tuples and str to Path."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            converted = msgspec.convert(value, kind, dec_hook=as_path)
        except msgspec.ValidationError:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} must be {_expected(kind)}, got {value!r}") from None
        object.__setattr__(config, name, converted)


_TYPES = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path",
}


def _expected(kind: Any) -> str:
    """Describes the type of an option."""
    kinds = (kind,) if get_origin(kind) in (None, Literal, tuple) else get_args(kind)
    texts = [x for k in kinds if get_origin(k) is Literal for x in get_args(k)]
    others = [_TYPES[k] for k in kinds if k in _TYPES]
    others += [_tuple_of(*get_args(k)) for k in kinds if get_origin(k) is tuple]
    if others:
        return " or ".join([*map(str, texts), *others])
    return f"one of {', '.join(map(str, texts))}"


def _tuple_of(kind: Any, *_: Any) -> str:
    if get_origin(kind) is Literal:
        return f"a tuple of {', '.join(get_args(kind))}"
    return f"a tuple of {_TYPES[kind].split()[-1]}s"


def require(config: Any, name: str, holds: bool, expected: str) -> None:
    """Raises a ConfigError that names an option unless `holds`."""
    if not holds:
        option = "--" + name.replace("_", "-")
        raise ConfigError(f"{option} must be {expected}, got {getattr(config, name)}")


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Raises a ConfigError if one of these options is given and less than `least`."""
    for name in names:
        value = getattr(config, name)
        require(config, name, value is None or value >= least, f"at least {least}")
