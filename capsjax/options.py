"""Checks of options and of the paths that they give, shared by all commands."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from capsjax.errors import ConfigError


def flag(name: str) -> str:
    """Returns an option as the command line has it."""
    return "--" + name.replace("_", "-")


def check_types(config: Any) -> None:
    """Raises a ConfigError for values of a wrong type; converts lists to tuples and str to Path."""
    # Imported here, because the processes of a benchmark do not need it.
    import msgspec

    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            converted = msgspec.convert(_plain(value), kind, dec_hook=as_path)
        except msgspec.ValidationError:
            raise ConfigError(f"{flag(name)} must be {_expected(kind)}, got {value!r}") from None
        object.__setattr__(config, name, converted)


_TYPES = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path",
}


def _plain(value: Any) -> Any:
    """Converts scalars of NumPy or JAX, also in tuples, to Python numbers."""
    if isinstance(value, list | tuple | range):
        return tuple(map(_plain, value))
    return value.item() if getattr(value, "shape", None) == () else value


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
        raise ConfigError(f"{flag(name)} must be {expected}, got {getattr(config, name)}")


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Raises a ConfigError if one of these options is given and less than `least`."""
    for name in names:
        value = getattr(config, name)
        require(config, name, value is None or value >= least, f"at least {least}")


def check_default(config: Any, where: str, *names: str) -> None:
    """Raises a ConfigError if one of these options, which have no effect `where`, is given."""
    for field in dataclasses.fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise ConfigError(f"{flag(field.name)} has no effect {where}")


def as_path(kind: type, value: Any) -> Any:
    """Decodes a path, for msgspec."""
    if kind is Path and isinstance(value, str | os.PathLike):
        return Path(os.fspath(value))  # a path of epath has other parts than its text
    raise TypeError(f"Expected a path, got {value!r}")


def expand_paths(options: Any, *names: str, remote: tuple[str, ...] = ()) -> None:
    """Expands ``~`` in these options of a frozen dataclass: paths, tuples of paths, or None.

    Args:
      options: the dataclass.
      names: options that are paths on this machine.
      remote: options that may also be URLs of object storage.

    Raises:
      ConfigError: a path is a URL that is not supported.
    """
    for name in (*names, *remote):
        value = getattr(options, name)
        if value is None:
            continue
        several = isinstance(value, tuple)
        paths = tuple(
            expanded(flag(name), path, remote=name in remote)
            for path in (value if several else (value,))
        )
        object.__setattr__(options, name, paths if several else paths[0])


def require_folder(options: Any, name: str) -> None:
    """Raises a ConfigError if a file cannot be written: a directory is missing, or in its place."""
    path = getattr(options, name)
    if path is not None and path.is_dir():
        raise ConfigError(f"{flag(name)} must be a file, {path} is a directory")
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{flag(name)}: no directory {path.parent}")


def expanded(name: str, path: str | os.PathLike[str], *, remote: bool = False) -> Path:
    """Returns the path that an option gives, see :func:`expand_paths`."""
    # pathlib takes "gs://bucket" for a folder "gs:" with a bucket in it.
    if address := re.match(r"([a-z][a-z0-9+.-]+):/+", str(path), re.IGNORECASE):
        scheme, rest = address[1].lower(), str(path)[address.end() :].rstrip("/")
        if remote and scheme in _SCHEMES:
            return _object_storage(name, scheme, rest)
        storage = f", or on {', '.join(f'{known}://' for known in _SCHEMES)}" if remote else ""
        raise ConfigError(
            f"{name} must be a path on this machine{storage}, got {scheme}://{rest}; a mounted"
            " bucket has such a path"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{name}: no home directory is known for {path}") from None


_SCHEMES = ("gs", "s3", "az")
_REQUEST_SECONDS = 60.0  # gcsfs waits for ever by default


def _object_storage(name: str, scheme: str, path: str) -> Path:
    """Returns the path of a URL."""
    import fsspec
    from etils import epath

    url = f"{scheme}://{path}"
    bucket, _, folder = path.partition("/")
    if not bucket or not folder:
        raise ConfigError(f"{name} must name a folder in a bucket, got {url}")
    # fsspec expands the first four, also where it deletes; TensorStore cuts a path at # and ?.
    if found := re.search(r"[*?\[\]#]|(?<![^/])\.{0,2}(?=/)|(?<![^/])\.{1,2}$", path):
        part = found[0] or "an empty folder name"
        raise ConfigError(f"{name} must not contain {part}, got {url}")
    settings = fsspec.config.conf.setdefault(scheme, {})
    # fsspec remembers the sizes and names of objects, and would read what other processes or
    # TensorStore have written since as missing or cut short.
    settings.setdefault("use_listings_cache", False)
    if scheme == "gs":
        settings.setdefault("requests_timeout", _REQUEST_SECONDS)
    return cast(Path, epath.Path(url))
