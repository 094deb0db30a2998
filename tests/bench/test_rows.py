"""Rows: versioned, appended, read back, also after a kill."""

import json
from typing import NamedTuple

import pytest

from capsjax.bench import RowError, append_row, read_environment, read_rows


class Point(NamedTuple):
    x: int
    y: tuple[float, ...]


def test_rows_come_back_with_schema_and_version(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"cell": "a", "point": Point(1, (0.5, 2.0)), "none": None})
    append_row(path, {"cell": "b"})
    first, second = read_rows(path)
    assert first["point"] == {"x": 1, "y": [0.5, 2.0]}
    assert (first["schema"], first["version"], second["cell"]) == ("capsjax.bench", 1, "b")


def test_a_line_that_a_kill_cut_off_is_left_out_and_not_continued(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"cell": "a"})
    whole = path.read_text()
    path.write_text(whole + whole[:25])
    assert [row["cell"] for row in read_rows(path)] == ["a"]
    append_row(path, {"cell": "b"})
    assert [row["cell"] for row in read_rows(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hello", ":1 is not JSON"),
        ("[1]", ":1 is no row of capsjax.bench"),
        (
            json.dumps({"schema": "capsjax.bench", "version": 99}),
            "version 99, this capsjax reads 1",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RowError, match=said):
        read_rows(path)


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        append_row(tmp_path / "rows.jsonl", {"seconds": float("nan")})


def test_the_environment_names_versions_and_machine():
    environment = read_environment()
    assert environment.jax
    assert environment.cpu
    assert "xla_force_host_platform_device_count=8" in environment.xla_flags
    assert environment.memory_bytes is None or environment.memory_bytes > 2**28
