"""Rows of measurements in a file: JSON lines with a versioned schema."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA = "capsjax.bench"
VERSION = 1

Row = dict[str, Any]


class RowError(ValueError):
    """A file does not hold rows that this version reads; the message is one line."""


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file, with the name and the version of the schema, and waits for the disk.

    Args:
      path: of the file; made if it is missing.
      row: values that JSON knows; NamedTuples become objects.

    Raises:
      TypeError: a value is none that JSON knows.
      OSError: the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> from capsjax.bench.rows import append_row, read_rows
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   path = pathlib.Path(folder, "rows.jsonl")
      ...   append_row(path, {"workload": "squash"})
      ...   read_rows(path)[0]["workload"]
      'squash'
    """
    line = json.dumps({"schema": SCHEMA, "version": VERSION, **plain(row)}, allow_nan=False)
    # What a killed process has left behind ends in the middle of a line.
    broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if broken else "") + line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a file; a last line that was cut off is left out.

    Raises:
      RowError: a line is no row, or of a version that is not known.
      OSError: the file cannot be read.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if _is_cut_off(lines, number):
                continue
            raise RowError(f"{path}:{number} is not JSON") from None
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            raise RowError(f"{path}:{number} is no row of {SCHEMA}")
        if row.get("version") != VERSION:
            raise RowError(
                f"{path}:{number} is of version {row.get('version')}, this capsjax reads {VERSION}"
            )
        rows.append(row)
    return rows


def plain(value: Any) -> Any:
    """The value with NamedTuples as objects, for JSON."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def _is_cut_off(lines: list[str], number: int) -> bool:
    """Whether a line that is not JSON is what a killed process had begun to write."""
    return lines[number - 1].startswith('{"schema"')
