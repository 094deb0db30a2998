"""Small JSON files, decoded to types and written atomically."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from capsjax.errors import ConfigError
from capsjax.files import write_text
from capsjax.options import as_path

T = TypeVar("T")


def decode(data: bytes | msgspec.Raw, kind: type[T], where: str) -> T:
    """Decodes JSON as a dataclass, `msgspec.Struct` or `TypedDict`.

    Raises:
      ConfigError: the data are not JSON, a key is missing, or a value has another type or is not
        accepted by the dataclass.
    """
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=as_path)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(error.__cause__, ConfigError):  # well-formed, and refused by the dataclass
            raise ConfigError(f"{where}: {error.__cause__}") from None
        raise ConfigError(f"{where} is damaged: {error}") from None


def read_json(path: Path, kind: type[T]) -> T:
    """Reads a file of one JSON value.

    Raises:
      ConfigError: see :func:`decode`.
    """
    return decode(path.read_bytes(), kind, str(path))


def read_json_lines(path: Path, kind: type[T]) -> list[T]:
    """Reads a file of JSON lines, without a last line that a crash cut short.

    Raises:
      ConfigError: see :func:`decode`.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [decode(line, kind, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file; a crash leaves either the old file or the new one."""
    write_text(path, json.dumps(finite(values), indent=2) + "\n")


def finite(values: Any) -> Any:
    """Returns JSON values with None for non-finite numbers, which JSON lacks."""
    if isinstance(values, Mapping):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
